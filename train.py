"""Trains GPT-2 on the shards that prepare_data.py wrote.

    python train.py                                                           # the demo: a small GPT from scratch
    python train.py --data_dir=data/instruction-data --init_from=gpt2-medium  # fine-tune OpenAI's weights
    python train.py --resume                                                  # go on where a run in out/ was stopped

A step is a pure function of (data, seed, step): its examples, cut into micro-batches that fit the memory; the sum of
their losses, divided once by the number of supervised tokens in the whole step.
"""
import csv
import ctypes
import dataclasses
import functools
import json
import math
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from config import UserError, require, run
from model import GPT, IGNORE, SIZES, GPTConfig, atomic_file, locate, optimizer_groups
from prepare_data import FORMAT_VERSION as DATA_VERSION
from prepare_data import START, SUPERVISED, blocks, get_encoding, sha256_of

FORMAT_VERSION = 1  # of ckpt.pt
RESULTS = ("ckpt.pt", "log.csv", "loss.png", "forget.csv", "best", "last")  # what a run leaves in its out_dir
COLUMNS = ["step", "epoch", "train_loss", "val_loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens",
           "seconds"]


@dataclass(frozen=True)
class TrainConfig:
    # data and result
    data_dir: str = "data/demo"  # what prepare_data.py wrote
    out_dir: str = "out"  # weights, checkpoint and log
    resume: bool = False  # go on from the checkpoint in out_dir
    overwrite: bool = False  # start anew in an out_dir that holds a run
    # model
    init_from: str = ""  # scratch | gpt2 | gpt2-medium | gpt2-large | gpt2-xl | a path; '' = gpt2, for the demo scratch
    n_layer: int = 3  # from scratch: layers
    n_head: int = 4  # from scratch: attention heads
    n_embd: int = 128  # from scratch: width
    dropout: float = 0.0  # probability of dropping an activation
    lora_rank: int = 0  # train a LoRA adapter of this rank over frozen weights; 0 = train all weights
    lora_alpha: float = 16.0  # the adapter's update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # probability of dropping an input of the adapter
    lora_targets: str = "c_attn,c_proj,c_fc"  # layers that get one: attention in and out, MLP in and out
    # batches and length
    batch_size: int = 8  # examples in an optimizer step
    micro_batch_tokens: int = 0  # tokens in one forward pass, rows x longest: memory, never the result; 0 = by device
    max_examples: int = 0  # train on the first N examples alone; 0 = all
    epochs: float = 0  # passes over the data; 0 = as max_steps says, else 2 for fine-tuning, 8 from scratch
    max_steps: int = 0  # stop after this many optimizer steps; 0 = no limit
    max_minutes: float = 0  # stop in time, learning rate at its end; 0 = no limit
    # optimizer
    learning_rate: float = 0  # peak; 0 = 5e-5 for fine-tuning, 2e-4 for LoRA, 2e-3 from scratch
    min_lr: float = 0  # where the learning rate ends
    lr_schedule: str = "cosine"  # cosine | linear | constant, after the warm-up
    warmup_steps: int = 0  # steps of linear warm-up; 0 = by warmup_ratio
    warmup_ratio: float = 0.05  # share of the run that warms up
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.99  # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = no limit
    # evaluation and log
    eval_interval: int = -1  # steps between evaluations; -1 = ten a run, 0 = only at the end
    save_interval: int = -1  # steps between checkpoints; -1 = with evaluations, two minutes apart; 0 = only at the end
    forget_text: str = ""  # a file of ordinary text, watched while fine-tuning; '' = a bundled one, none = no watch
    log_interval: int = 0  # steps between log lines; 0 = about fifty a run
    # machine
    device: str = ""  # cpu | cuda | cuda:1 | mps; '' = the best there is
    dtype: str = "auto"  # of activations: auto | float32 | bfloat16 | float16
    compile: str = "auto"  # torch.compile the blocks: auto (where it pays back) | on | off
    gradient_checkpointing: bool = False  # less memory, a third more time
    seed: int = 1337  # of weights, order and dropout

    def __post_init__(self):
        def below(name, least):
            value = getattr(self, name)
            return not least <= value < math.inf and f"{value} is {f'below {least}' if value < least else 'no number'}"

        def none_of(name, *choices):
            return getattr(self, name) not in choices and f"{getattr(self, name)!r} is none of {', '.join(choices)}"

        require(**{name: below(name, 1) for name in ("n_layer", "n_head", "n_embd", "batch_size")},
                **{name: below(name, 0) for name in (
                    "micro_batch_tokens", "max_examples", "epochs", "max_steps", "max_minutes", "learning_rate",
                    "min_lr", "warmup_steps", "weight_decay", "seed", "grad_clip", "log_interval", "lora_rank",
                    "lora_alpha")},
                **{name: below(name, -1) for name in ("eval_interval", "save_interval")},
                **{name: not 0 <= getattr(self, name) < 1 and f"{getattr(self, name)} is not in [0, 1)"
                   for name in ("dropout", "lora_dropout", "warmup_ratio", "beta1", "beta2")},
                lr_schedule=none_of("lr_schedule", "cosine", "linear", "constant"),
                dtype=none_of("dtype", "auto", "float32", "bfloat16", "float16", "float64"),
                overwrite=self.overwrite and self.resume and "goes on with nothing: give it or --resume",
                compile=none_of("compile", "auto", "on", "off"))


