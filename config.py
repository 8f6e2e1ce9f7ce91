"""Command-line flags from a dataclass. A field's line is its flag, type, default and help; a comment line above fields
names their group in --help:

    # optimizer
    learning_rate: float = 2e-5  # peak learning rate

`--name=value` and `--name value` both work, dashes and underscores are alike, and `--flag` alone turns a bool on.
"""
import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys

from console import refuse, terminal_width

# what nanoGPT, transformers, TRL and PEFT call our flags
ELSEWHERE = dict(lr="learning_rate", max_iters="max_steps", warmup_iters="warmup_steps", dataset="data_dir",
                 start="prompt", out_dir="model", num_epochs="epochs", num_train_epochs="epochs", lora_r="lora_rank",
                 gradient_accumulation_steps="batch_size", per_device_train_batch_size="batch_size",
                 max_grad_norm="grad_clip", lr_scheduler_type="lr_schedule", output_dir="out_dir")


def parse_bool(text):
    """'true', 'yes', 'on', '1' or 'false', 'no', 'off', '0', in any case, as a bool."""
    if text.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return text.lower() in ("true", "yes", "on", "1")
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def parse_config(config_class, argv=None):
    """`argv` (default: the command line) as a `config_class`; UserError for an unknown flag or a bad value."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [--flag=value ...]", description=inspect.getmodule(config_class).__doc__,
        allow_abbrev=False, add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 34, min(120, terminal_width())))
    parser.error = lambda message: refuse(message.replace("argument --", "--", 1))
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    group = parser
    for line in inspect.getsource(config_class).splitlines():
        if heading := re.fullmatch(r" {4}# (.+)", line):
            group = parser.add_argument_group(heading[1])
        elif (match := re.match(r" {4}(\w+): \w+ = .+?  # (.+)", line)) and match[1] in fields:
            kind = fields[match[1]].type
            switch = dict(type=parse_bool, nargs="?", const=True) if kind is bool else dict(type=kind)
            group.add_argument("--" + match[1], default=argparse.SUPPRESS, help=match[2].replace("%", "%%"),
                               metavar=str(fields[match[1]].default) or "''", **switch)
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    words = sys.argv[1:] if argv is None else argv
    flags, unknown = parser.parse_known_args(
        [re.sub(r"^--[\w-]+(?==|$)", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words])
    for name in (word.split("=")[0] for word in unknown):
        close = difflib.get_close_matches(name.lstrip("-"), fields, n=1) if name.startswith("-") else []
        close = [ours] if (ours := ELSEWHERE.get(name.lstrip("-"))) in fields else close
        refuse(f"unknown {'flag' if name.startswith('-') else 'argument'} {name!r}: " + (
            f"did you mean --{close[0]}?" if close else "--help lists the flags" if name.startswith("-") else
            f"did you mean --{next(iter(fields))}={name}?"))
    home = {name: os.path.expanduser(value) for name, value in vars(flags).items() if str(value).startswith("~/")}
    config = config_class(**vars(flags) | home)  # in --name=~/... a shell leaves it
    object.__setattr__(config, "given", frozenset(vars(flags)))  # the flags that were set
    return config
