"""ckpt.pt, all that a run needs to go on: written in one piece, checked when it is read; and the directory of a run."""
import contextlib
import os
import shlex
import shutil

import torch

from nanosft.console import UserError
from nanosft.files import atomic_file, crc32_of_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT_VERSION = 3
RESULTS = ("ckpt.pt", "log.csv", "loss.png", "best", "last")  # what a run leaves in its out_dir


def save_checkpoint(path, values, tensors):
    """Writes `values` (plain ones, as JSON has them) and `tensors` (by name, nested) to ckpt.pt. An older checkpoint
    stays until this one is complete on disk. Nothing but data is written, so that loading executes nothing."""
    content = {"format_version": FORMAT_VERSION, "values": values, "checksum": crc32_of_json(values),
               "tensors": tensors}
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's, in the midst of a failed write
        reason = str(error.__context__ or error).partition("\n")[0][:80]
        raise UserError(f"cannot write {path} ({reason}); is the disk full?") from None


def load_checkpoint(path):
    """(values, tensors) as save_checkpoint took them; UserError where the file is missing, damaged or another's."""
    if not path.is_file():
        raise UserError(f"--resume: {path} is not there; name the run's --out_dir, or start one without --resume")
    with undamaged(path):
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {content['format_version']}, this program reads {FORMAT_VERSION}")
        if content["checksum"] != crc32_of_json(content["values"]):
            raise ValueError("its checksum is another")
        return content["values"], content["tensors"]


@contextlib.contextmanager
def undamaged(path):
    """Whatever a damaged checkpoint raises while it is read becomes one line that names the file and the remedy."""
    try:
        yield
    except OSError:
        raise
    except UserError as error:  # a setting that only a fork has
        raise UserError(f"{path} cannot be read by this script ({error}); go on with the one that wrote it") from None
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:80]
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {reason}); start anew with "
                        f"--overwrite, or from its weights with --init_from={shlex.quote(str(path.parent))}") from None


@contextlib.contextmanager
def claimed(out_dir):
    """Makes out_dir; within it no other run may claim it, where the system has locks. What stays empty is removed."""
    is_new = not out_dir.exists()
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--out_dir={out_dir} is or lies below a file, not a directory; name another") from None
    handle = os.open(out_dir, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"--out_dir={out_dir}: another run writes there; name another, or wait for it") from None
    except OSError:  # the file system has no locks
        pass
    try:
        yield
    finally:
        if fcntl:
            os.close(handle)
        if is_new and not any(out_dir.iterdir()):
            out_dir.rmdir()


def clear(out_dir, names):
    """Removes these names from out_dir, and what an earlier run was writing when it died."""
    for directory in (out_dir, out_dir / "best", out_dir / "last"):
        for path in directory.glob("*.[0-9]*.tmp"):
            path.unlink()
    for name in names:
        if (out_dir / name).is_dir() and not (out_dir / name).is_symlink():
            shutil.rmtree(out_dir / name)
        else:
            (out_dir / name).unlink(missing_ok=True)
