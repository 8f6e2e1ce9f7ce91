"""Trains GPT-2 on the shards that prepare_data.py wrote.

    python train.py                                                           # the demo: a small GPT from scratch
    python train.py --data_dir=data/instruction-data --init_from=gpt2-medium  # fine-tune OpenAI's weights
    python train.py --resume                                                  # go on where a run in out/ was stopped
    torchrun --standalone --nproc_per_node=2 train.py                         # on two GPUs, or two CPU processes

A step is a pure function of (data, seed, step): its examples, cut into micro-batches that fit the memory; the sum of
their losses, divided once by the number of supervised tokens in the whole step.
"""
import contextlib
import csv
import ctypes
import dataclasses
import functools
import gc
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from config import UserError, require, run
from model import (
    GPT,
    IGNORE,
    SIZES,
    GPTConfig,
    SlicedAdamW,
    atomic_file,
    locate,
    opened,
    optimizer_groups,
)
from prepare_data import FORMAT_VERSION as DATA_VERSION
from prepare_data import START, SUPERVISED, blocks, get_encoding, sha256_of, status

FORMAT_VERSION = 1  # of ckpt.pt
RESULTS = ("ckpt.pt", "log.csv", "loss.png", "forget.csv", "examples.csv", "tensorboard", "best",
           "last")  # what a run leaves in its out_dir
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
    hardest: int = 10  # at the end, list this many training examples of highest loss; 0 = none, and no pass over them
    wandb: bool = False  # log to Weights & Biases too
    tensorboard: bool = False  # log to out_dir/tensorboard too
    # machine
    device: str = ""  # cpu | cuda | cuda:1 | mps; '' = the best there is
    dtype: str = "auto"  # of activations: auto | float32 | bfloat16 | float16
    compile: str = "auto"  # torch.compile the blocks: auto (where it pays back) | on | off
    gradient_checkpointing: bool = False  # less memory, a third more time
    low_memory: bool = False  # AdamW's moments in bfloat16: a quarter less memory, up to a fifth slower, coarser
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
                    "lora_alpha", "hardest")},
                **{name: below(name, -1) for name in ("eval_interval", "save_interval")},
                **{name: not 0 <= getattr(self, name) < 1 and f"{getattr(self, name)} is not in [0, 1)"
                   for name in ("dropout", "lora_dropout", "warmup_ratio", "beta1", "beta2")},
                lr_schedule=none_of("lr_schedule", "cosine", "linear", "constant"),
                dtype=none_of("dtype", "auto", "float32", "bfloat16", "float16", "float64"),
                **{name: getattr(self, name) and not find_spec(name) and f"needs a package: pip install {name}"
                   for name in ("wandb", "tensorboard")},
                low_memory=self.low_memory and self.beta2 > 0.99 and "needs --beta2=0.99 or less: bfloat16 is coarse",
                overwrite=self.overwrite and self.resume and "goes on with nothing: give it or --resume",
                compile=none_of("compile", "auto", "on", "off"))


# what --resume may change; everything else decides which numbers come out
MAY_CHANGE = {"data_dir", "out_dir", "resume", "overwrite", "micro_batch_tokens", "epochs", "max_steps", "max_minutes",
              "eval_interval", "save_interval", "log_interval", "forget_text", "device", "compile", "hardest", "wandb",
              "tensorboard", "gradient_checkpointing"}


# ---- data -----------------------------------------------------------------------------------------------------------

