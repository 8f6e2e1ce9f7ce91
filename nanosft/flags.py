"""Command-line flags from a dataclass. A field's line is its flag, type, default and help; a comment line above fields
names their group in --help:

    # optimizer
    learning_rate: float = 2e-5  # peak learning rate

`--name=value` and `--name value` both work, dashes and underscores are alike, and `--flag` alone turns a bool on.
"""
import argparse
import contextlib
import difflib
import functools
import inspect
import os
import re
import signal
import sys

from nanosft.console import UserError, protect_output, status

# what nanoGPT, transformers, TRL and PEFT call our flags
ELSEWHERE = {"lr": "learning_rate", "max_iters": "max_steps", "warmup_iters": "warmup_steps", "dataset": "data_dir",
             "start": "prompt", "out_dir": "model", "num_epochs": "epochs", "num_train_epochs": "epochs",
             "lora_r": "lora_rank", "gradient_accumulation_steps": "batch_size", "max_grad_norm": "grad_clip",
             "per_device_train_batch_size": "batch_size", "lr_scheduler_type": "lr_schedule", "output_dir": "out_dir",
             "save_steps": "save_interval", "eval_steps": "eval_interval", "logging_steps": "log_interval",
             "target_modules": "lora_targets", "r": "lora_rank", "report_to": "wandb", "max_length": "block_size",
             "resume_from_checkpoint": "resume", "metric_for_best_model": "best_by", "model_name_or_path": "init_from",
             "temp": "temperature", "max_seq_length": "block_size"}
OUT_OF_MEMORY = re.compile("allocate memory|(not enough|out of) memory")  # torch's ways to say it


def parse_bool(text):
    if text.lower() not in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "on", "1")


# how the word of a flag becomes its value, where the type alone does not; in --name=~/... a shell leaves the ~
PARSED = {bool: {"type": parse_bool, "nargs": "?", "const": True}, str: {"type": os.path.expanduser}}


def parse_config(config_class, argv=None):
    """The words of `argv` (default: the command line) as a `config_class`, whose attribute `given` names the flags that
    were set. UserError for an unknown flag or a bad value."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--flag=value ...]", description=inspect.getmodule(config_class).__doc__,
        allow_abbrev=False, add_help=False, exit_on_error=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34))
    fields, group = config_class.__dataclass_fields__, parser
    for line in inspect.getsource(config_class).splitlines():
        heading, setting = re.fullmatch(r" {4}# (.+)", line), re.match(r" {4}(\w+): \w+ = .+?  # (.+)", line)
        if heading:
            group = parser.add_argument_group(heading[1])
        elif setting:
            field = fields[setting[1]]
            group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=setting[2].replace("%", "%%"),
                               metavar=str(field.default) or "''", **PARSED.get(field.type, {"type": field.type}))
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    words = [re.sub(r"^--[\w-]+(?==|$)", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
             for word in (sys.argv[1:] if argv is None else argv)]
    try:
        values, unknown = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        told = str(error).removeprefix("argument ")
        raise UserError(told + ("; write --name=value" if told.endswith("expected one argument") else "")) from None
    if unknown:
        refuse_unknown(unknown[0].split("=")[0], fields)
    config = config_class(**vars(values))
    object.__setattr__(config, "given", frozenset(vars(values)))
    return config


def refuse_unknown(word, fields):
    name = word.lstrip("-")
    if not word.startswith("-"):
        raise UserError(f"unknown argument {word!r}: did you mean --{next(iter(fields))}={word}?")
    ours = ELSEWHERE.get(name, name)
    close = [ours] if ours in fields else difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
    remedy = f"did you mean --{close[0]}?" if close else "--help lists the flags"
    if ours == "block_size" and ours not in fields:
        remedy = "prepare_data.py has --block_size"
    raise UserError(f"unknown flag {word!r}: {remedy}")


def check(config, at_least, fractions, choices, problems):
    """Gives the fields their types (what Python's callers put there: NumPy's numbers, paths), then raises one UserError
    that lists every problem. Numbers are from 0, or from what at_least has for the field, up to 2^31; fractions: fields
    in [0, 1); choices: {field: its values}; problems: messages that are ready, "--name: ..."."""
    found, fields = [], config.__dataclass_fields__
    for name, field in fields.items():
        value, least = typed(name, getattr(config, name), field.type), at_least.get(name, 0)
        object.__setattr__(config, name, value)
        if any(problem.startswith(f"--{name}:") for problem in problems):
            continue
        if name in fractions and not 0 <= value < 1:
            found.append(f"--{name}: {value} is not in [0, 1)")
        elif field.type in (int, float) and value < least:
            found.append(f"--{name}: {value} is below {least}")
        elif field.type in (int, float) and not value < 2**31:
            found.append(f"--{name}: {value} is no number below 2^31")
        elif name in choices and value not in choices[name]:
            found.append(f"--{name}: {value!r} is none of {', '.join(filter(None, choices[name]))}")
    if found or problems:
        raise UserError("; ".join([*found, *problems]))
    given = {name for name, field in fields.items() if getattr(config, name) != field.default}
    object.__setattr__(config, "given", given)  # the fields that were set; parse_config knows them better


def typed(name, value, kind):
    """`value` as a `kind`; UserError where that changes it."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        plain = kind(value)
        if plain == value or isinstance(value, os.PathLike) or plain != plain:  # NaN equals nothing
            return plain
    raise UserError(f"--{name}: {value!r} is no {kind.__name__}")


def run(main, config_class):
    """Calls `main` with the command line as a `config_class`. A user's mistake ends in one line on stderr, with exit
    code 2 for a flag's and 1 for any other; a bug shows its traceback."""
    protect_output()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half written is removed on the way out
    code = 2
    try:
        config = parse_config(config_class)
        code = 1
        main(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        fail(error, code)
    except OSError as error:
        remedy = "; check the path, its permissions and the room on its disk" if error.errno else ""
        fail(f"{error}{remedy}", code)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        fail("there is not enough memory: close other programs, or take a smaller model, batch or file", 1)


def fail(message, code):
    status("")
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
