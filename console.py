"""What a person at the terminal sees of any script: errors in one line, those of a config's values among them, and the
progress line, on an output that may lose its reader."""
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


def typed(config):
    """Gives what Python's callers put into a config the types of its fields: paths become text, NumPy's numbers
    Python's. A checkpoint holds nothing else."""
    for name, field in config.__dataclass_fields__.items():
        if type(value := getattr(config, name)) is not field.type:
            try:
                plain = field.type(value)
            except (TypeError, ValueError):
                plain = None
            if plain is None or plain != value and not isinstance(value, os.PathLike):
                raise UserError(f"--{name}: {value!r} is no {field.type.__name__}")
            object.__setattr__(config, name, plain)


class Output:
    """stdout or stderr, whose reader may leave (a closed pipe or terminal, a full disk): the rest goes nowhere, and the
    work goes on."""

    def __init__(self, stream, warnings=None):
        self.stream, self.warnings = stream, warnings

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *args):
        try:
            act(*args)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            if self.warnings:
                print(f"warning: nobody takes the output any more ({error.strerror}); the work goes on",
                      file=self.warnings)


def terminal_width():
    return shutil.get_terminal_size((120, 24)).columns


def status(line, end=False):
    """One progress line that is drawn over in a terminal; in a log file only the last one (`end`) is printed."""
    if sys.stdout.isatty():
        print(f"\r{line[:terminal_width() - 1]}\033[K", end="\n" if end else "", flush=True)
    elif end:
        print(line, flush=True)


def run(main, parse, config_class):
    """`main` with what `parse` makes of the command line; a user's mistake ends in one line on stderr and exit code 1
    or 2."""
    sys.stdin, sys.stdout, sys.stderr = (stream or open(os.devnull, mode) for stream, mode in (
        (sys.stdin, "r"), (sys.stdout, "w"), (sys.stderr, "w")))  # where the caller has closed one
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that cannot show a character shows '?'
    sys.stderr = Output(sys.stderr)
    sys.stdout = Output(sys.stdout, warnings=sys.stderr)
    try:
        config = parse(config_class)
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
