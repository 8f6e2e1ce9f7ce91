"""The files that people have, plain or .gz, as records: JSON of any shape, tables, text, parquet."""
import codecs
import csv
import glob
import gzip
import json
import re
import zlib
from pathlib import Path

from nanosft.console import UserError
from nanosft.records import NAMES, is_conversation

UNREADABLE = (ValueError, csv.Error, RecursionError, EOFError, gzip.BadGzipFile, zlib.error)  # a damaged file's faults
KINDS = {"json": "json", "jsonl": "json", "ndjson": "json", "csv": "table", "tsv": "table", "txt": "text",
         "parquet": "parquet"}  # of a file, by the end of its name
SEPARATOR = "<|endoftext|>"  # stands on a line of its own between two documents of a .txt file
KNOWN = {name for names in NAMES.values() for name in names}


# ---- which files ----------------------------------------------------------------------------------------------------

def kind_of(path):
    """json, table, text or parquet; None for other files."""
    return KINDS.get(path.name.lower().removesuffix(".gz").rpartition(".")[2])


def paths_of(flag, names):
    """The files that a flag names: a path, a directory, a pattern like *.jsonl, or several of them with commas."""
    paths = []
    for name in [names] if exists(names) else names.split(","):
        path = Path(name)
        if exists(name) and path.is_file():
            if not kind_of(path):
                kinds = " ".join(f".{end}" for end in KINDS)
                raise UserError(f"--{flag}: {path.name} is none of {kinds} or one of them .gz; save it so")
            paths.append(path)
            continue
        found = sorted(path.rglob("*") if exists(name) else map(Path, glob.glob(name, recursive=True)))
        found = [file for file in found if file.is_file() and kind_of(file) and not file.name.startswith(".")]
        if not found:
            fault = "a directory without such files" if exists(name) else "not there"
            raise UserError(f"--{flag}: {name!r} is {fault}; give a file, a directory with some, or a pattern like "
                            "'data/*.jsonl'")
        paths += found
    return list(dict.fromkeys(paths))


def exists(name):
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


# ---- text in any encoding -------------------------------------------------------------------------------------------

def encoding_of(head):
    """The encoding of a text by its first bytes: UTF-16 with and without a mark, else UTF-8."""
    for mark, encoding in ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
                           (codecs.BOM_UTF16_BE, "utf-16")):
        if head.startswith(mark):
            return encoding
    for start, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):  # every second byte of plain letters is 0
        if 2 * head[start::2].count(0) > len(head) / 2 > 10 * head[1 - start::2].count(0):
            return encoding
    return "utf-8-sig"


