"""Trains GPT-2 on the shards that prepare_data.py wrote.

    python train.py                                                           # the demo: a small GPT from scratch
    python train.py --data_dir=data/instruction-data --init_from=gpt2-medium  # fine-tune OpenAI's weights
    python train.py --resume                                                  # go on where a run in out/ was stopped
    torchrun --standalone --nproc_per_node=2 train.py                         # on two GPUs, or two CPU processes

A step is a pure function of (data, seed, step): its examples, cut into micro-batches that fit the memory; the sum of
their losses, divided once by the number of supervised tokens in the whole step.
"""
import contextlib
import dataclasses
import functools
import gc
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist

from checkpoint import DTYPES, load_checkpoint, restore, save_checkpoint, trainable
from config import parse_config
from console import UserError, require, run, status, typed
from cpu import SlicedAdamW, keep_freed_memory
from dataset import Shards, examples_of_step, identity, load_meta, micro_batches
from model import GPT, IGNORE, GPTConfig, optimizer_groups
from prepare_data import get_encoding
from records import sha256_of
from watch import Forgetting, Log, Samples, describe, find_hardest, plot, trackers
from weights import SIZES, locate, write_json

RESULTS = ("ckpt.pt", "log.csv", "loss.png", "forget.csv", "examples.csv", "tensorboard", "best",
           "last")  # what a run leaves in its out_dir


@dataclass(frozen=True)
class TrainConfig:
    # data and result
    data_dir: str = "data/demo"  # what prepare_data.py wrote
    out_dir: str = "out"  # weights, checkpoint and log
    resume: bool = False  # go on from the checkpoint in out_dir
    overwrite: bool = False  # start anew in an out_dir that holds a run
    # model
    init_from: str = ""  # scratch | gpt2 | gpt2-medium | gpt2-large | gpt2-xl | path; '' = gpt2, for the demo scratch
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
    save_interval: int = -1  # steps between checkpoints; -1 = with evaluations, 2 min apart; 0 = only at the end
    forget_text: str = ""  # ordinary text to watch while fine-tuning; '' = a bundled one, none = no watch
    log_interval: int = 0  # steps between log lines; 0 = about fifty a run
    hardest: int = 10  # list this many training examples of highest loss at the end; 0 = none, and no pass
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
        typed(self)
        def below(name, least):
            value = getattr(self, name)
            return not least <= value < 2**31 and (
                f"{value} is {f'below {least}' if value < least else 'no number below 2^31'}")

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
                dtype=none_of("dtype", "auto", *DTYPES),
                **{name: getattr(self, name) and not find_spec(name) and f"needs a package: pip install {name}"
                   for name in ("wandb", "tensorboard")},
                low_memory=self.low_memory and self.beta2 > 0.99 and "needs --beta2=0.99 or less: bfloat16 is coarse",
                overwrite=self.overwrite and self.resume and "goes on with nothing: give it or --resume",
                compile=none_of("compile", "auto", "on", "off"))


# what --resume may change; everything else decides which numbers come out
MAY_CHANGE = {"data_dir", "out_dir", "resume", "overwrite", "micro_batch_tokens", "epochs", "max_steps", "max_minutes",
              "eval_interval", "save_interval", "log_interval", "forget_text", "device", "compile", "hardest", "wandb",
              "tensorboard", "gradient_checkpointing"}


# ---- model, precision and schedule ----------------------------------------------------------------------------------

def check_data(meta, checkpoint, data_dir, out_dir):
    """A resumed run goes on with the data it began with."""
    if checkpoint and checkpoint["data"] != identity(meta):
        changed = [name for name, value in identity(meta).items() if checkpoint["data"].get(name) != value]
        raise UserError(f"--resume: {data_dir} is not the data that this run began with ({', '.join(changed)} changed)"
                        f": prepare it as before, or start a new run with --init_from={out_dir}")