class Shards:
    """One split of a data_dir, memory-mapped: `len()` examples, each an array of (id, flags). UserError where the files
    are not as prepare_data.py wrote them."""

    def __init__(self, data_dir, meta, split, max_examples=0):
        self.files, ranges, supervised = [], [], 0
        for name in meta[split]["shards"]:
            tokens, starts, learned = self.read(Path(data_dir) / name, meta["vocab_size"])
            supervised += learned
            ranges.append(np.stack([np.full_like(starts, len(self.files)), starts,
                                    np.append(starts[1:], len(tokens))], axis=1))
            self.files.append(tokens)
        self.ranges = np.concatenate(ranges) if ranges else np.zeros((0, 3), np.int64)
        counts = {"examples": len(self.ranges), "tokens": sum(map(len, self.files)), "supervised_tokens": supervised}
        for name, count in counts.items():
            if count != meta[split][name]:
                raise UserError(f"{data_dir}: the {split} shards and meta.json disagree, {count:,} against "
                                f"{meta[split][name]:,} {name}; run prepare_data.py again")
        self.lengths = self.ranges[:, 2] - self.ranges[:, 1] - 1  # inputs: the last token has nothing to predict
        if not ((0 < self.lengths) & (self.lengths <= meta["block_size"])).all() or split == "train" and not len(self):
            raise UserError(f"{data_dir}: the {split} split has no examples, or some that are no 2 to "
                            f"{meta['block_size'] + 1:,} tokens long; run prepare_data.py again")
        self.ranges, self.lengths = self.ranges[:max_examples or None], self.lengths[:max_examples or None]

    @staticmethod
    def read(path, vocab_size, size=1 << 16):
        """(a shard's tokens, where its examples start, how many are supervised), checked in parts of this size."""
        def check(true, message):
            if not true:
                raise UserError(f"{path} {message}: run prepare_data.py again")

        check(path.is_file(), "is missing")
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
        except OSError:
            raise
        except Exception as error:  # numpy raises many kinds for a damaged header
            raise UserError(f"{path} is damaged ({error}): run prepare_data.py again") from None
        dtypes = [np.dtype([("id", kind), ("flags", "u1")]) for kind in ("<u2", "<u4")]
        check(tokens.ndim == 1 and tokens.dtype in dtypes,
              f"is damaged (it holds {tokens.dtype} of shape {tokens.shape}, no tokens)")
        starts, supervised = [np.zeros(0, np.int64)], 0
        for first in range(0, len(tokens), size):
            ids, flags = tokens["id"][first:first + size], tokens["flags"][first:first + size]
            check(ids.max() < vocab_size, f"is damaged (the token id {ids.max()} is past a vocabulary of {vocab_size})")
            check(flags.max() <= SUPERVISED | START, f"is damaged ({flags.max()} are no flags of a token)")
            starts.append(first + np.flatnonzero(flags & START))
            supervised += int(np.count_nonzero(flags & SUPERVISED))
        starts = np.concatenate(starts)
        check(len(starts) and starts[0] == 0, "is damaged (it does not begin with an example)")
        return tokens, starts, supervised

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

    def batches(self, indices, budget):
        """This process's share of a step as micro-batches: every so manieth example by length; at least one, perhaps of
        nothing to learn, since all processes must take part."""
        rank, processes = place()
        mine = sorted(indices, key=lambda i: -self.lengths[i])[rank::processes]
        if len(mine):
            return [self.batch(group) for group in micro_batches(mine, self.lengths, budget)]
        idx, targets, lengths = self.batch(indices[:1])
        return [(idx, targets.fill_(IGNORE), lengths)]

    def supervised(self, indices):
        """How many targets of these examples the loss counts."""
        return sum(int(np.count_nonzero(self[i]["flags"][1:] & SUPERVISED)) for i in indices)


def load_meta(data_dir):
    """What prepare_data.py wrote in meta.json."""
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        raise UserError(f"--data_dir: no prepared data in {data_dir}; run python prepare_data.py first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; run prepare_data.py again") from None
    if version != DATA_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {DATA_VERSION}; run prepare_data.py again")
    counts = dict(examples=int, tokens=int, supervised_tokens=int, longest=int, shards=list)
    kinds = {"": dict(encoding=str, vocab_size=int, block_size=int, seed=int, source_sha256=str, prompt=dict,
                      train=dict, val=dict),
             "prompt.": dict(template=str, prompt_format=str, response_format=str), "train.": counts, "val.": counts}
    for group, names in kinds.items():
        for name, kind in names.items():
            value = (meta[group[:-1]] if group else meta).get(name)
            if type(value) is not kind or kind is list and value != [
                    f"{group[:-1]}_{i:05d}.npy" for i in range(len(value))]:
                raise UserError(f"{path} is damaged: {group}{name} is {value!r}; run prepare_data.py again")
    try:
        n_vocab = get_encoding(meta["encoding"]).n_vocab
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if meta["vocab_size"] != n_vocab:
        raise UserError(f"{path} is damaged: vocab_size is {meta['vocab_size']}, {meta['encoding']} has {n_vocab} "
                        "tokens; run prepare_data.py again")
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


