"""Files that are written wholly or not at all, JSON, checksums."""
import hashlib
import json
import os
import zlib
from contextlib import contextmanager
from pathlib import Path

from nanosft.console import UserError


@contextmanager
def opened(path, mode, name="", **options):
    """`open`, whose OSError names the file, as that of a failed write does not; `name`: as people know it."""
    try:
        with open(path, mode, **options) as file:
            yield file
    except OSError as error:
        if error.errno and error.filename in (None, str(path)):  # what requests raises is an OSError too
            error.filename = str(name or path)
        raise


@contextmanager
def atomic_file(path):
    """A binary file that takes the place of `path` once it is complete on disk. On an error `path` stays as it was."""
    path = Path(os.path.realpath(path))  # a link stays, and what it names is replaced
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with opened(temporary, "wb", path) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, values):
    with atomic_file(path) as file:
        file.write(json.dumps(values, indent=1).encode() + b"\n")


def read_json(path):
    """The object that a JSON file holds."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested too deeply
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; download or write it again")
    return values


def sha256_of(*paths):
    """The SHA-256 of a file, or of several one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def crc32_of(path):
    """The CRC-32 of a file as 8 hexadecimal digits."""
    return f"{zlib.crc32(Path(path).read_bytes()):08x}"


def crc32_of_json(values):
    """The CRC-32 of plain values, written as JSON with sorted names, as 8 hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"