def build_model(config, meta, checkpoint):
    """(model, base): one of the checkpoint's shape, or the one that --init_from names, checked against the data. `base`
    tells what training began with: its name or path and, under LoRA, which stores no weights of its own, its sha256."""
    if checkpoint and not config.lora_rank:
        return GPT(GPTConfig(**checkpoint["model_config"])), checkpoint["base"]
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
                        f"({meta['encoding']}) has {meta['vocab_size']}: name other data with --data_dir, or prepare "
                        "it with the model's encoding")
    longest, context = max(meta["train"]["longest"], meta["val"]["longest"]), model.config.block_size
    if longest - 1 > context:
        raise UserError(f"--init_from={init_from} has a context of {context} tokens, the longest example "
                        f"{longest}: prepare the data with --block_size={context}")
    if config.lora_rank:
        path = locate(init_from)
        if path.name == "adapter_config.json":
            raise UserError(f"--init_from={init_from} is itself a LoRA adapter: make it plain weights first with "
                            f"python sample.py --model={shlex.quote(init_from)} --export=DIRECTORY")
        base["sha256"] = sha256_of(path)
        if checkpoint and checkpoint["base"].get("sha256") != base["sha256"]:
            raise UserError(f"--resume: {path} is not the file that this adapter was begun on; name that with "
                            "--init_from")
        targets = config.lora_targets.split(",")
        if wrong := [target for target in targets if not any(
                name.endswith(f".{target}") and hasattr(module, "weight") for name, module in model.h.named_modules())]:
            raise UserError(f"--lora_targets: {wrong[0]!r} names no layer; GPT-2's are c_attn, c_proj, c_fc")
        model.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, targets)
    return model, base


def build_optimizer(model, config, learning_rate, device):
    """AdamW, torch's fused one where it has one."""
    optimizer = (SlicedAdamW if device.type == "cpu" or config.low_memory else torch.optim.AdamW)(
        optimizer_groups(model, config.weight_decay), lr=learning_rate, betas=(config.beta1, config.beta2),
        fused=device.type in ("cpu", "cuda"))
    optimizer.half = config.low_memory
    return optimizer


@contextlib.contextmanager
def claimed(out_dir):
    """Makes out_dir; within it no other run may claim it. Windows and some network file systems have no such locks."""
    out_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(out_dir, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"--out_dir={out_dir}: another run writes there; name another, or wait for it") from None
    except OSError:  # it has no locks
        pass
    try:
        yield
    finally:
        if fcntl:
            os.close(handle)


def clear(out_dir, names=RESULTS):
    """Removes what an earlier run left in out_dir: these names, and what it was writing when it died."""
    for path in (path for name in ("", "best", "last") for path in (out_dir / name).glob("*.[0-9]*.tmp")):
        path.unlink()
    for name in names:
        if (out_dir / name).is_dir():
            shutil.rmtree(out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)


def pick_device(name):
    """The named device, or the best that this machine has."""
    if name.startswith("meta"):
        raise UserError(f"--device={name} computes nothing; try --device=cpu")
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
    CUDA and float32. A CPU is asked by timing one matrix product: without native support bfloat16 is the slower one.
    Of several processes the widest choice is everybody's."""
    if name != "auto":
        return getattr(torch, name)
    dtypes, choice = (torch.bfloat16, torch.float16, torch.float32), 2
    if device.type == "cuda":
        choice = 0 if torch.cuda.get_device_capability(device) >= (8, 0) else 1
    elif device.type == "cpu":
        choice = 0 if matmul_rate(torch.bfloat16, device) > 1.4 * matmul_rate(torch.float32, device) else 2
    return dtypes[int(all_reduce(choice, how="MAX")[0])]


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
    """(each example's summed loss, each one's supervised targets), float64 and int64 arrays; the processes share the
    work out."""
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
    for array in (loss, supervised) if processes > 1 else ():
        dist.all_reduce(torch.from_numpy(array))
    return loss, supervised


def evaluate(model, shards, budget):
    """Mean loss over all supervised tokens of a split: one sum divided by one count, however it is batched."""
    loss, supervised = example_losses(model, shards, budget)
    return float(loss.sum() / supervised.sum())


# ---- resuming -------------------------------------------------------------------------------------------------------

def resumed(config, saved, out_dir):
    """The checkpoint's config with those of this command line's flags that may change."""
    default = {field.name: field.default for field in dataclasses.fields(config)}
    given = getattr(config, "given", {name for name in default if getattr(config, name) != default[name]})
    flags = {name: getattr(config, name) for name in given}
    fixed = [f"--{name}={value} (it ran with {saved[name]})" for name, value in flags.items()
             if name not in MAY_CHANGE and value != saved[name] and not (name == "init_from" and saved["lora_rank"])]
    if fixed:
        raise UserError(f"--resume goes on with the settings in {out_dir}; drop {', '.join(fixed)}, or start a new run "
                        f"from its weights with --init_from={out_dir}")
    return TrainConfig(**{**saved, **flags, "resume": True, "overwrite": False})


