"""Trains a GPT-2, a Llama or a Qwen on the shards that prepare_data.py wrote.

    python train.py                                        # the demo
    python train.py --data_dir=data/mine --init_from=gpt2  # GPT-2's weights
    python train.py --resume                               # go on with a run
    torchrun --standalone --nproc_per_node=2 train.py      # on two GPUs

A step is a pure function of (data, seed, step): its examples, in micro-batches
that fit the memory; the sum of their losses, divided once by the number of
supervised tokens in the whole step.
"""
import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch

from model import GPT, GPTConfig, has_varlen_attention
from nanosft import pictures, report
from nanosft.checkpoint import RESULTS, claimed, clear, load_checkpoint, save_checkpoint, undamaged
from nanosft.console import UserError, status
from nanosft.device import keep_freed_memory, pick_device, pick_dtype
from nanosft.distributed import all_reduce, interrupts, process_group, rank_and_world_size, sum_over_processes
from nanosft.files import sha256_of, write_json
from nanosft.flags import check, run
from nanosft.hub import SIZES, locate, weight_files
from nanosft.optimizer import AdamW
from nanosft.pace import Pace
from nanosft.shards import Shards, examples_of_step, load_meta, micro_batches
from nanosft.templates import bring_tokenizer, copy_tokenizer, get_encoding
from nanosft.tokenizer import has_other_vocabulary
from nanosft.weights import PADDING


@dataclass(frozen=True)
class TrainConfig:
    # data and result
    data_dir: str = "data/demo"  # what prepare_data.py wrote
    out_dir: str = "out"  # weights, checkpoint and log
    resume: bool = False  # go on from the checkpoint in out_dir
    overwrite: bool = False  # start anew in an out_dir that holds a run
    # model
    init_from: str = ""  # scratch | gpt2 ... gpt2-xl | owner/name | path; '' = the data's, gpt2, for the demo scratch
    n_layer: int = 3  # from scratch: layers
    n_head: int = 4  # from scratch: attention heads
    n_embd: int = 128  # from scratch: width
    dropout: float = 0.0  # probability of dropping an activation
    lora_rank: int = 0  # train a LoRA adapter of this rank over frozen weights; 0 = train all weights
    lora_alpha: float = 16.0  # the adapter's update is scaled by lora_alpha / lora_rank
    lora_dropout: float = 0.0  # probability of dropping an input of the adapter
    lora_targets: str = ""  # layers that get one, by the ends of their names, with commas; '' = all linear ones
    # batches and length
    batch_size: int = 8  # examples in an optimizer step
    micro_batch_tokens: int = 0  # tokens in a forward pass, at least one example: changes memory alone; 0 = auto
    max_examples: int = 0  # train on the first N examples alone; 0 = all
    epochs: float = 0  # passes over the data; 0 = as max_steps says, else 2 for fine-tuning, 8 from scratch
    max_steps: int = 0  # stop after this many optimizer steps; 0 = no limit
    max_minutes: float = 0  # no more steps than this time allows, learning rate at its end; 0 = no limit
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
    eval_interval: int = -1  # steps between evaluations; -1 = ten a run, at most five an epoch; 0 = only at the end
    save_interval: int = -1  # steps between checkpoints; -1 = with evaluations, every 10 minutes; 0 = only at the end
    best_by: str = "loss"  # what best/ follows, on validation records: loss | exact (answers) | likelihood (of labels)
    best_examples: int = 64  # validation records that are answered for that
    patience: int = 0  # stop after so many evaluations without a better one; 0 = never
    log_interval: int = 0  # steps between log lines; 0 = about fifty a run
    wandb: bool = False  # log to Weights & Biases too
    # machine
    device: str = ""  # cpu | cuda | cuda:1 | mps; '' = the best there is
    dtype: str = "auto"  # to compute in: auto | float32 | bfloat16 | float16
    compile: str = "auto"  # torch.compile the blocks: auto (where it pays back) | on | off
    gradient_checkpointing: bool = False  # less memory, a third more time
    low_memory: bool = False  # AdamW's moments in bfloat16: a quarter less memory, up to a fifth slower, coarser
    seed: int = 1337  # of weights, order and dropout

    def __post_init__(self):
        at_least = dict.fromkeys(("n_layer", "n_head", "n_embd", "batch_size", "best_examples"), 1)
        at_least |= dict.fromkeys(("eval_interval", "save_interval"), -1)
        problems = []
        if self.low_memory and self.beta2 > 0.99:
            problems.append(f"--low_memory: needs --beta2=0.99 or less, not {self.beta2}: bfloat16 is coarse")
        if self.overwrite and self.resume:
            problems.append("--overwrite: goes on with nothing: give it or --resume")
        check(self, at_least, ("dropout", "lora_dropout", "warmup_ratio", "beta1", "beta2"), {
            "lr_schedule": ("cosine", "linear", "constant"), "compile": ("auto", "on", "off"),
            "best_by": ("loss", "exact", "likelihood"),
            "dtype": ("auto", "float32", "bfloat16", "float16", "float64")}, problems)