def open_text(path, encoding="", newline=""):
    """A plain or gzipped file as text without a byte-order mark; with newline=None every line end is \\n."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        head = file.read(4096)
    return opener(path, "rt", encoding=encoding or encoding_of(head), newline=newline)


def read_records(path, text_encoding="", separator=SEPARATOR):
    """Yields (location, record) for every record of a file. UserError names the location of what is damaged."""
    name, location = path.name, "line 1"
    try:
        if kind_of(path) == "parquet":
            for location, record in read_parquet(path):
                yield location, record
            return
        with open_text(path, text_encoding, newline=None if kind_of(path) == "text" else "") as file:
            if kind_of(path) == "text":
                records = read_documents(file, separator)
            else:
                records = read_table(file, name) if kind_of(path) == "table" else read_json_records(file, name)
            for location, record in records:
                yield location, record
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{name}, in or after {location}: {error}; save it as UTF-8, or prepare it with "
                        "--text_encoding=cp1252 or whatever it is") from None
    except UNREADABLE as error:
        raise UserError(f"{name}, in or after {location}: {error}; save or download it again") from None


# ---- JSON -----------------------------------------------------------------------------------------------------------

def read_values(file, name):
    """Yields (location, value): one a line or, where the first line is none, values of any number of lines."""
    def refuse(error, line):
        raise UserError(f"{name}, line {line}, column {error.colno}: not valid JSON ({error.msg}); expected one record "
                        "a line, or a list of records") from None

    lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
    number, line = next(lines, (0, ""))
    try:
        value = json.loads(line) if line else None
    except json.JSONDecodeError:
        file.seek(0)
        text, decoder, end = file.read().lstrip("\ufeff"), json.JSONDecoder(), 0
        while start := re.compile(r"\S").search(text, end):
            try:
                value, end = decoder.raw_decode(text, start.start())
            except json.JSONDecodeError as error:
                refuse(error, error.lineno)
            yield f"line {text.count(chr(10), 0, start.start()) + 1}", value
        return
    if line:
        yield f"line {number}", value
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            refuse(error, number)
        yield f"line {number}", value


def read_json_records(file, name):
    """Yields (location, record) for the records of JSON values."""
    for location, value in read_values(file, name):
        records = list_in(value, name)
        if records is None:
            yield location, value
            continue
        for number, record in enumerate(records, 1):
            is_row = isinstance(record, dict) and {"row_idx", "row"} <= record.keys()  # as the hub's viewer exports it
            yield f"record {number}", record["row"] if is_row else record


def list_in(value, name):
    """The list of records that a JSON value is or holds, as {"data": [...]} does, or a dict of columns; None where the
    value is a record itself."""
    if isinstance(value, list):
        return None if is_conversation(value) or not all(isinstance(entry, dict | list) for entry in value) else value
    if not isinstance(value, dict) or not value:
        return None
    inner, first = list(value.values()), next(iter(value.values()))
    if not isinstance(first, list | dict) and not KNOWN.isdisjoint(value):  # most are plain records
        return None
    for kind in (list, dict):  # columns: lists of one length or, as pandas writes them, objects with the same names
        if all(type(column) is kind and len(column) == len(first) for column in inner) and first and len(value) > 1:
            rows = [list(column.values()) if kind is dict else column for column in inner]
            if not any(isinstance(cell, dict | list) for row in rows for cell in row[:9]):
                return [dict(zip(value, row, strict=True)) for row in zip(*rows, strict=True)]
    lists = {key: entry for key, entry in value.items()
             if isinstance(entry, list) and entry and all(isinstance(record, dict | list) for record in entry)}
    if not lists or KNOWN & value.keys():
        return None
    if len(lists) > 1 and "train" not in lists:
        raise UserError(f"{name} holds several lists, {', '.join(lists)}; save the one to train on by itself")
    key = "train" if "train" in lists else next(iter(lists))
    for other, records in lists.items():
        if other != key:
            print(f"{name}: not used: {other} ({len(records):,} records)")
    return lists[key]


# ---- tables, text, parquet ------------------------------------------------------------------------------------------

def read_table(file, name):
    """Yields (location, {column: text}) for every row but the first, which names the columns. What separates them, and
    how quotes within quotes are written, is seen."""
    csv.field_size_limit(2**31 - 1)
    headers = {}
    for delimiter in "\t,;|" if name.lower().removesuffix(".gz").endswith(".tsv") else ",;\t|":
        file.seek(0)
        headers[delimiter] = next(filter(any, csv.reader(file, delimiter=delimiter)), [])
    delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))  # the first of equals
    spaced = any(column.startswith(" ") for column in headers[delimiter][1:])
    options = dict(delimiter=delimiter, skipinitialspace=spaced, strict=True)
    repair = has_escaped_quotes(file, options)
    file.seek(0)
    rows = csv.reader(map(double_quotes, file) if repair else file, **options)
    columns = [column.strip() if spaced else column for column in next(filter(any, rows), [])]
    while columns and not columns[-1]:  # Excel's empty ones
        columns.pop()
    columns = [column or f"column {number}" for number, column in enumerate(columns, 1)]
    if len(set(columns)) < len(columns):
        raise UserError(f"{name}, line 1: duplicate column names in {columns}; rename them")
    for row in filter(any, rows):
        if len(row) != len(columns):
            if len(row) < len(columns) or any(row[len(columns):]):
                raise UserError(f"{name}, line {rows.line_num}: {len(row)} fields where the header has {len(columns)}; "
                                "quote fields that hold the separator")
            row = row[:len(columns)]
        yield f"line {rows.line_num}", dict(zip(columns, row, strict=True))


def has_escaped_quotes(file, options):
    """Whether a table writes quotes within quotes as \\" and not as "": where it can be read in no other way."""
    file.seek(0)
    if not any('\\"' in line for line in file):
        return False
    file.seek(0)
    try:
        for _ in csv.reader(file, **options):
            pass
    except csv.Error:
        return True
    return False


def double_quotes(line):
    return re.sub(r'(?<!\\)((?:\\\\)*)\\"', r'\1""', line)


def read_documents(file, separator):
    """Yields (location, {"text": ...}) for the documents of a text, parted by lines that hold the separator alone."""
    lines, first, several = [], 1, False
    for number, line in enumerate(file, 1):
        if separator and line.strip() == separator:
            several = True
            if any(map(str.strip, lines)):
                yield f"line {first}", {"text": "".join(lines).strip("\n")}
            lines, first = [], number + 1
        else:
            lines.append(line)
    text = "".join(lines)
    if text.strip() if several else text:
        yield f"line {first}", {"text": text.strip("\n") if several else text}


def read_parquet(path):
    """Yields (location, record) for every row."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path.name} needs pyarrow: pip install pyarrow") from None
    number = 0
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=2048):
            for record in batch.to_pylist():
                number += 1
                yield f"row {number}", record
