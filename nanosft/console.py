"""What a person at the terminal sees: errors in one line, and the progress line."""
import os
import shutil
import sys


class UserError(ValueError):
    """A mistake of the user's: one line that names the flag, file or line, the value and the remedy."""

    def __init__(self, message):
        if len(message) > 1000:  # the remedy stands at the end, behind a long value
            message = f"{message[:500]} ... {message[-400:]}"
        super().__init__("".join(char if char.isprintable() else " " for char in message))


def status(line, end=False):
    """Shows one progress line that the next one overwrites. A log file gets only the last one, which has `end`."""
    if sys.stdout.isatty():
        print(f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K", end="\n" if end else "", flush=True)
    elif end:
        print(line, flush=True)


class Output:
    """stdout or stderr. When its reader leaves (a closed pipe, a full disk), the run goes on, and writes nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def flush(self):
        self.write("")


def protect_output():
    """Puts an `Output` in the place of stdout and stderr. A stream that the caller has closed is the null device, and a
    character that cannot be shown, or a typed byte that is no text, is a '?'."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
