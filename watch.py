"""What a run shows of itself: its log and picture, answers before and after, what it forgets, the hardest examples."""
import csv
import dataclasses
import functools
import gc
import io
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from console import UserError, status
from prepare_data import SUPERVISED, blocks
from weights import atomic_file, opened

COLUMNS = ["step", "epoch", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens",
           "seconds"]


def read_rows(path):
    """The rows of a CSV file as dicts; none where there is no file."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{**row, "step": int(row["step"])} for row in csv.DictReader(file) if None not in row.values()]
    except (ValueError, KeyError, csv.Error):
        raise UserError(f"{path} is not as train.py wrote it: put it back, or remove it and lose its rows") from None


def write_rows(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def shorten(text, width=100):
    return text if len(text) <= width else text[:width // 2 - 2] + " ... " + text[-width // 2 + 3:]


def free_memory():
    """Bytes that this process may still take, where Linux tells; else inf."""
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
        return free if limit == "max" else min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, StopIteration, ValueError):
        return math.inf


def expected_memory(model, learned, tokens, config):
    """Bytes that training needs beyond what the process holds already: gradients, AdamW's moments, casts, and the
    activations of the largest micro-batch."""
    half, n_layer, n_embd = model.compute_dtype.itemsize == 2, model.config.n_layer, model.config.n_embd
    each = (2 if half else 4) + (4 if config.low_memory else 8)
    layers = 1 + n_layer / 8 if config.gradient_checkpointing else n_layer
    return (learned * each + tokens * layers * n_embd * 20 * model.compute_dtype.itemsize
            + min(tokens, 2048) * model.config.vocab_size * 7)


def describe(model, base, plan, config, train, val, device, processes):
    """Prints what will be trained, on what, for how long and in how much memory."""
    total = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    longest = np.sort(train.lengths)[::-1][:config.batch_size]
    tokens = int(min(longest.sum(), plan.budget))
    need, free = expected_memory(model, learned, tokens, config), free_memory()
    print(f"{base['name']}: {total / 1e6:,.1f} M parameters, "
          + f"{learned / 1e6:,.2f} M of them trainable ({learned / total:.2%}), " * (learned < total)
          + f"{str(model.compute_dtype)[6:]} activations on {device}" + f", {processes} processes" * (processes > 1)
          + f"\n{config.data_dir}: {len(train):,} training, {len(val):,} validation examples\n"
          f"{plan.total:,} steps of {config.batch_size} examples, learning rate {plan.learning_rate:g}"
          + f"; at most about {max(need / 1e9, 0.1):.1f} GB more memory" * (device.type == "cpu"), flush=True)
    if device.type == "cpu" and need > free:
        print(f"warning: only {free / 1e9:.1f} GB are free; try " + "--low_memory, " * (not config.low_memory)
              + "--lora_rank=8, " * (not config.lora_rank and base["name"] != "scratch")
              + "--gradient_checkpointing, a smaller --micro_batch_tokens or a smaller model", flush=True)


class Log:
    """log.csv, the progress line, and Weights & Biases or tensorboard where they are wanted. A row's loss and norm may
    still be on their way from a GPU: they are read ten steps at a time, or when somebody wants to see them."""

    def __init__(self, plan, out_dir, step, rate, trackers, writes):
        self.plan, self.rate, self.writes, self.rows, self.skipped, self.in_a_row = plan, rate, writes, [], 0, 0
        self.path, self.first, self.began, self.trackers = out_dir / "log.csv", step, time.perf_counter(), trackers
        if writes:
            write_rows(self.path, [row for row in read_rows(self.path) if row["step"] <= step])

    def add(self, work, wanted, **row):
        """Takes a step's row, by COLUMNS; `work` is its multiplications and additions. What is `wanted` must stand in
        log.csv after the next `write`: a checkpoint proves it finished."""
        self.rows.append({**dict.fromkeys(COLUMNS, ""), **row})
        step, plan = row["step"], self.plan
        if len(self.rows) < 10 and step % plan.log_interval and step % plan.eval_interval and not wanted:
            return
        for unread in self.rows:
            unread["train_loss"], unread["grad_norm"] = float(unread["train_loss"]), float(unread["grad_norm"])
            finite = math.isfinite(unread["train_loss"] + unread["grad_norm"])
            self.skipped, self.in_a_row = self.skipped + (not finite), 0 if finite else self.in_a_row + 1
        if step % plan.log_interval == 0 or wanted or self.in_a_row:
            row, left = self.rows[-1], (time.perf_counter() - self.began) / (step - self.first) * (plan.total - step)
            share = work / row["seconds"] / self.rate
            status(f"step {step:,}/{plan.total:,}  {left // 60:.0f}:{left % 60:02.0f} left  "
                   f"loss {row['train_loss']:.4f}  lr {row['learning_rate']:.1e}  norm {row['grad_norm']:.2f}  "
                   f"{row['tokens'] / row['seconds']:,.0f} tokens/s ({share:.0%} of matmul peak)"
                   + f"  ({self.skipped} skipped: not finite)" * bool(self.skipped), end=not sys.stdout.isatty())

    def write(self, sync):
        """Writes the rows that were read; with `sync` they outlast a loss of power."""
        rows = [row for row in self.rows if isinstance(row["train_loss"], float)]
        self.rows = self.rows[len(rows):]
        if not self.writes or not rows:
            return
        with opened(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not file.tell():  # somebody has removed the log
                writer.writeheader()
            writer.writerows({name: f"{value:.8g}" if isinstance(value, float) else value
                              for name, value in row.items()} for row in rows)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        for row in rows if self.trackers else ():
            numbers = {"train/loss": row["train_loss"], "val/loss": row["val_loss"], "lr": row["learning_rate"],
                       "grad_norm": row["grad_norm"], "tokens_per_second": row["tokens"] / row["seconds"]}
            for track in self.trackers[:]:
                try:
                    track({name: value for name, value in numbers.items() if value != ""}, row["step"])
                except Exception as error:  # whatever it is, the run is worth more
                    self.trackers.remove(track)
                    print(f"\nwarning: --wandb or --tensorboard failed and is left out from here on ({error})")


def trackers(config, out_dir):
    """Functions of (numbers by name, step) that log elsewhere, and write into out_dir only once they are called."""
    functions = []
    if config.wandb:
        try:
            import wandb
            functions.append(wandb.init(project="nanosft", name=out_dir.name, config=dataclasses.asdict(config)).log)
        except Exception as error:  # nobody is logged in, no network
            raise UserError(f"--wandb: {error}") from None
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = functools.cache(lambda: SummaryWriter(out_dir / "tensorboard"))
        functions.append(lambda numbers, step: [writer().add_scalar(*number, step) for number in numbers.items()])
    return functions


def plot(out_dir):
    """loss.png from log.csv, where matplotlib is installed: both losses, the best step, the learning rate."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except Exception:  # it is missing, or broken: no reason to end a run
        return
    gc.collect()  # the last figure refers to itself: megabytes that Python would keep for hours
    try:
        rows = read_rows(out_dir / "log.csv")
        steps, losses, rates, tokens = ([float(row[name]) for row in rows]
                                        for name in ("step", "train_loss", "learning_rate", "tokens"))
        evaluated = [(float(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    except (ValueError, KeyError):  # somebody has edited the log
        return
    if not rows:
        return
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", linewidth=0.6, alpha=0.35)
    window = max(1, len(rows) // 50)
    if len(rows) >= window:
        axes.plot(steps[window - 1:], np.convolve(losses, np.ones(window) / window, "valid"), color="tab:blue",
                  label="training" + f", mean of {window} steps" * (window > 1))
    if evaluated:
        step, best = min(evaluated, key=lambda one: (math.isnan(one[1]), one[1]))
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", label="validation")
        axes.plot(step, best, "*", color="tab:red", markersize=15, zorder=3,
                  label=f"best: {best:.4f} at step {step:,.0f}")
    axes.set(xlabel="step", ylabel="loss per supervised token", yscale="log", xlim=(0, None))
    mean = sum(tokens) / max(1, len(rows)) or 1
    top = axes.secondary_xaxis("top", functions=(lambda step: step * mean, lambda n: n / mean))
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    right = axes.twinx()
    right.plot(steps, rates, ":", color="tab:green")
    right.set(ylabel="learning rate (dotted)", ylim=(0, None))
    axes.legend(loc="upper right")
    try:
        with atomic_file(out_dir / "loss.png") as file:
            figure.savefig(file, format="png", dpi=120)
    except OSError as error:  # a picture is no reason to end a run
        print(f"warning: no loss.png ({error})")


def without_template(texts):
    """Each text in one line, less the lines that more than a fifth of the texts share: those are the template's."""
    texts = [text.replace("<|endoftext|>", "\n").splitlines() for text in texts]
    seen, few = Counter(line for lines in texts for line in set(lines)), max(1, len(texts) // 5)
    return [" ".join(" ".join(line for line in lines if seen[line] <= few).split()) for lines in texts]


class Samples:
    """A few prompts with their answers, to see in plain text what the model has learned so far; `kind` tells where they
    are from, `before` what an untrained model answered, if that is known already."""

    def __init__(self, shards, encoding, kind, before=None, count=5):
        self.encoding, self.kind, self.before, self.prompts, self.answers = encoding, kind, before, [], []
        for tokens in (shards[i] for i in range(min(40, len(shards)))):
            supervised = (tokens["flags"] & SUPERVISED).astype(bool)
            first = int(supervised.argmax())
            if first == 1 and supervised[1:].all():  # plain text goes on from a few words
                first = min(16, len(tokens) // 2)
            stop = first + int(np.append(~supervised[first:], True).argmax())
            self.prompts.append(tokens["id"][:first].tolist())
            self.answers.append(tokens["id"][first:stop].tolist())
        self.titles = [shorten(text) for text in without_template(map(encoding.decode, self.prompts))[:count]]
        del self.prompts[count:], self.answers[count:]

    def answer(self, model, count):
        """One greedy answer to each of the first prompts, as ids, cut at the length of the right one plus a little."""
        prompts, answers = self.prompts[:count], [[] for _ in self.prompts[:count]]
        limit = min(64, max(map(len, self.answers), default=0) + 4)
        room = model.config.block_size - max(map(len, prompts), default=0)
        if prompts and room > 0:
            for step in model.generate(prompts, min(limit, room), stop=self.encoding.eot_token,
                                       n_vocab=self.encoding.n_vocab):
                for answer, token in zip(answers, step, strict=True):
                    answer += [token] if token is not None else []
        return answers

    def text(self, ids):
        return shorten(self.encoding.decode([token for token in ids if token != self.encoding.eot_token]), 70)

    def show(self, model, heading):
        status("")
        print(f"  {heading}:")
        answers = self.answer(model, 2 if self.before else len(self.prompts))
        self.before = self.before or answers
        for title, answer, expected in zip(self.titles[:2], answers, self.answers, strict=False):
            right = "  (exact)" if answer == expected else ""
            print(f"    {title} -> {self.text(answer)!r}{right}", flush=True)

    def table(self, model):
        """Prints the held-out prompts with the answers before and after."""
        print(f"  {self.kind} prompts, before and after:")
        after = self.answer(model, len(self.prompts))
        for title, before, now, right in zip(self.titles, self.before or after, after, self.answers, strict=True):
            print(f"    {title}\n" + f"      before: {self.text(before)!r}\n" * bool(self.before)
                  + f"      after:  {self.text(now)!r}"
                  + ("  (exact)" if now == right else f"\n      right:  {self.text(right)!r}"))


class Forgetting:
    """Bits per byte of a piece of ordinary text: what fine-tuning costs elsewhere. forget.csv keeps them."""

    def __init__(self, config, base, encoding, out_dir, step):
        bundled = "none" if base["name"] == "scratch" else Path(__file__).parent / "data" / "forget.txt"
        self.text, self.path, self.rows = "", out_dir / "forget.csv", []
        if (path := str(config.forget_text or bundled)) != "none":
            self.text = Path(path).read_text(encoding="utf-8", errors="replace")
            self.ids = [encoding.eot_token, *encoding.encode_ordinary(self.text)]
            self.rows = [row for row in read_rows(self.path) if row["step"] <= step > 0]

    @torch.no_grad()
    def measure(self, model, step):
        """Measures, writes forget.csv and returns what to print; '' where there is no text."""
        if not self.text:
            return ""
        loss = 0.0
        model.eval()
        for ids, _ in blocks([self.ids], model.config.block_size):
            ids = torch.tensor(ids)
            loss += model(ids[None, :-1], ids[None, 1:]).item()
        model.train()
        bits = loss / math.log(2) / len(self.text.encode())
        self.rows.append({"step": step, "bits_per_byte": f"{bits:.6f}"})
        write_rows(self.path, self.rows)
        return f", ordinary text {bits:.3f} bits per byte" + (
            f" ({float(self.rows[0]['bits_per_byte']):.3f} before)" if len(self.rows) > 1 else "")


def find_hardest(loss, supervised, shards, encoding, out_dir, count):
    """Writes every training example's mean loss (of its summed loss and its supervised targets) to examples.csv,
    hardest first, and prints the first few: wrong labels and broken records stand among them."""
    mean = loss / np.maximum(supervised, 1)
    order = np.argsort(-mean, kind="stable")
    texts = {int(i): encoding.decode(shards[i]["id"].tolist()) for i in order[:1000]}
    learned = {int(i): (shards[i]["flags"] & SUPERVISED).astype(bool) for i in order[:1000]}
    prompts, answers = ([encoding.decode(shards[i]["id"][learned[i] == part].tolist()) for i in texts]
                        for part in (False, True))
    write_rows(out_dir / "examples.csv", [{"example": i, "loss": f"{mean[i]:.6f}", "supervised_tokens": supervised[i],
                                           "text": texts.get(int(i), "")} for i in order])
    status("")
    print(f"  the hardest training examples (all {len(shards):,} by loss in {out_dir / 'examples.csv'}):")
    for i, prompt, answer in zip(order[:count], without_template(prompts), answers, strict=False):
        answer = " ".join(answer.replace("<|endoftext|>", " ").split())
        print(f"    {mean[i]:7.3f}  {shorten(f'{prompt} -> ' * bool(prompt) + answer)}")
