"""The files that people have, plain or .gz, as records: JSON of any shape, tables, text, parquet."""
import codecs
import contextlib
import csv
import glob
import gzip
import json
import os
import re
import zlib
from itertools import chain, islice
from pathlib import Path

from nanosft.console import UserError
from nanosft.hub import dataset_files
from nanosft.records import CUT, NAMES, ROLES, is_conversation

UNREADABLE = (ValueError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error)  # a damaged file's faults
KINDS = {"json": "json", "jsonl": "json", "ndjson": "json", "csv": "table", "tsv": "table", "txt": "text",
         "parquet": "parquet"}  # of a file, by the end of its name
SEPARATOR = "<|endoftext|>"  # stands on a line of its own between two documents of a .txt file
KNOWN = {name for names in NAMES.values() for name in names}


# ---- which files ----------------------------------------------------------------------------------------------------

def kind_of(path):
    """json, table, text or parquet; None for other files."""
    name = path.name.lower()
    kind = KINDS.get(name.removesuffix(".gz").rpartition(".")[2])
    return None if kind == "parquet" and name.endswith(".gz") else kind  # parquet compresses by itself


def paths_of(flag, names):
    """The files that a flag names: a path, a directory, a pattern, hf:owner/name, or several of these with commas."""
    paths = []
    for name in [names] if os.path.exists(names) else filter(None, map(str.strip, names.split(","))):
        paths += files_in(flag, name)
    if len({kind_of(path) == "text" for path in paths}) > 1:
        raise UserError(f"--{flag}: {names} has texts (.txt) and records; name one kind, as in 'folder/*.txt'")
    if not paths:
        raise UserError(f"--{flag}: {names!r} names no file; give one")
    return list(dict.fromkeys(paths))


def files_in(flag, name):
    """The files behind one name, sorted. What else a directory holds is said."""
    if name.startswith("hf:") and not os.path.exists(name):
        return dataset_files(name[3:])
    path, kinds = Path(name), " ".join(f".{end}" for end in KINDS)
    if path.is_file():
        if not kind_of(path):
            raise UserError(f"--{flag}: {path.name} is none of {kinds} or one of them .gz; save it so (a "
                            "spreadsheet as CSV)")
        return [path]
    pattern = f"{glob.escape(name)}/**" if path.is_dir() else name
    found = sorted(file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file())
    files = [file for file in found if kind_of(file)]
    if not files:
        fault = "a directory without such files" if os.path.exists(name) else "not there"
        raise UserError(f"--{flag}: {name!r} is {fault}; give a file, a directory with {kinds}, or a pattern")
    if len(files) < len(found):
        print(f"{name}: not read: {', '.join(file.name for file in found if file not in files)[:100]}")
    return files


# ---- text in any encoding -------------------------------------------------------------------------------------------