class Interrupt:
    """Within it SIGINT, SIGTERM and a closing terminal's SIGHUP only set `signum`, so that the step can end and be
    saved; a second one kills, but for SIGHUP, which kernel and shell both send. Nor does it among several processes:
    torchrun passes on what the terminal has sent to all of them already. What is ignored (nohup) stays so."""

    def __enter__(self):
        mine = threading.current_thread() is threading.main_thread()  # no other may set handlers
        self.signum, names = 0, ("SIGINT", "SIGTERM", "SIGHUP") if mine else ()
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # Windows has no SIGHUP
        self.before = {number: signal.signal(number, self.handle) for number in numbers
                       if signal.getsignal(number) != signal.SIG_IGN}
        return self

    def handle(self, signum, frame):
        self.signum = signum
        if place()[1] == 1 and signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- processes and speed --------------------------------------------------------------------------------------------

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
        gc.collect()  # DistributedDataParallel refers to itself; the group's threads must not outlive Python
        dist.destroy_process_group()


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
    is not finite. Returns the norm. Nothing here waits for an NVIDIA GPU."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([  # a norm of bfloat16 is itself rounded so: of rows, that cancels out
        torch.linalg.vector_norm(p.grad, dim=-1).float() if p.grad.dtype == torch.bfloat16 else p.grad
        for p in parameters])
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
        checkpoint = load_checkpoint(out_dir / "ckpt.pt", TrainConfig)
        config = resumed(config, checkpoint["config"], out_dir)
        if not (Path(config.data_dir) / "meta.json").exists():
            raise UserError(f"--resume: the run's data are not in {config.data_dir}, as seen from here: say with "
                            "--data_dir where they are now")
        return config, checkpoint
    if config.overwrite and config.init_from and out_dir.resolve() in (
            Path(config.init_from).resolve(), *Path(config.init_from).resolve().parents):
        raise UserError(f"--init_from={config.init_from} lies in --out_dir={out_dir}, which --overwrite clears: name "
                        "another --out_dir")
    if not config.overwrite and any((out_dir / name).exists() for name in RESULTS):
        raise UserError(f"--out_dir={out_dir} holds a run already: "
                        + "go on with --resume, " * (out_dir / "ckpt.pt").exists()
                        + "replace it with --overwrite, or name another --out_dir")
    return config, None