# what --resume may change; everything else decides which numbers come out
MAY_CHANGE = {"data_dir", "out_dir", "resume", "overwrite", "micro_batch_tokens", "epochs", "max_steps", "max_minutes",
              "eval_interval", "save_interval", "log_interval", "forget_text", "device", "compile",
              "gradient_checkpointing"}


# ---- data -----------------------------------------------------------------------------------------------------------

class Shards:
    """One split of a data_dir, memory-mapped: `len()` examples, each an array of (id, flags)."""

    def __init__(self, data_dir, meta, split, max_examples=0):
        self.files, ranges = [], []
        for name in meta[split]["shards"]:
            try:
                tokens = np.load(Path(data_dir) / name, mmap_mode="r")
                starts = np.flatnonzero(tokens["flags"] & START)
            except (ValueError, IndexError, EOFError) as error:
                raise UserError(f"{Path(data_dir) / name} is damaged ({error}): run prepare_data.py again") from None
            ranges.append(np.stack([np.full_like(starts, len(self.files)), starts,
                                    np.append(starts[1:], len(tokens))], axis=1))
            self.files.append(tokens)
        self.ranges = np.concatenate(ranges) if ranges else np.zeros((0, 3), np.int64)
        if len(self.ranges) != meta[split]["examples"] or sum(map(len, self.files)) != meta[split]["tokens"]:
            raise UserError(f"{data_dir}: the {split} shards and meta.json disagree; run prepare_data.py again")
        self.ranges = self.ranges[:max_examples or None]
        self.lengths = self.ranges[:, 2] - self.ranges[:, 1] - 1  # inputs: the last token has nothing to predict

    def __len__(self):
        return len(self.ranges)

    def __getitem__(self, i):
        file, start, stop = self.ranges[i]
        return self.files[file][start:stop]

    def batch(self, indices):
        """Packs examples end to end: (ids (N,), targets (N,), lengths), the targets IGNORE where unsupervised."""
        examples = [self[i] for i in indices]
        idx = np.concatenate([tokens["id"][:-1] for tokens in examples]).astype(np.int64)
        targets = np.concatenate([np.where(tokens["flags"][1:] & SUPERVISED, tokens["id"][1:].astype(np.int64), IGNORE)
                                  for tokens in examples])
        return torch.from_numpy(idx), torch.from_numpy(targets), self.lengths[indices]