def clear(out_dir, names=RESULTS):
    """Makes out_dir and removes what an earlier run left in it: these names, and what it was writing when it died."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in out_dir.rglob("*.[0-9]*.tmp"):
        path.unlink()
    for name in names:
        if (out_dir / name).is_dir():
            shutil.rmtree(out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)


def pick_device(name):
    """The named device, or the best that this machine has."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun's
        name = f"cuda:{os.environ['LOCAL_RANK']}"
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
    bfloat16, float32 = (matmul_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32))
    return torch.bfloat16 if bfloat16 > 1.4 * float32 else torch.float32


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
def example_losses(model, shards, budget):
    """(each example's summed loss, each one's supervised targets), float64 and int64 arrays; zeros for the examples
    that other processes do."""
    rank, processes = place()
    loss, supervised, done = np.zeros(len(shards)), np.zeros(len(shards), np.int64), 0
    model.eval()
    for group in micro_batches(range(len(shards))[rank::processes], shards.lengths, budget):
        idx, targets, lengths = shards.batch(group)
        each = model(idx, targets, lengths, each=True).double().cpu().numpy()
        owner = np.repeat(np.arange(len(group)), lengths)[(targets != IGNORE).numpy()]
        loss[group] = np.bincount(owner, each, len(group))
        supervised[group] = np.bincount(owner, minlength=len(group))
        done += len(group)
        status(f"  evaluating: {done * processes:,} of {len(shards):,}")
    model.train()
    return loss, supervised


def evaluate(model, shards, budget):
    """Mean loss over all supervised tokens of a split: one sum divided by one count, however it is batched."""
    loss, supervised = all_reduce(*(array.sum() for array in example_losses(model, shards, budget)))
    return float(loss / supervised)


class Forgetting:
    """Bits per byte of a piece of ordinary text: what fine-tuning costs elsewhere. forget.csv keeps them."""

    def __init__(self, config, base, encoding, out_dir, step):
        bundled = "none" if base["name"] == "scratch" else Path(__file__).parent / "data" / "forget.txt"
        self.text, self.path, self.rows = "", out_dir / "forget.csv", []
        if (path := str(config.forget_text or bundled)) != "none":
            self.text = Path(path).read_text(encoding="utf-8", errors="replace")
            self.ids = [encoding.eot_token, *encoding.encode_ordinary(self.text)]
            self.rows = [row for row in read_rows(self.path) if int(row["step"]) <= step > 0]

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


class Samples:
    """A few held-out prompts with their answers, to see in plain text what the model has learned so far."""

    def __init__(self, shards, encoding, count=5):
        self.encoding, self.prompts, self.answers, self.before, seen = encoding, [], [], None, Counter()
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
        return shorten(self.encoding.decode([token for token in ids if token != self.encoding.eot_token]))

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
        print("  held-out prompts, before and after:")
        after = self.answer(model, len(self.prompts))
        for title, before, now, right in zip(self.titles, self.before or after, after, self.answers, strict=True):
            print(f"    {title}\n" + f"      before: {self.text(before)!r}\n" * bool(self.before)
                  + f"      after:  {self.text(now)!r}"
                  + ("  (exact)" if now == right else f"\n      right:  {self.text(right)!r}"))


