"""What answers are worth: exact matches and, in a classification, likeliest labels and what they were taken for."""
from collections import Counter

from nanosft.console import UserError, status
from nanosft.pictures import plot_confusion
from nanosft.records import NAME, fill


def longest_of(labels, loaded):
    """How many tokens the longest label has; 0 without labels."""
    return max((len(loaded.encoding.encode_ordinary(label)) for label in labels), default=0)


def label_set(references, named, loaded):
    """The classes that answers come from, as they are rendered: those `named`, with commas, or the references, where
    they are few. [] where the file is no classification."""
    labels = sorted(set(references) - {None})
    if named:  # spelt as the file's answers are or, where none is like it, as response_format has it
        spelling = {label.strip(): label for label in labels}
        wording = loaded.spec and loaded.spec["response_format"] or "{label}"
        names = [name.strip() for name in named.split(",")]
        labels = [spelling.get(name) or fill(wording, dict.fromkeys(NAME.findall(wording), name), "labels")
                  for name in names]
        if spelling and spelling.keys().isdisjoint(names):
            raise UserError(f"--labels: none of {named} is an answer of the file's, such as {next(iter(spelling))}; "
                            "name classes")
    longest = longest_of(labels, loaded)
    fits = longest < loaded.model.config.block_size  # with its stop
    if named and not fits:
        raise UserError(f"--labels: one has {longest:,} tokens, more than the context: give short ones")
    few = 2 <= len(labels) <= 50 and 3 * len(labels) <= len(references)
    return labels if named or few and fits else []


def classify(loaded, prompts, labels):
    """The likeliest label for each prompt: highest log-probability summed over the label's tokens and its stop."""
    answers = [loaded.encoding.encode_ordinary(label) + [loaded.stop] for label in labels]
    # a prompt that leaves no place for the longest answer loses its beginning
    longest_prompt = loaded.model.config.block_size + 1 - max(map(len, answers))
    likeliest, size = [], max(1, 64 // len(labels))
    for start in range(0, len(prompts), size):
        batch = [prompt[-longest_prompt:] for prompt in prompts[start:start + size]]
        scores = loaded.model.log_likelihood(batch, answers)  # (prompts, labels)
        likeliest += [labels[index] for index in scores.argmax(1).tolist()]
        status(f"{len(likeliest):,} of {len(prompts):,} classified", end=len(likeliest) == len(prompts))
    return likeliest


def confusion(counts, labels):
    """Prints how often each label was taken for which, {(truth, likeliest): int}, with recall and precision. The names
    of columns are cut where that lets the table fit into 80 of a terminal's."""
    names, others = list(map(str.strip, labels)), sum(counts[pair] for pair in counts if pair[0] not in labels)
    if others:
        print(f"{others} of {counts.total()} records have another answer than these labels: they count as wrong")
    first = max(map(len, ["precision", *(name[:24] for name in names)]))
    width = min(max(map(len, names)), max(5, (80 - first - 8) // len(names) - 1)) + 1
    print("\nthe true label at the left, the likeliest at the top")
    print(f"{'':{first}}{''.join(name[:width - 1].rjust(width) for name in names)}  recall")
    for truth, name in zip(labels, names, strict=True):
        row = [counts[truth, label] for label in labels]
        recall = counts[truth, truth] / max(1, sum(row))
        print(f"{name[:24]:{first}}{''.join(f'{count:{width}}' for count in row)}{recall:>8.0%}")
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
        likeliest = [likeliest[i] for i in scored]
        counts = Counter(zip([references[i] for i in scored], likeliest, strict=True))
        confusion(counts, labels)
        plot_confusion(counts, labels, picture)
        known = {label.strip() for label in labels}
        result["no_label"] = sum(answer not in known for answer in answers)
        result["likelihood"] = sum(truth == label.strip() for truth, label in zip(truths, likeliest, strict=True))
        result["majority"] = max(Counter(truths).values())
    return result


def summary(results):
    """Prints what each model reached, {name: what `score` returns}, where there were references."""
    for name, result in results.items():
        count = result["scored"]
        if len(results) > 1 and count:
            print(f"{name}:")
        for key, title in (("likelihood", "likeliest label right"), ("majority", "always the commonest label"),
                           ("no_label", "answers with no known label"), ("exact", "exact match")):
            if key in result and count:
                print(f"{title:28}{result[key]:5,} of {count:,} ({result[key] / count:.1%})")
