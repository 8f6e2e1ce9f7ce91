"""What answers are worth: exact matches and, in a classification, likeliest labels and what they were taken for."""
import csv
from collections import Counter

from nanosft.console import UserError, status
from nanosft.pictures import plot_confusion
from nanosft.records import NAME, columns_of, fill
from nanosft.templates import encode, render_answer


def label_set(references, named, loaded):
    """{class: its ids with the stop}: the classes that answers come from, as they are rendered, which are those
    `named`, with commas, or the references, where they are few. {} where the file is no classification."""
    spelling = {label.strip(): label for label in references if label is not None}
    labels = sorted(spelling.values())
    if named:  # each alone, or in the words of response_format; spelt as the file's answers are, where one is like it
        wording, labels = loaded.spec["response_format"] or "{label}", []
        before, _, after = NAME.sub("\0", wording).strip().partition("\0")
        for name in filter(None, map(str.strip, next(csv.reader([named], skipinitialspace=True)))):
            alone = name.removeprefix(before).removesuffix(after)
            worded = fill(wording, dict.fromkeys(columns_of(wording), alone), "labels")
            labels.append(spelling.get(name) or spelling.get(worded.strip()) or worded)
        if spelling and set(labels).isdisjoint(spelling.values()):
            raise UserError(f"--labels: none of {named} is an answer of the file's; name such as {min(spelling)}")
    elif not 2 <= len(labels) <= 50 or 3 * len(labels) > len(references):
        if 2 <= len(labels) <= min(50, 2 / 3 * len(references)):
            print(f"{len(labels)} different answers in {len(references)} records; if classes, name them with --labels")
        return {}
    ids = {label: encode(render_answer(label, loaded.spec), loaded.encoding)[0] for label in labels}
    longest, context = max(map(len, ids.values())), loaded.model.config.block_size
    if named and longest > context:
        raise UserError(f"--labels: one has {longest - 1:,} tokens, more than the context: give short ones")
    return ids if longest <= context else {}


def classify(loaded, prompts, labels):
    """The likeliest label for each prompt: highest log-probability summed over the label's tokens and its stop."""
    names, answers, likeliest, size = list(labels), list(labels.values()), [], max(1, 64 // len(labels))
    for start in range(0, len(prompts), size):
        scores = loaded.model.log_likelihood(prompts[start:start + size], answers)  # (prompts, labels)
        likeliest += [names[index] for index in scores.argmax(1).tolist()]
        status(f"{len(likeliest):,} of {len(prompts):,} classified", end=len(likeliest) == len(prompts))
    return likeliest


def confusion(counts, labels):
    """Prints how often each label was taken for which, {(truth, likeliest): int}, with recall and precision. The names
    of columns are cut where that lets the table fit into 80 of a terminal's."""
    others = [pair for pair in counts if pair[0] not in labels]
    if others:
        print(f"{sum(counts[pair] for pair in others)} of {counts.total()} records have other answers, such as "
              f"{others[0][0][:24]!r}: they count as wrong")
    first = max(map(len, ["precision", *(label[:24] for label in labels)]))
    width = min(max(5, *map(len, labels)), max(5, (80 - first - 8) // len(labels) - 1)) + 1
    print("\nthe true label at the left, the likeliest at the top")
    print(f"{'':{first}}{''.join(label[:width - 1].rjust(width) for label in labels)}  recall")
    for truth in labels:
        row = [counts[truth, label] for label in labels]
        recall = f"{counts[truth, truth] / sum(row):.0%}" if sum(row) else "-"
        print(f"{truth[:24]:{first}}{''.join(f'{count:{width}}' for count in row)}{recall:>8}")
    print(f"{'precision':{first}}", end="")
    for label in labels:
        taken = sum(counts[truth, label] for truth in labels)
        print(f"{counts[label, label] / taken:{width}.0%}" if taken else "-".rjust(width), end="")
    print("\n")


def score(responses, references, labels, likeliest, picture):
    """The counts that one model reached: its responses against the references (either may be None) and, in a
    classification, the likeliest of the labels against them; the path `picture` shows what these were taken for."""
    scored = [index for index, reference in enumerate(references) if reference is not None]
    answers, truths = [(responses[i] or "").strip() for i in scored], [references[i].strip() for i in scored]
    result = {"records": len(responses), "scored": len(scored),
              "exact": sum(answer == truth for answer, truth in zip(answers, truths, strict=True))}
    if labels and scored:
        names, likeliest = [label.strip() for label in labels], [likeliest[i].strip() for i in scored]
        counts = Counter(zip(truths, likeliest, strict=True))
        confusion(counts, names)
        plot_confusion(counts, names, picture)
        result["no_label"] = sum(answer not in names for answer in answers)
        result["likelihood"] = sum(truth == label for truth, label in zip(truths, likeliest, strict=True))
        result["majority"] = max(Counter(truths).values())
    return result


def summary(results):
    """Prints what each model reached, {name: what `score` returns}, where there were references."""
    for name, result in results.items():
        count = result["scored"]
        if 0 < count < result["records"]:
            print(f"{result['records'] - count:,} of {result['records']:,} records have no answer to compare with")
        if len(results) > 1 and count:
            print(f"{name}:")
        for key, title in (("likelihood", "likeliest label right"), ("majority", "always the commonest label"),
                           ("no_label", "answers with no known label"), ("exact", "exact match")):
            if key in result and count:
                print(f"{title} {result[key]}/{count} ({100 * result[key] / count:.1f} %)")
