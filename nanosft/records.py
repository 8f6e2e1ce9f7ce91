"""Records of any kind, from .json, .jsonl, .csv or .tsv files, as messages: a list of (role, fields).

Roles: system, user and assistant in a conversation; prompt and completion in what is rendered as it is; text.
"""
import csv
import gzip
import json
import re
import zlib
from itertools import islice
from pathlib import Path

from nanosft.console import UserError

UNREADABLE = (ValueError, csv.Error, RecursionError, EOFError, gzip.BadGzipFile, zlib.error)  # a damaged file's faults
NAME = re.compile(r"\{([^{}\n\"':]+)\}")  # a field's name in prompt_format and response_format
PAIRS = {"prompt": ("completion", "response")}  # a prompt's name, and the names that its answer may have
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


# ---- files ----------------------------------------------------------------------------------------------------------

def open_text(path, newline=""):
    """A plain or gzipped file as UTF-8 text without its byte-order mark; with newline=None every line end is \\n."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def read_records(path):
    """Yields (location, record) for every record of a .json, .jsonl, .csv or .tsv file, plain or .gz. UserError names
    the location of what is damaged."""
    name = path.name
    kind = Path(name.removesuffix(".gz")).suffix.lower()
    location, is_list = "line 1", False
    try:
        with open_text(path) as file:
            if kind in (".csv", ".tsv"):
                for location, record in read_table(file, name, "\t" if kind == ".tsv" else ","):
                    yield location, record
                return
            is_list = kind == ".json" and file.read(64).lstrip().startswith("[")
            file.seek(0)
            if is_list:
                for number, record in enumerate(json.load(file), 1):
                    yield f"record {number}", record
                return
            for number, line in enumerate(file, 1):
                location = f"line {number}"
                if line.strip():
                    yield location, json.loads(line)
    except json.JSONDecodeError as error:
        expected = "one record a line"
        if is_list:
            location, expected = f"line {error.lineno}", "a list of records"
        raise UserError(f"{name}, {location}, column {error.colno}: not valid JSON ({error.msg}); expected {expected}"
                        ) from None
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{name}, in or after {location}: {error}; save or download it again as UTF-8 {kind[1:]}"
                        ) from None


def read_table(file, name, delimiter):
    """Yields (location, {column: text}) for every row but the first, which names the columns."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    columns = next(filter(None, rows), [])
    if len(set(columns)) < len(columns):
        raise UserError(f"{name}, line 1: duplicate column names in {columns}; rename them")
    for row in filter(None, rows):
        if len(row) != len(columns):
            raise UserError(f"{name}, line {rows.line_num}: {len(row)} fields where the header has {len(columns)}; "
                            "quote fields that hold the separator")
        yield f"line {rows.line_num}", dict(zip(columns, row, strict=True))


# ---- fields ---------------------------------------------------------------------------------------------------------

def beginning(value):
    """The first characters of a value of any size and depth, as JSON."""
    return "".join(islice(json.JSONEncoder().iterencode(value), 40))[:40]


def listed(names):
    return ", ".join(repr(name) for name in names) or "none"


def whole(text, name):
    """`text`, if it is one that UTF-8 can hold and tiktoken can cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: half a surrogate pair ({text[error.start]!a}) is no text; repair it") from None
    if len(text) > 100_000 and re.search(r"\s{100000}", text):
        raise UserError(f"{name}: 100,000 characters of white space in a row are too many for the tokenizer; cut them")
    return text


def is_missing(value):
    """Whether a field says that there is nothing: null, an empty text, or the NaN that pandas writes."""
    return value is None or value == "" or value != value


def text_of(fields, key):
    """A field's text. Numbers are written out; anything else is refused by name."""
    if key not in fields:
        raise UserError(f"{key!r} is missing; the fields are {listed(fields)}")
    value = fields[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be text, not {beginning(value)}")
    return whole(value, repr(key))


def fill(template, fields, flag):
    """`template` with every {name} replaced by that field's text, and nothing else; UserError for an unknown name."""
    def value(match):
        if match[1] not in fields:
            raise UserError(f"--{flag} names {{{match[1]}}}; the columns are {', '.join(map(str, fields)) or 'none'}")
        return text_of(fields, match[1])
    return NAME.sub(value, whole(template, f"--{flag}"))


# ---- messages -------------------------------------------------------------------------------------------------------

def to_messages(record, spec, answered=True):
    """A record of any kind as messages; with answered=False it may lack its answer.

    `spec`: template, prompt_format and response_format, as in meta.json and prompt.json.
    """
    if not isinstance(record, dict):
        hint = "; name a file that is one list .json" if isinstance(record, list) else ""
        raise UserError(f"a record is an object with named fields, not {beginning(record)}{hint}")
    if spec["response_format"]:
        return by_formats(record, spec, answered)
    if "messages" in record:
        return conversation(record["messages"], "role", "content")
    if "conversations" in record:
        return conversation(record["conversations"], "from", "value")
    if "text" in record and not {"instruction", *PAIRS} & record.keys():  # Alpaca's own file has its rendering there
        return [("text", {"text": text_of(record, "text")})]
    if "instruction" in record:
        given = "" if is_missing(record.get("input")) else text_of(record, "input")
        messages = [("user", {"content": text_of(record, "instruction"), "input": given})]
        role, key = "assistant", "output"
    elif pair_of(record):
        prompt, key = pair_of(record)
        messages, role = [("prompt", {prompt: text_of(record, prompt)})], "completion"
    else:
        fields = listed(record) if record else "no fields"
        raise UserError(f"unknown kind of record with {fields}: expected instruction and output, prompt and "
                        "completion, messages, conversations or text (the first line of a .csv names them with "
                        "commas, of a .tsv with tabs); for other columns give --prompt_format and --response_format")
    if answered or key in record:
        messages.append((role, {"text": text_of(record, key)}))
    return messages


def pair_of(record):
    """The names of the prompt and of the answer in a record that is such a pair, else None."""
    for prompt, answers in PAIRS.items():
        if prompt in record:
            present = [answer for answer in answers if answer in record]
            return prompt, (present or answers)[0]
    return None


def by_formats(record, spec, answered):
    """A record of any columns, in the words of prompt_format and response_format."""
    if spec["template"] == "text":
        return [("text", {"text": fill(spec["response_format"], record, "response_format")})]
    fill(spec["prompt_format"], record, "prompt_format")  # refuses what it cannot word
    columns = {name: record[name] for name in NAME.findall(spec["prompt_format"])}
    messages = [("prompt", columns)]
    if answered or all(name in record for name in NAME.findall(spec["response_format"])):
        messages.append(("completion", {"text": fill(spec["response_format"], record, "response_format")}))
    return messages


def conversation(turns, role_key, content_key):
    """OpenAI's or ShareGPT's list of turns. A role that is not known is refused: it could forge a turn."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"a conversation is a list of {{{role_key!r}: ..., {content_key!r}: ...}} objects")
    messages = []
    for turn in turns:
        role = text_of(turn, role_key)
        if role not in ROLES:
            raise UserError(f"the role {role!r} is none of system, user, assistant (human, gpt)")
        messages.append((ROLES[role], {"content": text_of(turn, content_key)}))
    return messages


def batched(items, size):
    """Lists of up to `size` of what an iterable yields."""
    items = iter(items)
    return iter(lambda: list(islice(items, size)), [])
