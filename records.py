"""Records of any kind, from .json, .jsonl, .csv or .tsv files, as messages: a list of (role, fields)."""
import csv
import gzip
import hashlib
import http.client
import json
import re
import urllib.parse
import urllib.request
import zlib
from itertools import islice
from pathlib import Path

from console import UserError, status

UNREADABLE = (ValueError, csv.Error, RecursionError, EOFError, gzip.BadGzipFile, zlib.error)  # a damaged file's faults
NAME = re.compile(r"\{([^{}\n\"':]+)\}")  # a field's name in prompt_format and response_format


def fetch(source, directory):
    """(path, name) of the input; a URL is downloaded into `directory` first."""
    if not re.match(r"https?://", source):
        path = Path(source) if source else Path(__file__).parent / "data" / "demo.jsonl"
        if not path.is_file():
            raise UserError(f"--input: {source!r} is {'a directory' if path.is_dir() else 'not there'}; give a file")
        return path, path.name
    name = Path(urllib.request.url2pathname(source.split("?")[0])).name
    path = Path(directory) / "download"
    try:
        with urllib.request.urlopen(urllib.parse.quote(source, safe=":/?&=%#"), timeout=60) as response:
            with open(path, "wb") as file:
                while piece := response.read(1 << 20):
                    file.write(piece)
                    status(f"downloading {name}: {file.tell() / 1e6:.0f} MB")
            if response.length:
                raise OSError("it broke off")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"--input: cannot download {source} ({error}); check the address and try again") from None
    return path, name


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def open_text(path, newline=""):
    """A plain or gzipped file as UTF-8 text without its byte-order mark; with newline=None every line end is \\n."""
    with open(path, "rb") as file:
        opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def read_records(path, name):
    """Yields (place, record) for every record of a .json, .jsonl, .csv or .tsv file; UserError names the bad place."""
    kind = Path(name.removesuffix(".gz")).suffix.lower()
    place = "line 1"
    try:
        with open_text(path) as file:
            if kind in (".csv", ".tsv"):
                csv.field_size_limit(2**31 - 1)
                rows = csv.reader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
                columns = next(filter(None, rows), [])
                if len(set(columns)) < len(columns):
                    raise UserError(f"{name}, line 1: duplicate column names in {columns}; rename them")
                for row in rows:
                    place = f"line {rows.line_num}"
                    if len(row) != len(columns) and row:
                        raise UserError(f"{name}, {place}: {len(row)} fields where the header has {len(columns)}; "
                                        "quote fields that hold the separator")
                    if row:
                        yield place, dict(zip(columns, row, strict=True))
                return
            start = file.read(64).lstrip()[:1]
            file.seek(0)
            if kind == ".json" and start == "[":
                place = "the whole file"
                for number, record in enumerate(json.load(file), 1):
                    yield f"record {number}", record
            else:
                for number, line in enumerate(file, 1):
                    place = f"line {number}"
                    if line.strip():
                        yield place, json.loads(line)
    except json.JSONDecodeError as error:
        where = place if kind == ".jsonl" or place != "the whole file" else f"line {error.lineno}"
        raise UserError(f"{name}, {where}, column {error.colno}: not valid JSON ({error.msg}); expected "
                        + ("a list of records" if place == "the whole file" else "one record a line")) from None
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{name}, in or after {place}: {error}; save or download it again as UTF-8 "
                        f"{kind[1:]}") from None


def beginning(value):
    """The first characters of a value of any size and depth, as JSON."""
    return "".join(islice(json.JSONEncoder().iterencode(value), 40))[:40]


def whole(text, name):
    """`text`, if it is one that UTF-8 can hold and tiktoken can cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: half a surrogate pair ({text[error.start]!a}) is no text; repair it") from None
    if len(text) > 100_000 and re.search(r"\s{100000}", text):
        raise UserError(f"{name}: 100,000 characters of white space in a row are too many for the tokenizer; cut them")
    return text


def text_of(fields, key):
    """A field's text; numbers are written out, and anything else is refused by name."""
    if key not in fields:
        raise UserError(f"{key!r} is missing; the fields are {', '.join(map(repr, fields)) or 'none'}")
    value = fields[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:  # NaN is no text
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key!r} must be text, not {beginning(value)}")
    return whole(value, repr(key))


def fill(template, fields, flag):
    """`template` with every {name} replaced by that field's text and nothing else; UserError for an unknown name."""
    def value(match):
        if match[1] not in fields:
            raise UserError(f"--{flag} names {{{match[1]}}}; the columns are {', '.join(map(str, fields)) or 'none'}")
        return text_of(fields, match[1])
    return NAME.sub(value, whole(template, f"--{flag}"))


def conversation(turns, role_key, content_key):
    """OpenAI's or ShareGPT's list of turns as messages; any role but system, user and assistant is refused."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"a conversation is a list of {{{role_key!r}: ..., {content_key!r}: ...}} objects")
    messages = []
    for turn in turns:
        role = text_of(turn, role_key)
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise UserError(f"the role {role!r} is none of system, user, assistant (human, gpt)")
        messages.append((role, {"content": text_of(turn, content_key)}))
    return messages


def to_messages(record, spec, answered=True):
    """A record of any kind as messages, a list of (role, fields); without `answered` it may lack its answer.

    `spec` holds template, prompt_format and response_format, as meta.json and prompt.json do. Roles are system, user
    and assistant; prompt and completion for what is rendered as it is; text.
    """
    if not isinstance(record, dict):
        raise UserError(f"a record is an object with named fields, not {beginning(record)}"
                        + "; name a file that is one list .json" * isinstance(record, list))
    if spec["response_format"]:
        if spec["template"] == "text":
            return [("text", {"text": fill(spec["response_format"], record, "response_format")})]
        columns = {name: record[name] for name in NAME.findall(spec["prompt_format"]) if name in record}
        fill(spec["prompt_format"], record, "prompt_format")
        if not answered and not all(name in record for name in NAME.findall(spec["response_format"])):
            return [("prompt", columns)]
        return [("prompt", columns), ("completion", {"text": fill(spec["response_format"], record, "response_format")})]
    if "messages" in record:
        return conversation(record["messages"], "role", "content")
    if "conversations" in record:
        return conversation(record["conversations"], "from", "value")
    if "text" in record and not {"instruction", "prompt"} & record.keys():  # Alpaca's own file carries it rendered too
        return [("text", {"text": text_of(record, "text")})]
    if "instruction" in record:
        missing = record.get("input") in (None, "") or record["input"] != record["input"]  # NaN, as pandas writes it
        given = "" if missing else text_of(record, "input")
        messages, answer = [("user", {"content": text_of(record, "instruction"), "input": given})], "output"
    elif "prompt" in record:
        messages, answer = [("prompt", {"prompt": text_of(record, "prompt")})], "completion"
        if answer not in record and "response" in record:
            answer = "response"
    else:
        alone = next(iter(record), "")
        mark = next((mark for mark in ";\t,|" if len(record) == 1 and mark in str(alone)), "")
        raise UserError(f"unknown kind of record with {', '.join(map(repr, record)) or 'no fields'}: " + (
            f"its columns seem to be parted by {mark!r}; save it as .csv with commas, or .tsv with tabs" if mark else
            "expected instruction and output, prompt and completion, messages, conversations or text (a table's first "
            "line names them); for other columns give --prompt_format and --response_format"))
    if answered or answer in record:
        role = "assistant" if messages[0][0] == "user" else "completion"
        messages.append((role, {"text": text_of(record, answer)}))
    return messages