def load_meta(data_dir):
    """What prepare_data.py wrote in meta.json."""
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        raise UserError(f"--data_dir: no prepared data in {data_dir}; run python prepare_data.py first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged; run prepare_data.py again") from None
    if version != DATA_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {DATA_VERSION}; run prepare_data.py again")
    return meta


def examples_of_step(step, n_examples, batch_size, seed):
    """The examples of optimizer step `step` (from 0): every epoch is a new order of all, its last step what is left."""
    epoch, place = divmod(step, math.ceil(n_examples / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(n_examples)
    return order[place * batch_size:(place + 1) * batch_size]


def micro_batches(indices, lengths, budget):
    """Splits examples into groups of like length whose rows x longest stay within `budget` tokens, longest first."""
    groups = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def identity(meta):
    """What must not change between the parts of a run."""
    return {name: meta[name] for name in ("source_sha256", "encoding", "prompt", "block_size", "seed", "train", "val")}


def check_data(meta, checkpoint, data_dir, out_dir):
    """A resumed run goes on with the data it began with."""
    if checkpoint and checkpoint["data"] != identity(meta):
        changed = [name for name, value in identity(meta).items() if checkpoint["data"].get(name) != value]
        raise UserError(f"--resume: {data_dir} is not the data that this run began with ({', '.join(changed)} changed)"
                        f": prepare it as before, or start a new run with --init_from={out_dir}")


# ---- model, precision and schedule ----------------------------------------------------------------------------------

def build_model(config, meta, checkpoint):
    """(model, base): the checkpoint's, or the one that --init_from names, checked against the data. `base` tells what
    training began with: its name or path and, under LoRA, which stores no weights of its own, its sha256."""
    if checkpoint and not config.lora_rank:
        model = GPT(GPTConfig(**checkpoint["model_config"]))
        model.load_state_dict(checkpoint["model"])
        return model, checkpoint["base"]
    init_from = config.init_from or ("gpt2" if meta["encoding"] == "gpt2" else "scratch")
    if init_from == "scratch":
        if config.lora_rank:
            raise UserError("--lora_rank needs weights to adapt: name them with --init_from")
        return GPT(GPTConfig(meta["block_size"], meta["vocab_size"], config.n_layer, config.n_head, config.n_embd,
                             config.dropout)), {"name": init_from}
    if init_from in SIZES and meta["encoding"] != "gpt2":
        raise UserError(f"--init_from={init_from} needs GPT-2's encoding, {config.data_dir} is in {meta['encoding']}: "
                        "prepare it with --encoding=gpt2, or train with --init_from=scratch")
    model, base = GPT.from_pretrained(init_from, config.dropout).merge_lora(), {"name": init_from}
    if not meta["vocab_size"] <= model.config.vocab_size < meta["vocab_size"] + 128:  # some pad it for speed
        raise UserError(f"--init_from={init_from} has {model.config.vocab_size} token ids, {config.data_dir} "
                        f"({meta['encoding']}) has {meta['vocab_size']}: prepare the data with the model's encoding")
    longest, context = max(meta["train"]["longest"], meta["val"]["longest"]), model.config.block_size
    if longest - 1 > context:
        raise UserError(f"--init_from={init_from} has a context of {context} tokens, the longest example "
                        f"{longest}: prepare the data with --block_size={context}")
    if config.lora_rank:
        path = locate(init_from)
        if path.name == "adapter_config.json":
            raise UserError(f"--init_from={init_from} is itself a LoRA adapter: make it plain weights first with "
                            f"python sample.py --model={init_from} --export=DIRECTORY")
        base["sha256"] = sha256_of(path)
        if checkpoint and checkpoint["base"] != base:
            raise UserError(f"--resume: {path} is not the file that this adapter was begun on; put the old one back")
        model.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets.split(","))
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError(f"--lora_targets={config.lora_targets} names no layer; GPT-2's are c_attn, c_proj, c_fc")
        model.load_state_dict(checkpoint["model"] if checkpoint else {}, strict=False)
    return model, base


def trainable(model):
    """The parameters that training changes, by name: all, or under LoRA the adapter's."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def clear(out_dir):
    """Makes out_dir and removes what an earlier run left in it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in RESULTS:
        if (out_dir / name).is_dir():
            shutil.rmtree(out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)


def pick_device(name):
    """The named device, or the best that this machine has."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name}: {str(error).splitlines()[0]}; try --device=cpu") from None


def pick_dtype(name, device):
    """The dtype of activations: as named, or bfloat16 where the hardware multiplies it natively, else float16 on older
    CUDA and float32. A CPU is asked by timing one matrix product: without native support bfloat16 is the slower one."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type != "cpu":
        return torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        for _ in range(4):
            start = time.perf_counter()
            x @ x
            seconds[dtype] = min(seconds.get(dtype, math.inf), time.perf_counter() - start)
    return torch.bfloat16 if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else torch.float32


def learning_rate_at(step, progress, peak, min_lr, schedule, warmup, total_steps):
    """The learning rate of a step (from 0): linear warm-up, then cosine or linear down to min_lr as `progress`, the
    share of the run that is done, goes to 1; or constant."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    done = min(1.0, max(0.0, (progress - warmup / total_steps) / max(1 - warmup / total_steps, 1e-9)))
    return min_lr + (peak - min_lr) * (0.5 + 0.5 * math.cos(math.pi * done) if schedule == "cosine" else 1 - done)


# ---- evaluation -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, shards, budget, device):
    """Mean loss over all supervised tokens of a split: one sum divided by one count, however it is batched."""
    model.eval()
    loss, supervised = 0.0, 0
    for group in micro_batches(range(len(shards)), shards.lengths, budget):
        idx, targets, lengths = shards.batch(group)
        loss += model(idx.to(device), targets.to(device), lengths).item()
        supervised += int((targets != IGNORE).sum())
    model.train()
    return loss / supervised


class Forgetting:
    """Bits per byte of a piece of ordinary text: what fine-tuning costs elsewhere. forget.csv keeps them."""

    def __init__(self, config, base, encoding, out_dir, step):
        bundled = "none" if base["name"] == "scratch" else Path(__file__).parent / "data" / "forget.txt"
        self.text, self.path, self.rows = "", out_dir / "forget.csv", []
        if (path := str(config.forget_text or bundled)) != "none":
            self.text = Path(path).read_text(encoding="utf-8", errors="replace")
            self.ids = [encoding.eot_token, *encoding.encode_ordinary(self.text)]
            self.rows = [row for row in read_rows(self.path) if int(row["step"]) <= step]

    @torch.no_grad()
    def measure(self, model, step):
        """Measures, writes forget.csv and returns what to print; '' where there is no text."""
        if not self.text:
            return ""
        device, loss = model.wte.weight.device, 0.0
        model.eval()
        for ids, _ in blocks([self.ids], model.config.block_size):
            ids = torch.tensor(ids, device=device)
            loss += model(ids[None, :-1], ids[None, 1:]).item()
        model.train()
        bits = loss / math.log(2) / len(self.text.encode())
        self.rows.append({"step": step, "bits_per_byte": f"{bits:.6f}"})
        write_rows(self.path, self.rows)
        return f", ordinary text {bits:.3f} bits per byte" + (
            f" ({float(self.rows[0]['bits_per_byte']):.3f} before)" if len(self.rows) > 1 else "")


class Samples:
    """A few held-out prompts with their answers, to see in plain text what the model has learned so far."""

    def __init__(self, shards, encoding, count=2):
        self.encoding, self.prompts, self.answers, seen = encoding, [], [], Counter()
        for tokens in (shards[i] for i in range(min(40, len(shards)))):
            supervised = (tokens["flags"] & SUPERVISED).astype(bool)
            first = int(supervised.argmax())
            if first == 1 and supervised[1:].all():  # plain text goes on from a few words
                first = min(16, len(tokens) // 2)
            stop = first + int(np.append(~supervised[first:], True).argmax())
            self.prompts.append(tokens["id"][:first].tolist())
            self.answers.append(tokens["id"][first:stop].tolist())
        lines = [encoding.decode(prompt).replace("<|endoftext|>", "\n").splitlines() for prompt in self.prompts]
        for own in lines:
            seen.update(set(own))
        del self.prompts[count:], self.answers[count:]
        self.titles = [shorten(" ".join(line for line in own if line.strip() and (seen[line] == 1 or len(lines) == 1)))
                       for own in lines[:count]]  # lines that stand in several prompts are the template's

    def answer(self, model):
        """One greedy answer to each prompt, as text, cut at the length of the right one plus a little."""
        limit = min(64, max(map(len, self.answers), default=0) + 4)
        answers = [[] for _ in self.prompts]
        room = model.config.block_size - max(map(len, self.prompts), default=0)
        if self.prompts and room > 0:
            for step in model.generate(self.prompts, min(limit, room), stop=self.encoding.eot_token,
                                       n_vocab=self.encoding.n_vocab):
                for answer, token in zip(answers, step, strict=True):
                    answer += [token] if token is not None else []
        return answers

    def show(self, model, heading):
        print(f"  {heading}:")
        for title, answer, expected in zip(self.titles, self.answer(model), self.answers, strict=True):
            right = "  (exact)" if answer == expected else ""
            text = self.encoding.decode([token for token in answer if token != self.encoding.eot_token])
            print(f"    {title} -> {shorten(text)!r}{right}", flush=True)


def shorten(text, width=100):
    return text if len(text) <= width else text[:width // 2 - 2] + " ... " + text[-width // 2 + 3:]


# ---- checkpoint and log ---------------------------------------------------------------------------------------------

def save_checkpoint(path, **state):
    """Tensors and plain values only, so that loading executes nothing; an older checkpoint stays until this one is
    complete on disk."""
    try:
        with atomic_file(path) as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
    except RuntimeError as error:  # torch's word for a failed write
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0][:80]}); is the disk full?") from None


def load_checkpoint(path):
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there; name the run's --out_dir, or start it anew with --overwrite")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format_version"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0][:80]}); start anew with --overwrite, "
                        f"or from its weights with --init_from={path.parent}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT_VERSION}")
    return checkpoint


def resumed(config, saved, out_dir):
    """The checkpoint's config with those of this command line's flags that may change."""
    default = {field.name: field.default for field in dataclasses.fields(config)}
    given = getattr(config, "given", {name for name in default if getattr(config, name) != default[name]})
    flags = {name: getattr(config, name) for name in given}
    fixed = [f"--{name}={value} (it ran with {saved[name]})" for name, value in flags.items()
             if name not in MAY_CHANGE and value != saved[name]]
    if fixed:
        raise UserError(f"--resume goes on with the settings in {out_dir}; drop {', '.join(fixed)}, or start a new run "
                        f"from its weights with --init_from={out_dir}")
    return TrainConfig(**{**saved, **flags, "resume": True, "overwrite": False})


def read_rows(path):
    """The rows of a CSV file as dicts; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def plot(out_dir):
    """loss.png from log.csv, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    rows = read_rows(out_dir / "log.csv")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    axes.plot(steps, [float(row["train_loss"]) for row in rows], linewidth=0.8, alpha=0.6, label="training")
    evaluated = [(int(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    axes.plot(*zip(*evaluated, strict=True) if evaluated else ([], []), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    axes.legend()
    figure.savefig(out_dir / "loss.png", dpi=120)


class Interrupt:
    """Within it SIGINT and SIGTERM only set `signum`, so that the step can end and be saved; a second one kills."""

    def __enter__(self):
        self.signum = None
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum, frame):
        self.signum = signum
        signal.signal(signum, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- the loop -------------------------------------------------------------------------------------------------------

def gradients(model, scaler, batches, supervised, device):
    """Adds the gradient of the step's mean loss to every parameter; returns that loss, a scalar on the device."""
    total = 0.0
    for idx, targets, lengths in batches:
        loss = model(idx.to(device), targets.to(device), lengths) / supervised  # of the whole step: the one division
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def keep_freed_memory():
    """Tells glibc to keep what is freed: giving memory back and getting it anew, page by page, costs a training step on
    a CPU more than AdamW does."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # other C libraries have none
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
            mallopt(option, value)


def warm_up(model, compiled, shards, batch_size, budget, device):
    """Runs the largest micro-batch that the run can meet once, forward and backward: what does not fit fails now, not
    after hours, and torch.compile falls back if it must. Returns the token budget, halved on CUDA until it fits."""
    for block in model.h if compiled else ():
        block.compile(dynamic=True)
    longest = np.argsort(-shards.lengths, kind="stable")[:batch_size]
    while True:
        batch = shards.batch(micro_batches(longest, shards.lengths, budget)[0])
        try:
            gradients(model, torch.amp.GradScaler(enabled=False), [batch], 1, device)
            return budget
        except torch.OutOfMemoryError:
            budget //= 2
            if budget < shards.lengths.max():
                raise UserError(f"one example of {shards.lengths.max()} tokens does not fit into the memory of {device}"
                                ": try --gradient_checkpointing or a smaller model") from None
            print(f"out of memory: going on with --micro_batch_tokens={budget}")
        except Exception as error:  # the compiler raises many kinds
            if not compiled:
                raise
            compiled = False
            for block in model.h:
                block._compiled_call_impl = None
            print(f"torch.compile does not work here ({type(error).__name__}); going on without it")
        finally:
            model.zero_grad(set_to_none=True)


class Plan(NamedTuple):
    """The lengths of a run, in optimizer steps but for the last two."""
    total: int
    epoch: int
    warmup: int
    eval_interval: int
    save_interval: int
    log_interval: int
    learning_rate: float  # the peak
    budget: int  # tokens in one forward pass

    @classmethod
    def of(cls, config, base, lengths, device):
        scratch, longest = base["name"] == "scratch", int(lengths.max())
        epoch = math.ceil(len(lengths) / config.batch_size)
        total = math.ceil((config.epochs or (8 if scratch else 2)) * epoch)
        if config.max_steps:
            total = min(total, config.max_steps) if config.epochs else config.max_steps
        eval_interval = math.ceil(total / 10) if config.eval_interval < 0 else config.eval_interval or total
        budget = config.micro_batch_tokens or max(2048 if device.type == "cpu" else 16384, longest)
        if budget < longest:
            raise UserError(f"--micro_batch_tokens={budget} is below the longest example, {longest} tokens: raise it")
        return cls(total, epoch, config.warmup_steps or round(config.warmup_ratio * total), eval_interval,
                   eval_interval if config.save_interval < 0 else config.save_interval or total,
                   config.log_interval or math.ceil(total / 50),
                   config.learning_rate or (2e-3 if scratch else 2e-4 if config.lora_rank else 5e-5), budget)


def open_run(config):
    """(config, checkpoint): a new out_dir, or with --resume what it holds; a run that is there is never overwritten."""
    out_dir = Path(config.out_dir)
    if config.resume:
        checkpoint = load_checkpoint(out_dir / "ckpt.pt")
        return resumed(config, checkpoint["config"], out_dir), checkpoint
    if not config.overwrite and any((out_dir / name).exists() for name in RESULTS):
        raise UserError(f"--out_dir={out_dir} holds a run already: "
                        + "go on with --resume, " * (out_dir / "ckpt.pt").exists()
                        + "replace it with --overwrite, or name another --out_dir")
    return config, None


def save_weights(model, directory, meta, base):
    """Hugging Face's layout or, under LoRA, PEFT's; with the prompt's wording, so that it can be moved alone."""
    if "sha256" in base:
        path = locate(base["name"])
        model.save_adapter(directory, f"openai-community/{base['name']}" if base["name"] in SIZES else str(
            (path.parent if (path.parent / "config.json").exists() else path).resolve()))
    else:
        model.save_pretrained(directory)
    with atomic_file(directory / "prompt.json") as file:
        file.write(json.dumps({**meta["prompt"], "encoding": meta["encoding"],
                               **{f"base_{name}": value for name, value in base.items()}}, indent=1).encode())


def main(config):
    """Trains as config says, into config.out_dir; returns the numbers that it reached."""
    config, checkpoint = open_run(config)
    out_dir, meta = Path(config.out_dir), load_meta(config.data_dir)
    check_data(meta, checkpoint, config.data_dir, out_dir)
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = getattr(torch, checkpoint["dtype"]) if checkpoint else pick_dtype(config.dtype, device)
    train, val = Shards(config.data_dir, meta, "train", config.max_examples), Shards(config.data_dir, meta, "val")
    model, base = build_model(config, meta, checkpoint)
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    model.compute_dtype, model.gradient_checkpointing = dtype, config.gradient_checkpointing
    for parameter in model.parameters():
        if not parameter.requires_grad:  # frozen weights need no more precision than they are used in
            parameter.data = parameter.data.to(dtype)
    plan = Plan.of(config, base, train.lengths, device)
    optimizer = torch.optim.AdamW(optimizer_groups(model, config.weight_decay), lr=plan.learning_rate,
                                  betas=(config.beta1, config.beta2), fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first_step, elapsed, best_val_loss, crc = 0, 0.0, math.inf, 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        first_step, elapsed, best_val_loss, crc = (
            checkpoint[name] for name in ("step", "elapsed", "best_val_loss", "crc"))
        if plan.total != checkpoint["total_steps"]:
            print(f"the run now has {plan.total:,} steps instead of {checkpoint['total_steps']:,}: from here on the "
                  "learning rate follows the new length")
        del checkpoint
    parameters, total = trainable(model), sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in parameters.values())
    print(f"{base['name']}: {total / 1e6:,.1f} M parameters, "
          + f"{learned / 1e6:,.2f} M of them trainable ({learned / total:.2%}), " * (learned < total)
          + f"{str(dtype)[6:]} activations on {device}\n"
          f"{config.data_dir}: {len(train):,} training, {len(val):,} validation examples\n"
          f"{plan.total:,} steps of {config.batch_size} examples, learning rate {plan.learning_rate:g}", flush=True)
    compiled = config.compile == "on" or config.compile == "auto" and device.type == "cuda" and plan.total >= 500
    budget = warm_up(model, compiled, train, config.batch_size, plan.budget, device)
    if not config.resume:
        clear(out_dir)
    encoding = get_encoding(meta["encoding"])
    samples = Samples(val if len(val) else train, encoding)
    forgetting = Forgetting(config, base, encoding, out_dir, first_step)
    if first_step == 0:
        samples.show(model, "before training" + forgetting.measure(model, 0))

    step, limit, skipped, train_loss, val_loss = first_step, 60 * config.max_minutes, 0, math.nan, math.nan
    started, began, saved = time.perf_counter() - elapsed, elapsed, elapsed
    write_rows(out_dir / "log.csv", [row for row in read_rows(out_dir / "log.csv") if int(row["step"]) <= step])
    with Interrupt() as interrupt, open(out_dir / "log.csv", "a", newline="", encoding="utf-8") as log_file:
        log = csv.DictWriter(log_file, COLUMNS)
        while step < plan.total and not interrupt.signum and not (limit and elapsed >= limit):
            step_started = time.perf_counter()
            progress = max(step / plan.total, elapsed / limit if limit else 0)
            learning_rate = learning_rate_at(step, progress, plan.learning_rate, config.min_lr, config.lr_schedule,
                                             plan.warmup, plan.total)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            torch.manual_seed(config.seed * 1_000_003 + step)  # dropout, too, is a function of the step
            indices = examples_of_step(step, len(train), config.batch_size, config.seed)
            crc = functools.reduce(lambda crc, i: zlib.crc32(train[i].tobytes(), crc), indices, crc)
            batches = [train.batch(group) for group in micro_batches(indices, train.lengths, budget)]
            supervised = sum(int((targets != IGNORE).sum()) for _, targets, _ in batches)
            total = gradients(model, scaler, batches, supervised, device)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.grad_clip or math.inf).item()
            if math.isfinite(grad_norm) or scaler.is_enabled():  # the scaler itself skips what overflowed
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            skipped = 0 if math.isfinite(grad_norm) else skipped + 1
            step, train_loss, now = step + 1, total.item(), time.perf_counter()
            elapsed, tokens, seconds = now - started, int(train.lengths[indices].sum()), now - step_started
            row = dict(zip(COLUMNS, (step, f"{step / plan.epoch:.4f}", f"{train_loss:.8g}", "",
                                     f"{learning_rate:.6g}", f"{grad_norm:.6g}", tokens, supervised, f"{seconds:.4f}"),
                           strict=True))
            last = step == plan.total or limit and elapsed >= limit
            if step % plan.log_interval == 0 or last or skipped:
                left = (elapsed - began) / (step - first_step) * (plan.total - step)
                print(f"step {step:,}/{plan.total:,}  loss {train_loss:.4f}  lr {learning_rate:.2e}  norm "
                      f"{grad_norm:.2f}  {tokens / seconds:,.0f} tokens/s, {supervised / tokens:.0%} supervised  "
                      f"{left // 60:.0f}:{left % 60:02.0f} left" + "  skipped: not finite" * bool(skipped), flush=True)
            if last or step % plan.eval_interval == 0:
                if len(val):
                    val_loss = evaluate(model, val, budget, device)
                    row["val_loss"] = f"{val_loss:.8g}"
                better = val_loss < best_val_loss or not len(val)  # NaN is never better
                reached = f", validation loss {val_loss:.4f}" * bool(len(val)) + ", the best so far" * better
                samples.show(model, f"step {step:,}{reached}{forgetting.measure(model, step)}")
                if better:
                    best_val_loss = val_loss
                    save_weights(model, out_dir / "best", meta, base)
            log.writerow(row)
            log_file.flush()
            if skipped == 10:
                raise UserError("ten steps in a row had a loss or gradient that is not finite: lower --learning_rate, "
                                f"use --dtype=float32, or look at the data; {out_dir} keeps the last good checkpoint")
            due = step % plan.save_interval == 0 and (config.save_interval > 0 or elapsed - saved >= 120)
            if not skipped and (last or interrupt.signum or due):
                saved = elapsed
                save_checkpoint(out_dir / "ckpt.pt", step=step, config=dataclasses.asdict(config), data=identity(meta),
                                model_config=vars(model.config), base=base, dtype=str(dtype)[6:],
                                model=trainable(model), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                                best_val_loss=best_val_loss, elapsed=elapsed, crc=crc, total_steps=plan.total)
                plot(out_dir)
    save_weights(model, out_dir / "last", meta, base)
    if interrupt.signum:
        print(f"stopped after step {step:,} and saved; go on with: python train.py --resume"
              + f" --out_dir={out_dir}" * (config.out_dir != TrainConfig.out_dir))
        sys.exit(128 + interrupt.signum)
    if step == first_step:
        print(f"nothing to do: the run had reached its --max_steps, --epochs or --max_minutes={config.max_minutes:g}; "
              "raise what ended it, 0 for no limit")
    print(f"done: {step:,} steps in {elapsed / 60:.1f} minutes; "
          + f"best validation loss {best_val_loss:.4f}; " * bool(len(val))
          + "next: python sample.py" + f" --model={out_dir}" * (config.out_dir != TrainConfig.out_dir))
    return {"step": step, "train_loss": train_loss, "val_loss": val_loss, "best_val_loss": best_val_loss, "crc": crc,
            "seconds": elapsed}


if __name__ == "__main__":
    run(main, TrainConfig)
