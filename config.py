"""Command-line flags from a dataclass, errors in one line, and the progress line: shared by the scripts.

A field's line is its flag, type, default and help; a comment line above fields names their group in --help:

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
import shutil
import sys


class UserError(ValueError):
    """A mistake of the user's: one line that names the flag, file or line, the value and the remedy."""

    def __init__(self, message):
        if len(message) > 1000:  # a long value hides no remedy
            message = f"{message[:500]} ... {message[-400:]}"
        super().__init__("".join(char if char.isprintable() else " " for char in message))


def refuse(message):
    raise UserError(message)


def require(**problems):
    """UserError that lists every flag given here whose message is not empty: `require(epochs=epochs < 0 and "…")`."""
    found = [f"--{name}: {message}" for name, message in problems.items() if message]
    if found:
        raise UserError("; ".join(found))


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
        refuse(f"unknown {'flag' if name.startswith('-') else 'argument'} {name!r}: " + (
            f"did you mean --{close[0]}?" if close else "--help lists the flags" if name.startswith("-") else
            f"did you mean --{next(iter(fields))}={name}?"))
    config = config_class(**vars(flags))
    object.__setattr__(config, "given", frozenset(vars(flags)))  # the flags that were set
    return config


def terminal_width():
    return shutil.get_terminal_size((120, 24)).columns


def status(line, end=False):
    """One progress line that is drawn over in a terminal; in a log file only the last one (`end`) is printed."""
    if sys.stdout.isatty():
        print(f"\r{line[:terminal_width() - 1]}\033[K", end="\n" if end else "", flush=True)
    elif end:
        print(line, flush=True)


def run(main, config_class):
    """`main` with the command line's config; a user's mistake ends in one line on stderr and exit code 1 or 2."""
    sys.stdin, sys.stdout, sys.stderr = (stream or open(os.devnull, mode) for stream, mode in (
        (sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))  # where the caller has closed one
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows '?'
    try:
        config = parse_config(config_class)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        main(config)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        status("")
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except (MemoryError, RuntimeError) as error:
        if type(error) is not MemoryError and not re.search("allocate memory|(not enough|out of) memory", str(error)):
            raise  # torch has several ways to say it
        print("error: there is not enough memory: take a smaller model, --lora_rank or a smaller micro-batch",
              file=sys.stderr)
        sys.exit(1)