def save_weights(model, directory, meta, base):
    """Hugging Face's layout or, under LoRA, PEFT's; with the prompt's wording, so that it can be moved alone."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "prompt.json", {  # first: where there are weights, all that they need is there
        **meta["prompt"], "encoding": meta["encoding"], **{f"base_{name}": value for name, value in base.items()}})
    if "sha256" in base:
        path = locate(base["name"])
        model.save_adapter(directory, f"openai-community/{base['name']}" if base["name"] in SIZES else str(
            (path.parent if (path.parent / "config.json").exists() else path).resolve()))
    else:
        model.save_pretrained(directory)


def main(config):
    """Trains as config says, into config.out_dir; returns the numbers that it reached."""
    with joined(pick_device(config.device)) as device, ExitStack() as claims:
        return train(config, device, claims)


def train(config, device, claims):
    """What main promises, in one of perhaps several processes; `claims` keeps other runs out of the out_dir."""
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
    optimizer = build_optimizer(model, config, plan.learning_rate, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, elapsed, best_val_loss, crc, first_step, before = 0, 0.0, math.inf, 0, 0, None
    if checkpoint:
        restore(checkpoint, out_dir / "ckpt.pt", model, optimizer, scaler)
        step, elapsed, best_val_loss, crc = (checkpoint[name] for name in ("step", "elapsed", "best_val_loss", "crc"))
        first_step, before = step, checkpoint["before"]
        if plan.total != checkpoint["total_steps"]:
            print(f"the run now has {plan.total:,} steps instead of {checkpoint['total_steps']:,}: from here on the "
                  "learning rate follows the new length")
        del checkpoint
    describe(model, base, plan, config, shards, val, device, place()[1])
    compiled = config.compile == "on" or config.compile == "auto" and device.type == "cuda" and plan.total >= 500
    budget, token_seconds = warm_up(model, optimizer, compiled, shards, config.batch_size, plan.budget)
    minutes = token_seconds * shards.lengths.mean() * config.batch_size * (plan.total - step) / 60 / place()[1]
    print("expected to take about " + (f"{minutes:.{int(minutes < 10)}f} minutes" if minutes >= 0.95 else
                                       f"{60 * minutes:.0f} seconds")
          + f", at most {config.max_minutes:g}" * bool(config.max_minutes), flush=True)
    rank_model = model
    if place()[1] > 1:
        rank_model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    encoding = get_encoding(meta["encoding"])
    samples = Samples(val if len(val) else shards, encoding, "held-out" if len(val) else "training", before)
    forgetting = Forgetting(config, base, encoding, out_dir, step)
    tracking = []
    if rank == 0:
        claims.enter_context(claimed(out_dir))
        tracking = trackers(config, out_dir)
        clear(out_dir, () if config.resume else RESULTS)  # now that nothing of the user's can be wrong any more
    if step == 0 and rank == 0:
        samples.show(model, "before training" + forgetting.measure(model, 0))

    limit, val_loss, loss, signum, saved, started = (
        60 * config.max_minutes, math.nan, math.nan, 0, elapsed, time.perf_counter() - elapsed)
    log = Log(plan, out_dir, step, matmul_rate(dtype, device), tracking, writes=rank == 0)
    per_token, per_target = operations(model, 1, 0), operations(model, 0, 1)
    shown_dir = shlex.quote(str(out_dir))
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
            loss = gradients(rank_model, scaler, shards.batches(indices, budget, *place()), supervised)
            if place()[1] > 1:
                dist.all_reduce(loss)
            norm = update(optimizer, scaler, loss, config.grad_clip)
            step += 1
            signum, elapsed = all_reduce(interrupt.signum, time.perf_counter() - started, how="MAX")
            last = step == plan.total or bool(limit) and elapsed >= limit
            due = step % plan.save_interval == 0 and (config.save_interval > 0 or elapsed - saved >= 120)
            wanted = last or bool(signum) or due
            log.add(per_token * tokens + per_target * supervised, wanted, step=step, epoch=f"{step / plan.epoch:.4f}",
                    train_loss=loss, learning_rate=learning_rate, grad_norm=norm, tokens=tokens,
                    supervised_tokens=supervised, seconds=time.perf_counter() - step_started)
            if last or step % plan.eval_interval == 0:
                if len(val):
                    val_loss = log.rows[-1]["val_loss"] = evaluate(model, val, budget)
                better = val_loss < best_val_loss or not len(val)  # NaN is never better
                reached = (f", validation loss {val_loss:.4f}" + ", the best so far" * better) * bool(len(val))
                if rank == 0:
                    samples.show(model, f"step {step:,}{reached}{forgetting.measure(model, step)}")
                if better:
                    best_val_loss = val_loss
                    if rank == 0:
                        save_weights(model, out_dir / "best", meta, base)
            log.write(sync=wanted)
            if log.in_a_row >= 10:
                raise UserError("ten steps in a row had a loss or gradient that is not finite: lower --learning_rate, "
                                f"use --dtype=float32, or look at the data; {out_dir} keeps the last good checkpoint")
            if last or signum or due and not log.in_a_row:
                saved = elapsed
                if rank == 0:
                    save_checkpoint(out_dir / "ckpt.pt", step=step, config=dataclasses.asdict(config),
                                    data=identity(meta), model_config=vars(model.config), base=base,
                                    dtype=str(dtype)[6:], model=trainable(model), optimizer=optimizer.state_dict(),
                                    scaler=scaler.state_dict(), best_val_loss=best_val_loss, elapsed=elapsed, crc=crc,
                                    total_steps=plan.total, before=samples.before or [])
            if rank == 0 and (last or signum or step % plan.eval_interval == 0):
                plot(out_dir)
        if rank == 0:
            save_weights(model, out_dir / "last", meta, base)
        if signum:
            all_reduce(0)  # none leaves while another still talks
            status("")
            print(f"stopped after step {step:,} and saved; go on with: python train.py --resume"
                  + f" --out_dir={shown_dir}" * (config.out_dir != TrainConfig.out_dir))
            sys.exit(128 + int(signum))
    if step == first_step:
        print("nothing to do: the run had reached its --epochs, --max_steps or --max_minutes; raise what ended it")
    else:
        if rank == 0:
            samples.table(model)
        losses = example_losses(model, shards, budget) if config.hardest else ()
        if losses and rank == 0:
            find_hardest(*losses, shards, encoding, out_dir, config.hardest)
    print(f"done: {step:,} steps in {elapsed / 60:.1f} minutes; "
          + f"best validation loss {best_val_loss:.4f}; " * math.isfinite(best_val_loss)
          + "next: python sample.py" + f" --model={shown_dir}" * (config.out_dir != TrainConfig.out_dir))
    return {"step": step, "train_loss": float(loss), "val_loss": val_loss, "best_val_loss": best_val_loss, "crc": crc,
            "seconds": elapsed}


if __name__ == "__main__":
    run(main, parse_config, TrainConfig)