# what --resume may change
MAY_CHANGE = {"data_dir", "out_dir", "resume", "overwrite", "micro_batch_tokens", "epochs", "max_steps", "max_minutes",
              "eval_interval", "save_interval", "log_interval", "patience", "device", "compile", "wandb",
              "gradient_checkpointing"}


@dataclass
class RunState:
    """How far a run has come: what a checkpoint holds, and what `main` returns."""
    step: int = 0  # optimizer steps done
    elapsed: float = 0.0  # seconds, over all parts of the run
    train_loss: float = math.nan  # of the last step, per supervised token
    val_loss: float = math.nan  # of the last evaluation
    best_val_loss: float = math.inf
    val_score: float = 0.0  # share of right answers in the last evaluation, where they are counted
    best_val_score: float = -1.0
    waited: int = 0  # evaluations since the best one
    skipped: int = 0  # steps in a row that were not finite
    optimizer: AdamW | None = None  # masters and moments


@dataclass
class Run:
    """All that a run works with."""
    config: TrainConfig
    meta: dict  # of the data
    data: Shards
    val: Shards
    model: GPT
    base: dict  # what training began with
    state: RunState
    steps: int  # that are planned, if no time limit comes first
    learning_rate: float  # the peak
    max_tokens: int  # of a micro-batch
    compiles: bool  # the blocks
    encoding: tiktoken.Encoding
    spec: dict  # how the data were rendered
    tokenizer: Path | str  # the directory with the model's tokenizer.json, if there is one


# ---- the length of a run --------------------------------------------------------------------------------------------

def planned_steps(config, n_examples, from_scratch):
    """How many optimizer steps the epochs make, or --max_steps if that is all there is, or less."""
    if config.max_steps and not config.epochs:
        return config.max_steps
    epochs = config.epochs or (8 if from_scratch else 2)
    steps = math.ceil(epochs * math.ceil(n_examples / config.batch_size))
    return min(steps, config.max_steps or steps)


def say_what_fits(run, pace, total_steps):
    """Prints what a limit of time means for the run, once its pace is known."""
    config = run.config
    status("")
    if pace.evaluation_seconds > pace.limit:
        print(f"warning: one evaluation, with which a run ends, takes {report.duration(pace.evaluation_seconds)}: "
              "longer than --max_minutes. Prepare with a smaller --val_fraction, or take fewer --best_examples")
    elif total_steps < run.steps:
        print(f"about {total_steps:,} of the {run.steps:,} steps fit into --max_minutes={config.max_minutes:g}")
    if config.warmup_steps >= total_steps:
        print(f"warning: --warmup_steps={config.warmup_steps} is the whole run: no step has the full learning rate")


