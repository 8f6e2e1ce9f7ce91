"""What a run shows of itself: its log, its progress, and answers to a few prompts."""
import csv
import math
import os
import re
import sys
from collections import Counter

import numpy as np

from nanosft.console import UserError, status
from nanosft.files import atomic_file, opened
from nanosft.shards import SUPERVISED
from nanosft.templates import decode

# ---- log and progress -----------------------------------------------------------------------------------------------

def read_rows(path):
    """The rows of log.csv as dicts with an int `step`; none where there is no file."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{**row, "step": int(row["step"])} for row in csv.DictReader(file) if None not in row.values()]
    except (ValueError, KeyError, csv.Error):
        raise UserError(f"{path} is not as train.py wrote it: put it back, or remove it and lose its rows") from None


def cut_rows(path, step):
    """Removes the rows of log.csv, where there is one, from after this step."""
    read_rows(path)  # UserError where it is no log
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        number = line.split(b",")[0]
        if not kept or (number.isdigit() and int(number) <= step):  # the first one is the header
            kept.append(line)
    with atomic_file(path) as file:
        file.write(b"".join(line + b"\r\n" for line in kept))


def append_row(path, row, sync):
    """Adds a row to log.csv, under the names that stand there (a fork may have others); with `sync` it outlasts a loss
    of power."""
    with opened(path, "a", newline="", encoding="utf-8") as file:
        with open(path, newline="", encoding="utf-8", errors="replace") as log:
            names = next(csv.reader(log), row)
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
        if not file.tell():
            writer.writeheader()
        writer.writerow({name: f"{value:.8g}" if isinstance(value, float) else value for name, value in row.items()})
        if sync:
            file.flush()
            os.fsync(file.fileno())


def start_tracking(run_name, settings):
    """A function that logs a row to Weights & Biases, by the usual names. What fails later is a warning."""
    try:
        import wandb
        run = wandb.init(project="nanosft", name=run_name, config=settings)
    except Exception as error:  # it is not installed, nobody is logged in, there is no network
        raise UserError(f"--wandb: {error}; install it (pip install wandb) and log in (wandb login)") from None

    def track(row):
        numbers = {"train/loss": row["train_loss"], "val/loss": row["val_loss"], "val/score": row["val_score"],
                   "lr": row["learning_rate"], "grad_norm": row["grad_norm"],
                   "tokens_per_second": row["tokens"] / row["seconds"]}
        try:
            run.log({name: value for name, value in numbers.items() if value != ""}, row["step"])
        except Exception as error:  # whatever it is, the run is worth more
            print(f"\nwarning: Weights & Biases failed at step {row['step']} ({error})")

    return track


def duration(seconds):
    """A time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def show_progress(row, total_steps, seconds_left, skipped):
    """One line: where the run is, its time left, loss, learning rate, gradient norm and speed."""
    total, rate = f"{total_steps:,}", f"{row['learning_rate']:.1e}".replace("e-0", "e-")
    line = (f"step {row['step']:>{len(total)},}/{total}  {duration(seconds_left):>7} left  "
            f"loss {row['train_loss']:6.4f}  lr {rate}  norm {row['grad_norm']:4.2f}  "
            f"{row['tokens'] / row['seconds']:6,.0f} tok/s")
    if skipped:
        line += f"  ({skipped} skipped in a row: not finite)"
    status(line, end=not sys.stdout.isatty())


# ---- answers ----------------------------------------------------------------------------------------------------

def shorten(text, width):
    if len(text) <= width:
        return text
    return text[:width // 2 - 2] + " ... " + text[-width // 2 + 3:]


def without_template(texts):
    """Each text in one line, less the lines that more than a fifth of the texts share: those are the template's."""
    texts = [re.split(r"\n|<\|\w+\|>", text) for text in texts]
    seen = Counter(line for lines in texts for line in set(lines))
    few = max(1, len(texts) // 5)
    return [" ".join(" ".join(line for line in lines if seen[line] <= few).split()) for lines in texts]


class Samples:
    """The first prompts of a split with their right answers: `count` to see in plain text what the model has learned so
    far, and `scored` to know how many of its answers are right, which `by` decides: exact or likelihood."""

    def __init__(self, shards, encoding, stop, count=2, by="", scored=0):
        self.encoding, self.stop, self.by, self.prompts, self.answers = encoding, stop, by, [], []
        for tokens in (shards[i] for i in range(min(max(40, scored), len(shards)))):
            supervised = (tokens["flags"] & SUPERVISED).astype(bool)
            first = int(supervised.argmax())
            if first == 1 and supervised[1:].all():  # plain text: its first words are the prompt
                first = min(16, len(tokens) // 2)
            stop = first + int(np.append(~supervised[first:], True).argmax())
            self.prompts.append(tokens["id"][:first].tolist())
            self.answers.append(tokens["id"][first:stop].tolist())
        self.titles = [shorten(text, 74) for text in without_template(map(encoding.decode, self.prompts))[:count]]
        del self.prompts[max(count, scored):], self.answers[max(count, scored):]
        self.scored = len(self.prompts) if by else 0
        labels = len({*map(tuple, self.answers)})
        if by == "likelihood" and not 2 <= labels <= 50:
            raise UserError(f"--best_by=likelihood needs 2 to 50 different answers, not {labels}; take exact")

    def answer(self, model, prompts, limit):
        """The model's greedy answers, lists of ids, of up to `limit` tokens."""
        steps = model.generate(prompts, limit, stop=self.stop, n_vocab=self.encoding.n_vocab)
        return [[token for token in tokens if token is not None] for tokens in zip(*steps, strict=True)]

    def expected_seconds(self, seconds):
        """About what the answers of an evaluation take, by what one of 16 tokens took: those that are counted go 32 at
        a time, which takes about as long as three."""
        longest = max(map(len, self.answers))
        return seconds * (min(64, longest) + 3 * longest * math.ceil(self.scored / 32)) / 16

    def show(self, model, heading, at_start=False):
        """Prints the first answers, each cut at the length of the longest right one plus a little, or at 64 tokens.
        at_start: one, and what is right; it ends after 16, because the first step waits for it."""
        status("")
        print(f"  {heading}:")
        count, longest = (1, 16) if at_start else (len(self.titles), 64)
        answers = self.answer(model, self.prompts[:count], min(longest, max(map(len, self.answers[:count])) + 4))
        for title, answer, right in zip(self.titles, answers, self.answers, strict=False):
            text, expected = (decode([token for token in tokens if token != self.stop], self.encoding)
                              for tokens in (answer, right))
            told = f"\n      right: {shorten(expected, 58)!r}" if at_start else ""
            exact = "  (exact)" if answer == right else ""
            print(f"    {title}{told}\n      -> {shorten(text, 58)!r}{exact}", flush=True)

    def right(self, model):
        """How many answers are right: written exactly, or the likeliest of those that occur."""
        labels, right = sorted({*map(tuple, self.answers)}), 0
        batch = 32 if self.by == "exact" else max(1, 64 // len(labels))
        for start in range(0, len(self.prompts), batch):
            prompts, answers = self.prompts[start:start + batch], self.answers[start:start + batch]
            if self.by == "exact":
                written = self.answer(model, prompts, max(map(len, answers)))
            else:
                likeliest = model.log_likelihood(prompts, list(map(list, labels))).argmax(1).tolist()
                written = [list(labels[index]) for index in likeliest]
            right += sum(own == answer for own, answer in zip(written, answers, strict=True))
        return right