def open_text(path, encoding="", newline=""):
    """A plain or gzipped file as text without a byte-order mark; with newline=None every line end is \\n. A mark, or
    what can only be UTF-8, counts more than the encoding that is named: of several files some may have another."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as file:
        head = file.read(2**20)
    seen = json.detect_encoding(head)  # by its mark or, less surely, the place of zeros; else UTF-8
    if not encoding or seen in ("utf-8-sig", "utf-16", "utf-32") or is_utf8(head):
        encoding = seen
    try:
        return opener(path, "rt", encoding=encoding, newline=newline)
    except LookupError:
        raise UserError(f"--text_encoding: Python knows no {encoding!r}; try cp1252 or utf-16") from None


def is_utf8(head):
    """Whether the first bytes of a file have letters that are not ASCII, in UTF-8."""
    with contextlib.suppress(UnicodeDecodeError):
        return not codecs.getincrementaldecoder("utf-8")().decode(head).isascii()
    return False


def read_records(path, text_encoding="", separator=SEPARATOR):
    """Yields (location, record) for every record of a file. UserError names the location of what is damaged."""
    name, location = path.name, "line 1"
    try:
        if kind_of(path) == "parquet":
            for location, record in read_parquet(path):
                yield f"{name}, {location}", record
            return
        with open_text(path, text_encoding, newline=None if kind_of(path) == "text" else "") as file:
            if kind_of(path) == "text":
                records = read_documents(file, separator)
            else:
                records = read_table(file, name) if kind_of(path) == "table" else read_json_records(file, name)
            for location, record in records:
                yield f"{name}, {location}", record
    except UserError:
        raise
    except (*UNREADABLE, csv.Error) as error:
        remedy = "save or download it again"
        if isinstance(error, UnicodeDecodeError):
            remedy = "save it as UTF-8, or give its encoding, such as --text_encoding=cp1252"
        elif isinstance(error, csv.Error):
            remedy = "check the quotes there"
        raise UserError(f"{name}, in or after {location}: {error}; {remedy}") from None


# ---- JSON -----------------------------------------------------------------------------------------------------------

def read_values(file, name):
    """Yields (location, value): one a line or, where the first line is none, values of any number of lines."""
    decoder, is_first = json.JSONDecoder(), True
    for number, text in enumerate(file, 1):
        end, line, counted = 0, number, 0
        while start := re.compile(r"\S").search(text, end):
            try:
                value, end = decoder.raw_decode(text, start.start())
                line, counted = line + text.count("\n", counted, start.start()), start.start()
                yield f"line {line}", value
            except json.JSONDecodeError as error:
                if not is_first:
                    text = text.rstrip()  # one that ends too early fails there, and not on the next line
                    line = number + text.count("\n", 0, error.pos)
                    column = min(error.pos, len(text)) - text.rfind("\n", 0, error.pos)
                    raise UserError(f"{name}, line {line}, column {column}: not valid JSON ({error.msg}); expected one "
                                    "record a line, or a list of records") from None
                text += file.read()
            is_first = False


def read_json_records(file, name):
    """Yields (location, record): a value each or, where the file is one value, the records in it."""
    values = read_values(file, name)
    first = list(islice(values, 2))
    if len(first) == 1:
        (location, value), = first
        records = records_in(value, name)
        first = [(location if record is value else f"record {number}", record)
                 for number, record in enumerate(records, 1)]
    for location, record in chain(first, values):
        if isinstance(record, dict) and "row_idx" in record and isinstance(record.get("row"), dict):
            # as the hub's viewer exports it
            record = {**record["row"], CUT: record[CUT]} if record.get(CUT) else record["row"]
        yield location, record


def records_in(value, name):
    """The records in a file's only JSON value: a list, {"data": [...]}, an object of columns, or a record itself."""
    if isinstance(value, list):
        roles = {str(turn.get("role", turn.get("from"))).lower() for turn in value} if is_conversation(value) else {}
        return value if ROLES.keys().isdisjoint(roles) else [value]
    known = [value[key] for key in KNOWN & value.keys()] if isinstance(value, dict) else [value]
    if not value or any(not isinstance(entry, list | dict) or is_conversation(entry) for entry in known):
        return [value]
    columns, first = list(value.values()), next(iter(value.values()))
    if all(isinstance(column, dict) and column.keys() == first.keys() and all(map(str.isdigit, column))
           for column in columns):  # as pandas writes them
        return [{key: column[row] for key, column in value.items()} for row in first]
    lists = [key for key, entry in value.items() if isinstance(entry, list) and entry
             and all(isinstance(record, dict) for record in entry) and not is_conversation(entry)]
    are_columns = all(isinstance(column, list) and len(column) == len(first) for column in columns)
    if are_columns and (known or not lists):
        return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    chosen = [key for key in ("train", "data", "rows") if key in lists][:1]
    if not chosen and not re.search(r"\.(jsonl|ndjson)(\.gz)?$", name.lower()):  # there a line is always a record
        chosen = lists
    if not chosen:
        return [value]
    if len(chosen) > 1:
        raise UserError(f"{name} holds several lists, {', '.join(chosen)}; save the one to train on by itself")
    others = [key for key in value if key not in chosen]
    if others:
        print(f"{name}: not used: {', '.join(others)}")
    return value[chosen[0]]


# ---- tables, text, parquet ------------------------------------------------------------------------------------------