def learning_rate_at(step, total_steps, peak, min_lr, schedule, warmup_steps):
    """The learning rate of a step, from 0: linear warm-up; then constant, or cosine or linear down to min_lr."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    return peak + (min_lr - peak) * progress


def peak_of(config, base):
    """The highest learning rate, by what training began with."""
    return config.learning_rate or (2e-3 if base["name"] == "scratch" else 2e-4 if config.lora_rank else 5e-5)


def tokens_at_once(config, device, longest, n_embd):
    """How many tokens a micro-batch may have, rows times the longest. A CPU is busy with a few hundred wide ones; more
    save time only where the gradients of all weights are added up for each micro-batch."""
    most = config.micro_batch_tokens or 16384
    if device.type == "cpu" and not config.micro_batch_tokens:
        most = min(1024, (1 << 20) // n_embd) if config.lora_rank else 2048
    return max(most, longest)


# ---- set-up ---------------------------------------------------------------------------------------------------------

def build_model(config, meta, checkpoint, dtype):
    """(model, base): the model of the checkpoint, or the one that --init_from names, if it fits the data. `base` says
    what training began with: its name or path and, under LoRA, which stores no weights of its own, its sha256. What is
    frozen is read in `dtype`, the one computed in, and never in float32."""
    if checkpoint and not config.lora_rank:
        with undamaged(Path(config.out_dir) / "ckpt.pt"):  # a fork's model may have other settings
            return GPT(GPTConfig(**checkpoint["model_config"])), checkpoint["base"]
    init_from = config.init_from or meta["model"] or ("gpt2" if meta["encoding"] == "gpt2" else "scratch")
    is_path = init_from != "scratch" and Path(init_from).exists()
    base = {"name": str(Path(init_from).resolve()) if is_path else init_from}  # a run may go on from elsewhere
    if init_from == "scratch":
        if config.lora_rank:
            raise UserError("--lora_rank needs weights to adapt: name them with --init_from")
        return GPT(GPTConfig(meta["block_size"], meta["vocab_size"], config.n_layer, config.n_head, config.n_embd,
                             config.dropout, meta["stop"], meta["stop"])), base
    if init_from in SIZES and meta["encoding"] != "gpt2":
        remedy = "prepare it with --encoding=gpt2, or train with --init_from=scratch"
        if meta["model"]:
            remedy = f"leave it out to start from {meta['model']}, which the data were prepared for"
        raise UserError(f"--init_from={init_from} needs GPT-2's encoding, {config.data_dir} is in {meta['encoding']}: "
                        f"{remedy}")
    if config.lora_rank:  # a large file's hash takes as long as reading its weights
        digest = ThreadPoolExecutor(1).submit(sha256_of, *weight_files(locate(init_from)))
    model = GPT.from_pretrained(init_from, config.dropout, dtype if config.lora_rank else torch.float32).merge_lora()
    if not 0 <= model.config.vocab_size - meta["vocab_size"] < PADDING:
        raise UserError(f"--init_from={init_from} has {model.config.vocab_size} token ids, {config.data_dir} "
                        f"{meta['vocab_size']}: name other data with --data_dir, or prepare it with --model or the "
                        "--encoding of the model")
    if init_from != meta["model"] and has_other_vocabulary(locate(init_from).parent, config.data_dir):
        raise UserError(f"--init_from={init_from} has a vocabulary of its own, not that of {config.data_dir}: prepare "
                        f"the data with --model={init_from}")
    longest, context = max(meta["train"]["longest"], meta["val"]["longest"]), model.config.block_size
    if longest - 1 > context:
        raise UserError(f"--init_from={init_from} has a context of {context} tokens, the longest example {longest}: "
                        f"prepare the data with --block_size={context}")
    model.config.eos_token_id = meta["stop"]
    if config.lora_rank:
        path = locate(init_from)
        if path.name == "adapter_config.json":
            raise UserError(f"--init_from={init_from} is itself a LoRA adapter: make it plain weights first with "
                            f"python sample.py --model={shlex.quote(init_from)} --export=DIRECTORY")
        base["sha256"] = digest.result()
        if checkpoint and checkpoint["base"]["sha256"] != base["sha256"]:
            raise UserError(f"--resume: this adapter was not begun on {path}; name its base with --init_from")
        targets = list(filter(None, config.lora_targets.split(",")))
        model.add_lora(config.lora_rank, config.lora_alpha, config.lora_dropout, targets)
    return model, base


def open_run(config):
    """(config, checkpoint's values, its tensors); the last two are None for a new run, which replaces none unasked."""
    out_dir = Path(config.out_dir)
    if (out_dir / "meta.json").exists():
        raise UserError(f"--out_dir={out_dir} holds prepared data: name another directory")
    if config.resume:
        return resume(config, out_dir)
    if not config.overwrite and any((out_dir / name).exists() for name in RESULTS):
        way_on = "go on with --resume, " if (out_dir / "ckpt.pt").exists() else ""
        raise UserError(f"--out_dir={out_dir} holds a run: {way_on}replace it with --overwrite, or name another")
    return config, None, None


def resume(config, out_dir):
    """What open_run returns for a checkpoint: its config, with those of this command line's flags that may change."""
    values, tensors = load_checkpoint(out_dir / "ckpt.pt")
    with undamaged(out_dir / "ckpt.pt"):
        alien = values["config"].keys() - TrainConfig.__dataclass_fields__.keys()
        if alien:
            raise UserError(f"it has the settings {', '.join(sorted(alien))}")
        saved = TrainConfig(**values["config"])
        used = {"learning_rate": peak_of(saved, values["base"]), "init_from": values["base"]["name"],
                "dtype": values["dtype"], "max_examples": saved.max_examples or "all",
                "warmup_steps": saved.warmup_steps or round(saved.warmup_ratio * values["steps"])}  # a 0's meaning
    changes, fixed = {"resume": True, "overwrite": False, "out_dir": config.out_dir}, []
    for name, value in dataclasses.asdict(config).items():
        before = used.get(name, getattr(saved, name))
        moved_base = name == "init_from" and saved.lora_rank  # its hash decides
        if name in config.given and (name in MAY_CHANGE or moved_base):
            changes.setdefault(name, value)
        elif name in config.given and value not in (before, getattr(saved, name)):
            fixed.append(f"--{name}={value} (it ran with {before})")
    if saved.lora_rank:
        changes.setdefault("init_from", values["base"]["name"])  # as it is found from elsewhere
    if fixed:
        raise UserError(f"--resume goes on with the settings in {out_dir}; drop {', '.join(fixed)}, or start a new run "
                        f"from its weights with --init_from={shlex.quote(str(out_dir))}")
    config = dataclasses.replace(saved, **changes)
    if saved.lora_rank and os.path.isabs(config.init_from) and not os.path.exists(config.init_from):
        raise UserError(f"--resume: the base {config.init_from} is not there; say with --init_from where it is")
    if not (Path(config.data_dir) / "meta.json").exists():
        raise UserError(f"--resume: the run's data are not in {config.data_dir}; say with --data_dir where they are")
    return config, values, tensors


# ---- step, evaluation, saving ---------------------------------------------------------------------------------------

def accumulate(model, optimizer, batches, supervised):
    """Adds up this process's gradients of the step's mean loss. Returns its share of that, a scalar on the device."""
    optimizer.zero_grad(in_float32=len(batches) > 1 or rank_and_world_size()[1] > 1)
    total = torch.zeros_like(optimizer.loss_scale)
    for batch in batches:
        loss = model(*batch) / supervised  # of the whole step: the one division
        (loss * optimizer.loss_scale).backward()
        total = total + loss.detach()
    return total


def gradients(run, indices, supervised):
    """What `accumulate` does, with this process's share of these examples. Micro-batches that a GPU's memory does not
    hold are halved, for good; a model that cannot be compiled runs eager from then on."""
    model, data = run.model, run.data
    while True:
        try:
            for block in model.h if run.compiles and not is_compiled(model) else ():
                block.compile(dynamic=True)
            rank, world_size = rank_and_world_size()
            batches = data.batches(indices, run.max_tokens, rank, world_size)
            torch.manual_seed((run.config.seed * 1_000_003 + run.state.step) * 1009 + rank)  # for dropout
            return accumulate(model, run.state.optimizer, batches, supervised)
        except torch.OutOfMemoryError:
            before, longest = run.max_tokens, data.lengths[indices].max()
            run.max_tokens //= 2
            if before <= longest:
                raise UserError(f"one example of {longest} tokens does not fit into the memory of "
                                f"{model.wte.weight.device}: try --gradient_checkpointing or a smaller model") from None
            status("")
            print(f"out of memory: going on with --micro_batch_tokens={run.max_tokens}")
        except Exception as error:  # the compiler raises many kinds
            if not run.compiles:
                raise
            run.compiles = False
            for block in model.h:
                block._compiled_call_impl = None
            status("")
            print(f"torch.compile does not work here ({type(error).__name__}); going on without it")


def is_compiled(model):
    return model.h[0]._compiled_call_impl is not None


@contextlib.contextmanager
def evaluating(model):
    """Within it there is no dropout or gradient, and a compiled model runs eager, or each shape would be compiled."""
    model.eval()  # below: a model that is not compiled is spared the compiler's import, 1.6 s
    with torch.no_grad(), torch.compiler.set_stance("force_eager") if is_compiled(model) else contextlib.nullcontext():
        yield
    model.train()


def evaluate(model, shards, max_tokens):
    """Mean loss over all supervised tokens of a split, however it is batched. The processes share the work."""
    rank, world_size = rank_and_world_size()
    loss, done = 0.0, 0
    with evaluating(model):
        for group in micro_batches(range(len(shards))[rank::world_size], shards.lengths, max_tokens):
            loss += model(*shards.batch(group)).item()
            done += len(group)
            status(f"  evaluating: {min(done * world_size, len(shards)):,} of {len(shards):,}")
    return all_reduce(loss) / shards.supervised(range(len(shards)))


def save_weights(run, name):
    """Writes the masters into out_dir/name in Hugging Face's layout or, under LoRA, PEFT's; with the prompt's wording,
    so that the directory can be moved alone."""
    directory, base, masters = Path(run.config.out_dir) / name, run.base, run.state.optimizer.masters
    directory.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(run.tokenizer, directory, run.spec)
    prompt = {**run.meta["prompt"], "encoding": run.meta["encoding"]}
    prompt.update({f"base_{name}": value for name, value in base.items()})
    write_json(directory / "prompt.json", prompt)  # first: where there are weights, all that they need is there
    if "sha256" not in base:
        run.model.save_pretrained(directory, masters)
    elif not Path(base["name"]).exists():  # one of the hub's
        repository = f"openai-community/{base['name']}" if base["name"] in SIZES else base["name"]
        run.model.save_adapter(directory, repository, masters)
    else:
        path = locate(base["name"])
        path = path.parent if (path.parent / "config.json").exists() else path
        run.model.save_adapter(directory, str(path.resolve()), masters)


def save_state(run):
    """Writes ckpt.pt: the state, and what a resumed run is built from or checked against."""
    state = {name: value for name, value in vars(run.state).items() if name != "optimizer"}
    values = {"state": state, "config": dataclasses.asdict(run.config), "data": run.meta["checksum"],
              "model_config": vars(run.model.config), "base": run.base, "dtype": str(run.state.optimizer.dtype)[6:],
              "steps": run.steps}
    save_checkpoint(Path(run.config.out_dir) / "ckpt.pt", values, run.state.optimizer.state_dict())


# ---- the loop -------------------------------------------------------------------------------------------------------

def main(config):
    """Trains as config says, into config.out_dir; returns the RunState that it reached."""
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    with process_group(device):
        if rank_and_world_size()[0] > 0:
            return train(config, device)
        with claimed(Path(config.out_dir)):  # no other run may write there
            return train(config, device)


def set_up(config, device):
    """Reads the data and the weights, and restores a checkpoint. Changes nothing on disk."""
    config, values, tensors = open_run(config)
    meta = load_meta(config.data_dir)
    if values and values["data"] != meta["checksum"]:
        raise UserError(f"--resume: {config.data_dir} is not the data that this run began with: prepare it as before, "
                        f"or start a new run with --init_from={shlex.quote(config.out_dir)}")
    torch.manual_seed(config.seed)
    data, val = Shards(config.data_dir, meta, "train", config.max_examples), Shards(config.data_dir, meta, "val")
    dtype = getattr(torch, values["dtype"]) if values else pick_dtype(config.dtype, device)
    model, base = build_model(config, meta, values, dtype)
    start, out_dir = Path(base["name"]).resolve(), Path(config.out_dir).resolve()
    is_ours = start == out_dir or any(out_dir / name in (start, *start.parents) for name in RESULTS)
    if not values and base["name"] != "scratch" and start.exists() and is_ours:
        raise UserError(f"--out_dir={config.out_dir} holds {base['name']}, from which the run starts: name another")
    model.gradient_checkpointing = config.gradient_checkpointing
    max_tokens = tokens_at_once(config, device, int(data.lengths.max()), model.config.n_embd)
    state = RunState(optimizer=AdamW(model.to(device), dtype, betas=(config.beta1, config.beta2),
                                     weight_decay=config.weight_decay, low_memory=config.low_memory))
    steps = planned_steps(config, len(data), base["name"] == "scratch")
    is_long = steps >= 500 and not 0 < config.max_minutes < 5
    in_one_graph = has_varlen_attention(model.wte.weight, model.config.head_dim) and not config.dropout
    compiles = config.compile == "on" or (config.compile == "auto" and in_one_graph and is_long)
    if values:
        with undamaged(Path(config.out_dir) / "ckpt.pt"):
            vars(state).update(values["state"])
            state.optimizer.load_state_dict(tensors)
        if steps != values["steps"]:
            print(f"{steps:,} steps instead of {values['steps']:,}: the learning rate follows the new length")
    if config.patience and state.waited >= config.patience:
        steps = state.step
    encoding = get_encoding(meta["encoding"], config.data_dir)
    spec, tokenizer = bring_tokenizer(meta["prompt"], encoding, config.data_dir), config.data_dir
    if encoding.name == "gpt2" and base["name"] != "scratch":
        with contextlib.suppress(UserError):  # the base of a run that goes on may be gone
            tokenizer = locate(base["name"]).parent
    return Run(config, meta, data, val, model, base, state, steps, peak_of(config, base), max_tokens, compiles,
               encoding, spec, tokenizer)


def describe(run):
    """Prints what is trained, on what, and for how long."""
    config, parameters = run.config, list(run.model.parameters())
    total = sum(p.numel() for p in parameters)
    learned = sum(p.numel() for p in parameters if p.requires_grad)
    share = f", {learned / 1e6:,.2f} M of them trainable ({learned / total:.2%})" if learned < total else ""
    limit = f", at most {config.max_minutes:g} min" if config.max_minutes else ""
    world_size = rank_and_world_size()[1]
    processes = f", {world_size} processes" if world_size > 1 else ""
    print(f"{run.base['name']}: {total / 1e6:,.1f} M parameters{share}, {str(run.state.optimizer.dtype)[6:]} on "
          f"{parameters[0].device}{processes}")
    print(f"{config.data_dir}: {len(run.data):,} training, {len(run.val):,} validation examples")
    print(f"{run.steps:,} steps of {config.batch_size} examples, learning rate {run.learning_rate:g}{limit}",
          flush=True)


def begin(run, samples):
    """Cuts a resumed run's log, and shows an answer. Returns what tracks the run, and the answer's seconds."""
    config, out_dir = run.config, Path(run.config.out_dir)
    track = report.start_tracking(out_dir.name, dataclasses.asdict(config)) if config.wandb else None
    if config.resume:
        clear(out_dir, ())
        report.cut_rows(out_dir / "log.csv", run.state.step)
    started, step = time.perf_counter(), run.state.step
    if step < run.steps:
        with evaluating(run.model):
            samples.show(run.model, f"at step {step:,}" if step else "before training", at_start=True)
    return track, time.perf_counter() - started


def samples_of(run):
    """The prompts that are answered at each evaluation; UserError where --best_by or --patience has nothing."""
    by, has_val, counts = run.config.best_by, len(run.val) > 0, run.meta["train"]
    is_text = counts["supervised_tokens"] == counts["tokens"] - counts["examples"]  # or prompts are learned, too
    if run.config.patience and not has_val:
        raise UserError("--patience needs validation records: prepare with --val_fraction=0.05, or leave it out")
    if by != "loss" and (is_text or not has_val):
        raise UserError(f"--best_by={by} needs validation records of which answers alone are learned; leave it at loss")
    count = run.config.best_examples
    if by == "loss":  # a model from scratch is small: 32 answers at each evaluation take 2 % of the demo's time
        by, count = "exact" if run.base["name"] == "scratch" and has_val and not is_text else "", min(32, count)
    return report.Samples(run.val if has_val else run.data, run.encoding, run.meta["stop"], by=by,
                          scored=count if by else 0)


def save_is_due(config, state, saved, save_seconds, evaluated_now, total_steps):
    """Whether a checkpoint is written after this step, at which the run has not ended; `saved`: when it last was, and
    `save_seconds` what that took. With evaluations it takes up to a twentieth of the time."""
    if state.skipped:
        return False
    if config.save_interval < 0:
        return state.elapsed - saved >= (min(600, 20 * save_seconds) if evaluated_now else 600)
    return state.step % (config.save_interval or total_steps) == 0


def evaluate_and_keep_best(run, samples):
    """Evaluates, shows a few answers and writes best/ if the loss, or what --best_by says, is the best so far. Returns
    what log.csv shows: the validation loss and the share of right answers."""
    state, heading, config = run.state, f"step {run.state.step:,}", run.config
    better, rank = not len(run.val), rank_and_world_size()[0]  # without validation data the newest is the best
    if len(run.val):
        state.val_loss = evaluate(run.model, run.val, run.max_tokens)
        heading += f", validation loss {state.val_loss:.4f}"
        reached, best = (-state.val_loss,), (-state.best_val_loss,)
        if samples.by:
            with evaluating(run.model):
                right = all_reduce(samples.right(run.model) if rank == 0 else 0)
            state.val_score = right / len(samples.prompts)
            heading += f", {samples.by} {right:.0f} of {len(samples.prompts)}"
        if config.best_by != "loss":
            reached, best = (state.val_score, *reached), (state.best_val_score, *best)
        better = reached > best and not math.isnan(state.val_loss)
        state.waited = 0 if better else state.waited + 1
        if better:
            state.best_val_loss, state.best_val_score = state.val_loss, state.val_score
            heading += ", the best so far"
    if rank == 0:
        with evaluating(run.model):
            samples.show(run.model, heading)
        if better:
            save_weights(run, "best")
    return {"val_loss": state.val_loss if len(run.val) else "", "val_score": state.val_score if samples.by else ""}


def train(config, device):
    """Trains in this process, which may be one of several; returns the RunState."""
    started = time.perf_counter()
    run = set_up(config, device)
    config, data, state, optimizer = run.config, run.data, run.state, run.state.optimizer
    out_dir, rank = Path(config.out_dir), rank_and_world_size()[0]
    describe(run)
    samples = samples_of(run)
    track, answer_seconds = begin(run, samples) if rank == 0 else (None, 0.0)
    started -= state.elapsed  # of the run's earlier parts

    def seconds():
        return all_reduce(time.perf_counter() - started, "MAX")  # the same for all processes

    # A limit of time becomes a number of steps, anew after each step, so that the learning rate comes to its end in
    # time. Time for the last evaluation is reserved.
    state.elapsed = saved = seconds()
    save_seconds = 0.0
    answer_seconds = samples.expected_seconds(all_reduce(answer_seconds, "MAX"))
    pace = Pace(run.steps, config.max_minutes, run.compiles, run.val.lengths.sum(), answer_seconds, state.elapsed,
                earlier=state.elapsed / state.step if state.step else 0.0)
    total_steps, first_step, signum = pace.total_steps(state.step), state.step, 0
    steps_per_epoch = math.ceil(len(data) / config.batch_size)
    with interrupts() as caught:
        while state.step < total_steps and not signum:
            # the batch: the same for every process, which then takes its share
            step_started = time.perf_counter()
            indices = examples_of_step(state.step, data, config.batch_size, config.seed)
            tokens, supervised = int(data.lengths[indices].sum()), data.supervised(indices)
            # forward, backward and the optimizer's step
            learning_rate = learning_rate_at(
                state.step, total_steps, run.learning_rate, config.min_lr, config.lr_schedule,
                config.warmup_steps or round(config.warmup_ratio * total_steps))
            loss = gradients(run, indices, supervised)
            sum_over_processes(loss, optimizer.parameters.values())
            norm = optimizer.step(learning_rate, loss, config.grad_clip).item()  # waits for the device
            state.train_loss = loss.item()
            state.skipped = 0 if math.isfinite(state.train_loss + norm) else state.skipped + 1
            if state.step == first_step and rank == 0 and not config.resume:
                clear(out_dir, RESULTS)  # it fits into memory: now a run that was here may go
            # the time
            state.step += 1
            state.elapsed, signum = seconds(), int(all_reduce(max(caught, default=0), "MAX"))
            pace.step_done(state.elapsed, tokens)
            total_steps = pace.total_steps(state.step)
            last = state.step >= total_steps
            if pace.steps == 2 or (pace.steps == 1 and last):
                say_what_fits(run, pace, total_steps)
            # the log
            row = {"step": state.step, "epoch": f"{state.step / steps_per_epoch:.4f}",
                   "train_loss": state.train_loss, "val_loss": "", "learning_rate": learning_rate, "grad_norm": norm,
                   "tokens": tokens, "supervised_tokens": supervised, "seconds": time.perf_counter() - step_started,
                   "val_score": ""}
            interval = config.eval_interval or total_steps
            if interval < 0:  # five an epoch take about a tenth of its time
                interval = max(math.ceil(total_steps / 10), steps_per_epoch // 5)
            if last or signum or state.step % (config.log_interval or math.ceil(total_steps / 50)) == 0:
                left = pace.seconds_left(state.step, total_steps, interval)
                report.show_progress(row, total_steps, left, state.skipped)
            # evaluation
            due = state.step % interval == 0 and pace.has_time_to_evaluate()
            if last or due:
                row.update(evaluate_and_keep_best(run, samples))
                state.elapsed = seconds()
                pace.evaluation_done(state.elapsed)
                if config.patience and state.waited >= config.patience:
                    total_steps, last = state.step, True
                    print(f"no better evaluation in {state.waited}: this is the end (--patience={config.patience})")
            # what outlasts the process: a row a step, and a checkpoint now and then
            save = last or signum or save_is_due(config, state, saved, save_seconds, due, total_steps)
            if rank == 0:
                report.append_row(out_dir / "log.csv", row, sync=save)
                if track:
                    track(row)
                if save:
                    save_state(run)
                if save or due:
                    pictures.plot_losses(out_dir, config.best_by)
            if save:
                saved, save_seconds = state.elapsed, seconds() - state.elapsed
                pace.saving_seconds = 4 / 3 * save_seconds  # ckpt.pt holds three numbers a weight, last/ one
            if state.skipped >= 10:
                raise UserError("ten steps in a row had a loss or gradient that is not finite: lower --learning_rate, "
                                "use --dtype=float32, or look at the data; what was saved before them stays")
        if rank == 0:
            save_weights(run, "last")
    say_what_follows(config, state, signum if state.step < total_steps else 0, state.step == first_step)
    return state


def say_what_follows(config, state, signum, nothing_done):
    """Prints what the run has reached, and the next command; leaves with the signal's exit code after one."""
    status("")
    out_dir = "" if config.out_dir == TrainConfig.out_dir else shlex.quote(config.out_dir)
    if signum:
        flag = out_dir and f" --out_dir={out_dir}"
        script = shlex.quote(Path(__file__).name)  # a fork has another
        print(f"stopped after step {state.step:,} and saved; go on with: python {script} --resume{flag}")
        sys.exit(128 + signum)
    if nothing_done:
        print("nothing to do: raise what ended the run, --epochs, --max_steps, --max_minutes or --patience")
        return
    best = f"best validation loss {state.best_val_loss:.4f}; " if math.isfinite(state.best_val_loss) else ""
    if best and config.best_by != "loss":
        best = f"best by {config.best_by} {state.best_val_score:.1%}, at validation loss {state.best_val_loss:.4f}; "
    flag = out_dir and f" --model={out_dir}"
    steps = "1 step" if state.step == 1 else f"{state.step:,} steps"
    print(f"done: {steps} in {state.elapsed / 60:.1f} minutes; {best}next: python sample.py{flag}")


if __name__ == "__main__":
    run(main, TrainConfig)
