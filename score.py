"""What answers are worth: exact matches, likeliest labels with their confidence interval, a confusion matrix."""
from collections import Counter

from console import UserError, status
from records import NAME, fill


def interval(right, count):
    """Wilson's 95 % confidence interval of a share."""
    z, share = 1.96, right / count
    middle, half = share + z * z / (2 * count), z * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
    return tuple((middle + sign * half) / (1 + z * z / count) for sign in (-1, 1))


def label_set(references, given, voice):
    """The classes that the answers come from, as they are rendered: those `given`, with commas, or the
    references, where they are few; [] where the file is no classification."""
    labels = sorted({reference for reference in references if reference is not None})
    if given:
        form, own = voice.spec["response_format"], {truth.strip(): truth for truth in labels}
        names = NAME.findall(form)
        labels = [fill(form, {names[0]: label}, "labels") if len(names) == 1 else own.get(label, label)
                  for label in (label.strip() for label in given.split(","))]
    longest = max((len(voice.encoding.encode_ordinary(label)) for label in labels), default=0)
    if given and longest >= voice.model.config.block_size:
        raise UserError(f"--labels: one has {longest:,} tokens, more than the context: give short ones")
    few = 2 <= len(labels) <= 50 and 3 * len(labels) <= len(references) and longest < voice.model.config.block_size
    return labels if given or few else []


def classify(voice, prompts, labels):
    """The likeliest label for each prompt: highest log-probability summed over the label's tokens and its stop."""
    answers, likeliest = [voice.encoding.encode_ordinary(label) + [voice.encoding.eot_token] for label in labels], []
    room = voice.model.config.block_size + 1 - max(map(len, answers))
    size = max(1, 64 // len(labels))
    for start in range(0, len(prompts), size):  # a prompt that fills the context loses its beginning
        scores = voice.model.log_likelihood([prompt[-room:] for prompt in prompts[start:start + size]], answers)
        likeliest += [labels[i] for i in scores.argmax(1).tolist()]
        status(f"{len(likeliest):,} of {len(prompts):,} classified", end=len(likeliest) == len(prompts))
    return likeliest


def confusion(pairs, labels):
    """Prints, for (truth, prediction) pairs, how often each label was taken for which, and each label's recall."""
    counts, width = Counter(pairs), max(8, *(len(label.strip()) + 1 for label in labels))
    if others := sum(count for (truth, _), count in counts.items() if truth not in labels):
        print(f"\n{others} of {sum(counts.values())} records have another answer than these labels: they count as "
              "wrong and stand in no row")
    print("\n" + "truth \\ likeliest".ljust(18) + "".join(label.strip()[:width - 1].rjust(width) for label in labels)
          + "recall".rjust(9))
    for truth in labels:
        row = [counts[truth, label] for label in labels]
        recall = f"{counts[truth, truth] / sum(row):.0%}" if sum(row) else "-"
        print(truth.strip()[:17].ljust(18) + "".join(str(n).rjust(width) for n in row) + recall.rjust(9))
    right = [counts[label, label] / max(1, sum(counts[truth, label] for truth in labels)) for label in labels]
    print("precision".ljust(18) + "".join(f"{share:.0%}".rjust(width) for share in right) + "\n")


def score(responses, references, labels=(), likeliest=()):
    """The numbers that one model reached: its responses (None where a prompt was too long) against the answers (None
    where a record has none); `likeliest` holds a label for each record that has one."""
    pairs = [(response or "", reference.strip()) for response, reference in zip(responses, references, strict=True)
             if reference is not None]
    result = {"records": len(responses), "scored": len(pairs),
              "exact": sum(response.strip() == reference for response, reference in pairs)}
    if labels:
        known, truths = {label.strip() for label in labels}, [reference for _, reference in pairs]
        result["no_label"] = sum(response.strip() not in known for response, _ in pairs)
        result["likelihood"] = sum(truth == label.strip() for truth, label in zip(truths, likeliest, strict=True))
        result["majority"] = Counter(truths).most_common(1)[0][1]
    return result


def percent(part, whole):
    return f"{part}/{whole} ({100 * part / whole:.1f} %)"


def summary(results):
    """Prints what each voice reached, a row each, and the last one's exact matches once more, in a line of its own."""
    table = [["", "exact match"]]
    for name, result in results.items():
        count = result["scored"]
        table.append([name, percent(result["exact"], count)])
        if "likelihood" in result:
            low, high = interval(result["likelihood"], count)
            table[0][2:] = ["no known label", "likeliest label right", "95 % interval", "always the commonest"]
            table[-1] += [percent(result["no_label"], count), percent(result["likelihood"], count),
                          f"{100 * low:.1f} to {100 * high:.1f} %", percent(result["majority"], count)]
    if len(results) > 1 or len(table[0]) > 2:
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in table[-1:] if results else ():
        print(f"exact match {line[1]}")