def read_table(file, name):
    """Yields (location, {column: text}) for every row after the header. Delimiter and kind of quotes are seen."""
    csv.field_size_limit(2**31 - 1)
    skipped = bool(re.fullmatch("sep=.", file.readline().lstrip("\ufeff").rstrip("\r\n")))  # Excel's own line
    if not skipped:
        file.seek(0)
    start = file.tell()

    def rows_of(**dialect):
        file.seek(start)
        return csv.reader(map(keep_backslashes, file) if "escapechar" in dialect else file, **dialect)

    delimiters = "\t,;|" if name.lower().removesuffix(".gz").endswith(".tsv") else ",;\t|"
    headers = {delimiter: next(filter(any, rows_of(delimiter=delimiter)), []) for delimiter in delimiters}
    delimiter = max(headers, key=lambda delimiter: len(headers[delimiter]))  # the first of equals
    spaced = any(column.startswith(" ") for column in headers[delimiter][1:])
    dialect = {"delimiter": delimiter, "skipinitialspace": spaced}
    columns = next(filter(any, rows_of(**dialect, strict=True)), [])
    while columns and not columns[-1]:  # Excel's empty ones
        columns.pop()
    columns = [(column.strip() if spaced else column) or f"column {number}" for number, column in enumerate(columns, 1)]
    if len(set(columns)) < len(columns):
        raise UserError(f"{name}, line 1: duplicate column names in {columns}; rename them")

    ways = [{"strict": True}, {"strict": True, "escapechar": "\\"}]  # "" or \" within quotes
    if delimiter == "\t":
        ways.append({"quoting": csv.QUOTE_NONE})  # quotes that mean nothing
    fitting = (way for way in ways if fits(rows_of(**dialect, **way), len(columns), delimiter))
    rows = rows_of(**dialect, **next(fitting, ways[0]))
    next(filter(any, rows), None)
    stop = rows.line_num + skipped  # the last line of the row before, or of the header
    for row in rows:
        line, stop = stop + 1, rows.line_num + skipped
        if not any(row):
            continue
        if len(row) < len(columns) or any(row[len(columns):]):
            remedy = "quote fields that hold the separator, or name all columns in the first line"
            remedy = "fill in the others" if len(row) < len(columns) else remedy
            raise UserError(f"{name}, line {line}: {len(row)} fields where the header has {len(columns)}; "
                            f"{remedy}")
        yield f"line {line}", dict(zip(columns, row, strict=False))


def fits(rows, width, delimiter):
    """Whether all rows have the header's width and, in a table with tabs, no field has swallowed others."""
    try:
        return not any(any(row) and (len(row) < width or any(row[width:]) or delimiter == "\t" and any(
            "\t" in field and "\n" in field for field in row)) for row in rows)
    except csv.Error:
        return False


def keep_backslashes(line):
    """Doubles the backslashes that stand before neither a quote nor a backslash: csv takes away one of two."""
    return re.sub(r'\\([\\"])|\\', lambda match: match[0] if match[1] else "\\\\", line)


def read_documents(file, separator):
    """Yields (location, {"text": ...}) for the documents of a text, parted by lines that hold the separator alone."""
    lines, first = [], 1
    for number, line in enumerate(file, 1):
        if separator and line.strip() == separator:
            if any(map(str.strip, lines)):
                yield f"line {first}", {"text": "".join(lines).strip("\n")}
            lines, first = [], number + 1
        else:
            lines.append(line)
    text = "".join(lines)
    if first == 1:  # nothing parts it
        yield "line 1", {"text": text}
    elif text.strip():
        yield f"line {first}", {"text": text.strip("\n")}


def read_parquet(path):
    """Yields (location, record) for every row."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path.name} needs pyarrow: pip install pyarrow") from None
    number, folders = 0, dict(part.split("=", 1) for part in path.parent.parts if "=" in part)  # Spark's, of a column
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=2048) for row in batch.to_pylist())
            for number, record in enumerate(rows, 1):
                yield f"row {number}", {**folders, **record}
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:  # the last: times in nanoseconds
        raise UserError(f"{path.name}, after row {number}: {str(error)[:200]}; write it again, with plain columns"
                        ) from None