def shorten(text, width=100):
    return text if len(text) <= width else text[:width // 2 - 2] + " ... " + text[-width // 2 + 3:]


# ---- checkpoint and log ---------------------------------------------------------------------------------------------

def save_checkpoint(path, **state):
    """Tensors and plain values only, so that loading executes nothing; an older checkpoint stays until this one is
    complete on disk."""
    try:
        with atomic_file(path) as file:
            torch.save({"format_version": FORMAT_VERSION, **state}, file)
    except RuntimeError as error:  # torch's, in the midst of a failed write
        reason = str(error.__context__ or error).splitlines()[0][:80]
        raise UserError(f"cannot write {path} ({reason}); is the disk full?") from None


def load_checkpoint(path):
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there; name the run's --out_dir, or start it anew with --overwrite")
    remedy = f"start anew with --overwrite, or from its weights with --init_from={path.parent}"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        version = checkpoint["format_version"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read ({type(error).__name__}); {remedy}") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT_VERSION}; {remedy}")
    kinds = dict(step=int, config=dict, data=dict, model_config=dict, base=dict, dtype=str, model=dict, optimizer=dict,
                 scaler=dict, best_val_loss=float, elapsed=float, crc=int, total_steps=int)
    if wrong := [name for name, kind in kinds.items() if type(checkpoint.get(name)) is not kind]:
        raise UserError(f"{path} is damaged ({', '.join(wrong)}); {remedy}")
    if unknown := checkpoint["config"].keys() - {field.name for field in dataclasses.fields(TrainConfig)}:
        raise UserError(f"{path} has flags that this program lacks ({', '.join(map(str, unknown))}); {remedy}")
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
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def plot(out_dir):
    """loss.png from log.csv, where matplotlib is installed: both losses, the best step, the learning rate."""
    if not find_spec("matplotlib"):
        return
    from matplotlib.figure import Figure
    gc.collect()  # the last figure refers to itself: megabytes that Python would keep for hours
    rows = read_rows(out_dir / "log.csv")
    steps, losses, rates, tokens = ([float(row[name]) for row in rows]
                                    for name in ("step", "train_loss", "learning_rate", "tokens"))
    evaluated = [(float(row["step"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
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
    axes.set(xlabel="step", ylabel="loss per supervised token", yscale="log")
    mean = sum(tokens) / max(1, len(rows)) or 1
    axes.secondary_xaxis("top", functions=(lambda step: step * mean, lambda n: n / mean)).set_xlabel("tokens")
    right = axes.twinx()
    right.plot(steps, rates, ":", color="tab:green")
    right.set(ylabel="learning rate (dotted)", ylim=(0, None))
    axes.legend(loc="upper right")
    with atomic_file(out_dir / "loss.png") as file:
        figure.savefig(file, format="png", dpi=120)


class Interrupt:
    """Within it SIGINT and SIGTERM only set `signum`, so that the step can end and be saved; a second one kills. Among
    several processes it does not: torchrun passes on what the terminal has sent to all of them already."""

    def __enter__(self):
        self.signum = 0
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, signum, frame):
        self.signum = signum
        if place()[1] == 1:
            signal.signal(signum, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- processes, memory and speed ------------------------------------------------------------------------------------

def place():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_reduce(*numbers, how="SUM"):
    """Every number's sum (or MAX) over all processes; they travel on the CPU, so that no GPU is waited for."""
    if place()[1] == 1:
        return numbers
    tensor = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
    return tensor.tolist()


@contextlib.contextmanager
def joined(device):
    """Within it, this process is one of those that torchrun started, if it did: only the first one prints, and the
    cores of a machine are shared out. Yields the device of this process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with contextlib.redirect_stdout(sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")):
            yield device
            all_reduce(0)  # none leaves while another still talks
    finally:
        dist.destroy_process_group()


def keep_freed_memory():
    """Tells glibc to keep what is freed: giving memory back and getting it anew, page by page, costs a training step on
    a CPU more than AdamW does."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # other C libraries have none
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
            mallopt(option, value)


def matmul_rate(dtype, device):
    """Multiplications and additions a second, measured on one square matrix product."""
    n, seconds = (4096 if device.type == "cuda" else 512), math.inf
    x = torch.ones(n, n, dtype=dtype, device=device)
    for _ in range(6):
        x.sum().item()  # waits for the device
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * n**3 / seconds


def operations(model, tokens, supervised):
    """Multiplications and additions of the matrices in one step, forward and backward (Chowdhery et al. 2022, "PaLM",
    appendix B, without attention's): the head sees supervised tokens alone, frozen weights need no gradient."""
    blocks = sum(p.numel() for block in model.h for p in block.parameters() if p.dim() == 2)
    return (6 if model.wte.weight.requires_grad else 4) * (blocks * tokens + model.wte.weight.numel() * supervised)


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


def expected_memory(model, learned, tokens, supervised, config):
    """Bytes that training needs beyond what the process holds already: gradients, AdamW's moments, casts, and the
    activations of the largest micro-batch."""
    half, n_layer, n_embd = model.compute_dtype.itemsize == 2, model.config.n_layer, model.config.n_embd
    each = (2 if half else 4) + (4 if config.low_memory else 8)
    layers = 1 + n_layer / 8 if config.gradient_checkpointing else n_layer
    return (learned * each + tokens * layers * n_embd * 20 * model.compute_dtype.itemsize
            + min(supervised, 1024) * model.config.vocab_size * 14)


# ---- the loop -------------------------------------------------------------------------------------------------------

def gradients(model, scaler, batches, supervised):
    """Adds the gradient of the step's mean loss to every parameter; returns this process's share of that loss, a scalar
    on the device."""
    total, processes = 0.0, place()[1]
    for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
        with model.no_sync() if left and processes > 1 and hasattr(model, "no_sync") else contextlib.nullcontext():
            loss = model(*batch) / supervised  # of the whole step: the one division
            scaler.scale(loss * processes).backward()  # of whose gradients DistributedDataParallel takes the mean
        total = total + loss.detach()
    return total


def update(optimizer, scaler, loss, grad_clip):
    """One step of the optimizer, the gradient's norm limited to grad_clip; nothing changes where the loss or a gradient
    is not finite. Returns the norm. Nothing here waits for a GPU."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    scale, bad = ((norm + 1e-6) / (grad_clip or math.inf)).clamp(min=1), ~(norm + loss).isfinite()
    if optimizer.defaults["fused"] or isinstance(optimizer, SlicedAdamW):
        optimizer.grad_scale, optimizer.found_inf = scale, bad.float()
        optimizer.step()
    elif not bad:
        torch._foreach_div_([p.grad for p in parameters], scale)
        optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def warm_up(model, optimizer, compiled, shards, batch_size, budget):
    """Runs the largest micro-batch that the run can meet once, forward and backward, and an optimizer step that changes
    nothing: what does not fit fails now, not after hours, and torch.compile falls back if it must. Returns the token
    budget, halved on CUDA until it fits, and about the seconds that a token takes."""
    for block in model.h if compiled else ():
        block.compile(dynamic=True)
    longest = np.argsort(-shards.lengths, kind="stable")[:batch_size]
    while True:
        largest = micro_batches(longest, shards.lengths, budget)[0]
        try:
            seconds = []  # the first pass makes kernels and touches memory: a quick one is repeated, of a slow one half
            while not seconds or len(seconds) < 2 and seconds[0] < 1:
                started = time.perf_counter()
                loss = gradients(model, torch.amp.GradScaler(enabled=False), [shards.batch(largest)], 1)
                update(optimizer, torch.amp.GradScaler(enabled=False), loss * math.nan, 0).item()
                seconds.append(time.perf_counter() - started)
            return budget, seconds[-1] / (3 - len(seconds)) / int(shards.lengths[largest].sum())
        except torch.OutOfMemoryError:
            budget //= 2
            if budget < shards.lengths.max():
                raise UserError(f"one example of {shards.lengths.max()} tokens does not fit into the memory of "
                                f"{model.wte.weight.device}: try --gradient_checkpointing or a smaller model") from None
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
        usual = min(2048, config.batch_size * longest) if device.type == "cpu" else 16384  # no more than a step holds
        budget = config.micro_batch_tokens or max(usual, longest)
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
    directory.mkdir(parents=True, exist_ok=True)
    with atomic_file(directory / "prompt.json") as file:  # first: where there are weights, all that they need is there
        file.write(json.dumps({**meta["prompt"], "encoding": meta["encoding"],
                               **{f"base_{name}": value for name, value in base.items()}}, indent=1).encode())
    if "sha256" in base:
        path = locate(base["name"])
        model.save_adapter(directory, f"openai-community/{base['name']}" if base["name"] in SIZES else str(
            (path.parent if (path.parent / "config.json").exists() else path).resolve()))
    else:
        model.save_pretrained(directory)


def describe(model, base, plan, config, train, val, dtype, device):
    """Prints what will be trained, on what, for how long and in how much memory."""
    total, learned = (sum(p.numel() for p in parameters) for parameters in (
        model.parameters(), trainable(model).values()))
    longest = np.sort(train.lengths)[::-1][:config.batch_size]
    tokens = int(min(longest.sum(), plan.budget))
    need, free = expected_memory(model, learned, tokens, tokens, config), free_memory()
    print(f"{base['name']}: {total / 1e6:,.1f} M parameters, "
          + f"{learned / 1e6:,.2f} M of them trainable ({learned / total:.2%}), " * (learned < total)
          + f"{str(dtype)[6:]} activations on {device}" + f", {place()[1]} processes" * (place()[1] > 1)
          + f"\n{config.data_dir}: {len(train):,} training, {len(val):,} validation examples\n"
          f"{plan.total:,} steps of {config.batch_size} examples, learning rate {plan.learning_rate:g}"
          + f"; about {need / 1e9:.1f} GB more memory at most" * (device.type == "cpu"), flush=True)
    if device.type == "cpu" and need > free:
        print(f"warning: only {free / 1e9:.1f} GB are free; try " + "--low_memory, " * (not config.low_memory)
              + "--lora_rank=8, " * (not config.lora_rank and base["name"] != "scratch")
              + "--gradient_checkpointing, a smaller --micro_batch_tokens or a smaller model", flush=True)


class Log:
    """log.csv, the progress line, and Weights & Biases or tensorboard where they are wanted. A row's loss and norm may
    still be on their way from a GPU: they are read ten steps at a time, or when somebody wants to see them."""

    def __init__(self, config, plan, out_dir, step, rate):
        self.plan, self.rate, self.rows, self.skipped, self.in_a_row = plan, rate, [], 0, 0
        self.path, self.first, self.began, self.trackers = out_dir / "log.csv", step, time.perf_counter(), []
        if place()[0] == 0:
            write_rows(self.path, [row for row in read_rows(self.path) if int(row["step"]) <= step])
            self.trackers = trackers(config, out_dir)

    def add(self, row, work, last, due):
        """Takes a step's row, in COLUMNS' order; `work` is its multiplications and additions. What a checkpoint that is
        `due` proves finished must stand in log.csv."""
        self.rows.append(dict(zip(COLUMNS, row, strict=True)))
        row, step, plan = self.rows[-1], row[0], self.plan
        if len(self.rows) < 10 and step % plan.log_interval and step % plan.eval_interval and not (last or due):
            return
        for unread in self.rows:
            unread["train_loss"], unread["grad_norm"] = float(unread["train_loss"]), float(unread["grad_norm"])
            finite = math.isfinite(unread["train_loss"] + unread["grad_norm"])
            self.skipped, self.in_a_row = self.skipped + (not finite), 0 if finite else self.in_a_row + 1
        if step % plan.log_interval == 0 or last or self.in_a_row:
            left = (time.perf_counter() - self.began) / (step - self.first) * (plan.total - step)
            share = work / row["seconds"] / self.rate
            status(f"step {step:,}/{plan.total:,}  loss {row['train_loss']:.4f}  lr {row['learning_rate']:.2e}  norm "
                   f"{row['grad_norm']:.2f}  {row['tokens'] / row['seconds']:,.0f} tokens/s, "
                   f"{share:.0%} of the matmul rate  {left // 60:.0f}:{left % 60:02.0f} left"
                   + f"  ({self.skipped} skipped: not finite)" * bool(self.skipped), end=not sys.stdout.isatty())

    def write(self):
        """Writes the rows that were read."""
        rows = [row for row in self.rows if isinstance(row["train_loss"], float)]
        self.rows = self.rows[len(rows):]
        if place()[0] or not rows:
            return
        with opened(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writerows({name: f"{value:.8g}" if isinstance(value, float) else value
                                                     for name, value in row.items()} for row in rows)
        for row in rows if self.trackers else ():
            numbers = {"train/loss": row["train_loss"], "val/loss": row["val_loss"], "lr": row["learning_rate"],
                       "grad_norm": row["grad_norm"], "tokens_per_second": row["tokens"] / row["seconds"]}
            for track in self.trackers:
                track({name: value for name, value in numbers.items() if value != ""}, row["step"])


def trackers(config, out_dir):
    """Functions of (numbers by name, step) that log elsewhere."""
    functions = []
    if config.wandb:
        import wandb
        functions.append(wandb.init(project="nanosft", name=out_dir.name, config=dataclasses.asdict(config)).log)
    if config.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out_dir / "tensorboard")
        functions.append(lambda numbers, step: [writer.add_scalar(*number, step) for number in numbers.items()])
    return functions


def find_hardest(model, shards, budget, encoding, out_dir, count):
    """Writes every training example's mean loss to examples.csv, hardest first, and prints the first few: wrong labels
    and broken records stand among them."""
    loss, supervised = example_losses(model, shards, budget)
    if place()[1] > 1:
        for array in (loss, supervised):
            dist.all_reduce(torch.from_numpy(array))
    if place()[0]:
        return
    mean = loss / np.maximum(supervised, 1)
    order = np.argsort(-mean, kind="stable")
    texts = {int(i): encoding.decode(shards[i]["id"].tolist()) for i in order[:1000]}
    write_rows(out_dir / "examples.csv", [{"example": i, "loss": f"{mean[i]:.6f}", "supervised_tokens": supervised[i],
                                           "text": texts.get(int(i), "")} for i in order])
    status("")
    print(f"  the hardest training examples (all {len(shards):,} by loss in {out_dir / 'examples.csv'}):")
    for i in order[:count]:
        print(f"    {mean[i]:7.3f}  {shorten(' '.join(texts[int(i)].replace('<|endoftext|>', ' ').split()))}")


def main(config):
    """Trains as config says, into config.out_dir; returns the numbers that it reached."""
    with joined(pick_device(config.device)) as device:
        return train(config, device)


def train(config, device):
    """What main promises, in one of perhaps several processes."""
    config, checkpoint = open_run(config)
    out_dir, meta, rank = Path(config.out_dir), load_meta(config.data_dir), place()[0]
    check_data(meta, checkpoint, config.data_dir, out_dir)
    torch.manual_seed(config.seed)
    if device.type == "cpu":
        keep_freed_memory()
    dtype = getattr(torch, checkpoint["dtype"]) if checkpoint else pick_dtype(config.dtype, device)
    shards, val = Shards(config.data_dir, meta, "train", config.max_examples), Shards(config.data_dir, meta, "val")
    model, base = build_model(config, meta, checkpoint)
    model.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    model.compute_dtype, model.gradient_checkpointing = dtype, config.gradient_checkpointing
    for parameter in model.parameters():
        if not parameter.requires_grad:  # frozen weights need no more precision than they are used in
            parameter.data = parameter.data.to(dtype)
    plan = Plan.of(config, base, shards.lengths, device)
    optimizer = (SlicedAdamW if device.type == "cpu" or config.low_memory else torch.optim.AdamW)(
        optimizer_groups(model, config.weight_decay), lr=plan.learning_rate, betas=(config.beta1, config.beta2),
        fused=device.type in ("cpu", "cuda"))
    optimizer.half = config.low_memory
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, elapsed, best_val_loss, crc, first_step = 0, 0.0, math.inf, 0, 0
    if checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step, elapsed, best_val_loss, crc = (checkpoint[name] for name in ("step", "elapsed", "best_val_loss", "crc"))
        first_step = step
        if plan.total != checkpoint["total_steps"]:
            print(f"the run now has {plan.total:,} steps instead of {checkpoint['total_steps']:,}: from here on the "
                  "learning rate follows the new length")
        del checkpoint
    describe(model, base, plan, config, shards, val, dtype, device)
    compiled = config.compile == "on" or config.compile == "auto" and device.type == "cuda" and plan.total >= 500
    budget, token_seconds = warm_up(model, optimizer, compiled, shards, config.batch_size, plan.budget)
    minutes = token_seconds * shards.lengths.mean() * config.batch_size * (plan.total - step) / 60 / place()[1]
    print(f"expected to take about {minutes:.{int(minutes < 10)}f} minutes"
          + f", at most {config.max_minutes:g}" * bool(config.max_minutes), flush=True)
    rank_model = model
    if place()[1] > 1:
        rank_model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    encoding = get_encoding(meta["encoding"])
    samples = Samples(val if len(val) else shards, encoding)
    forgetting = Forgetting(config, base, encoding, out_dir, step)
    if rank == 0:  # now that nothing of the user's can be wrong any more
        clear(out_dir, () if config.resume else RESULTS)
    if step == 0 and rank == 0:
        samples.show(model, "before training" + forgetting.measure(model, 0))

    limit, val_loss, loss, signum, saved, started = (
        60 * config.max_minutes, math.nan, math.nan, 0, elapsed, time.perf_counter() - elapsed)
    log = Log(config, plan, out_dir, step, matmul_rate(dtype, device))
    per_token, per_target = operations(model, 1, 0), operations(model, 0, 1)
    with Interrupt() as interrupt:
        while step < plan.total and not signum and not (limit and elapsed >= limit):
            step_started = time.perf_counter()
            progress = max(step / plan.total, elapsed / limit if limit else 0)
            learning_rate = learning_rate_at(step, progress, plan.learning_rate, config.min_lr, config.lr_schedule,
                                             plan.warmup, plan.total)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + rank)  # dropout, too, is a function of the step
            indices = examples_of_step(step, len(shards), config.batch_size, config.seed)
            crc = functools.reduce(lambda crc, i: zlib.crc32(shards[i].tobytes(), crc), indices, crc)
            supervised, tokens = shards.supervised(indices), int(shards.lengths[indices].sum())
            loss = gradients(rank_model, scaler, shards.batches(indices, budget), supervised)
            if place()[1] > 1:
                dist.all_reduce(loss)
            norm = update(optimizer, scaler, loss, config.grad_clip)
            step += 1
            signum, elapsed = all_reduce(interrupt.signum, time.perf_counter() - started, how="MAX")
            last = step == plan.total or bool(limit) and elapsed >= limit
            due = step % plan.save_interval == 0 and (config.save_interval > 0 or elapsed - saved >= 120)
            log.add((step, f"{step / plan.epoch:.4f}", loss, "", learning_rate, norm, tokens, supervised,
                     time.perf_counter() - step_started), per_token * tokens + per_target * supervised,
                    last or signum, due)
            if last or step % plan.eval_interval == 0:
                if len(val):
                    val_loss = log.rows[-1]["val_loss"] = evaluate(model, val, budget)
                better = val_loss < best_val_loss or not len(val)  # NaN is never better
                reached = f", validation loss {val_loss:.4f}" * bool(len(val)) + ", the best so far" * better
                if rank == 0:
                    samples.show(model, f"step {step:,}{reached}{forgetting.measure(model, step)}")
                if better:
                    best_val_loss = val_loss
                    if rank == 0:
                        save_weights(model, out_dir / "best", meta, base)
            log.write()
            if log.in_a_row >= 10:
                raise UserError("ten steps in a row had a loss or gradient that is not finite: lower --learning_rate, "
                                f"use --dtype=float32, or look at the data; {out_dir} keeps the last good checkpoint")
            if not log.in_a_row and (last or signum or due):
                saved = elapsed
                if rank == 0:
                    save_checkpoint(out_dir / "ckpt.pt", step=step, config=dataclasses.asdict(config),
                                    data=identity(meta), model_config=vars(model.config), base=base,
                                    dtype=str(dtype)[6:], model=trainable(model), optimizer=optimizer.state_dict(),
                                    scaler=scaler.state_dict(), best_val_loss=best_val_loss, elapsed=elapsed, crc=crc,
                                    total_steps=plan.total)
            if rank == 0 and (last or signum or step % plan.eval_interval == 0):
                plot(out_dir)
        if rank == 0:
            save_weights(model, out_dir / "last", meta, base)
        if signum:
            all_reduce(0)  # none leaves while another still talks
            print(f"stopped after step {step:,} and saved; go on with: python train.py --resume"
                  + f" --out_dir={out_dir}" * (config.out_dir != TrainConfig.out_dir))
            sys.exit(128 + int(signum))
    if step == first_step:
        print(f"nothing to do: the run had reached its --max_steps, --epochs or --max_minutes={config.max_minutes:g}; "
              "raise what ended it, 0 for no limit")
    else:
        if rank == 0:
            samples.table(model)
        if config.hardest:
            find_hardest(model, shards, budget, encoding, out_dir, config.hardest)
    print(f"done: {step:,} steps in {elapsed / 60:.1f} minutes; "
          + f"best validation loss {best_val_loss:.4f}; " * bool(len(val))
          + "next: python sample.py" + f" --model={out_dir}" * (config.out_dir != TrainConfig.out_dir))
    return {"step": step, "train_loss": float(loss), "val_loss": val_loss, "best_val_loss": best_val_loss, "crc": crc,
            "seconds": elapsed}


if __name__ == "__main__":
    run(main, TrainConfig)
