"""What is malformed ends in one line that names the place and the remedy, and leaves nothing half-written behind.

    FUZZ=50 python -m pytest tests/test_bad_input.py -k fuzz    # fifty times the examples, other ones every time
"""
import gzip
import json
import math
import os
import pickle
import random
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import colour_records, tiny, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_data
import sample
import train
from console import UserError
from dataset import Shards, load_meta
from model import GPT
from prepare_data import PrepareConfig
from sample import SampleConfig
from train import TrainConfig
from weights import read_safetensors, write_safetensors

GONE = object()  # in a change of JSON: the key is deleted


@contextmanager
def refused(message, directory):
    """Within it a UserError or OSError of one line that matches `message`; in the directory nothing comes or goes."""
    before = sorted(directory.rglob("*"))
    with pytest.raises((UserError, OSError), match=message) as caught:
        yield
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert sorted(directory.rglob("*")) == before


def edit(path, **changes):
    """Sets entries of a JSON file; `train__tokens` is the entry tokens of train."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        inner = values
        for key in outer:
            inner = inner[key]
        inner[last] = value
        if value is GONE:
            del inner[last]
    path.write_text(json.dumps(values))


class Evil:
    """Unpickled, it makes a directory."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def evil(save, name):
    """A change that writes a file with a pickle that would run code."""
    def change(directory):
        with open(directory / name, "wb") as file:
            save({"format_version": 1, "wte.weight": Evil()}, file)
    return change


def test_the_evil_pickle_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").is_dir()


def put(name, content):
    """A change that writes this text or these bytes."""
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name, size):
    return lambda directory: os.truncate(directory / name, size)


def gone(name):
    return lambda directory: (directory / name).unlink()


def config_of(name, **changes):
    return lambda directory: edit(directory / name, **changes)


# ---- records --------------------------------------------------------------------------------------------------------

ONE = '{"instruction": "a", "output": "b"}\n'
NOISE = random.Random(0).randbytes(5000)
PACKED = gzip.compress((ONE * 500).encode())
COLUMNS = dict(prompt_format="{title}:", response_format=" {label}")


def turns(*pairs, **more):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs], **more}) + "\n"


# file, its content or what makes it, the message, flags
RECORDS = [
    # cut short, damaged, or nothing at all
    ("cut.json", '[{"instruction": "a", "outp', r"^cut.json, line 1, column 23: not valid JSON .*a list of records$"),
    ("open.json", f"[{ONE}", "^open.json, line 2, column 1: not valid JSON .*expected a list of records$"),
    ("pretty.json", '{\n"instruction": "a"\n}', r"^pretty.json, line 1, column \d: .*expected one record a line$"),
    ("cut.jsonl", ONE + ONE[:20], "^cut.jsonl, line 2, column .*not valid JSON .*expected one record a line$"),
    ("comma.jsonl", ONE + '{"text": "a",}', "line 2, column 14: not valid JSON"),
    ("two.jsonl", ONE + '{"text": "a"} {"text": "b"}', "line 2, column 15: not valid JSON .Extra data"),
    ("control.jsonl", '{"text": "a\0b"}', "line 1, column 12: not valid JSON .Invalid control character"),
    ("nul.jsonl", ONE + "\0\0\0\0\n", "line 2, column 1: not valid JSON"),
    ("nul.json", "[\0]", "line 1, column 2: not valid JSON"),
    ("quotes.jsonl", "{'text': 'a'}", "line 1, column 2: not valid JSON .*double quotes"),
    ("empty.json", "", "^--input: empty.json leaves nothing to train on .it is empty.$"),
    ("empty.jsonl", "", "leaves nothing to train on"), ("empty.csv", "", "leaves nothing to train on"),
    ("empty.txt", "", "leaves nothing to train on"), ("empty.jsonl.gz", "", "leaves nothing to train on"),
    ("blank.jsonl", "\n \n\t\n", "leaves nothing to train on"), ("list.json", "[]", "leaves nothing to train on"),
    ("bom.jsonl", "\ufeff", "leaves nothing to train on"), ("header.csv", "text,b\n", "leaves nothing to train on"),
    ("utf16.jsonl", ONE.encode("utf-16"), "utf16.jsonl, in or after line 1: .*0xff.*again as UTF-8 jsonl"),
    ("latin1.csv", b"text\ncaf\xe9\n", "latin1.csv, in or after line 1: .*0xe9.*again as UTF-8 csv"),
    ("latin1.json", b'[{"text": "caf\xe9"}]', "latin1.json, in or after line 1: .*0xe9.*again as UTF-8 json"),
    ("later.json", b"[" + b" " * 9000 + b'"caf\xe9"]', "later.json, in or after .*0xe9.*again as UTF-8 json"),
    ("latin1.txt", b"caf\xe9", "latin1.txt: .*0xe9.*save or download it again as UTF-8 text"),
    ("noise.jsonl", NOISE, "noise.jsonl, in or after line 1: .*UTF-8 jsonl"),
    ("noise.csv", NOISE, "noise.csv, .*UTF-8"),
    ("noise.json", NOISE, "noise.json, .*again as UTF-8 json"),
    ("noise.txt", NOISE, "noise.txt: .*again as UTF-8 text"),
    ("noise.jsonl.gz", NOISE, "noise.jsonl.gz, .*again as UTF-8 jsonl"),
    ("noise.gz", NOISE, "noise.gz is none of .json"),
    ("cut.jsonl.gz", PACKED[:-9], "cut.jsonl.gz, in or after line .*ended before.*download it again"),
    ("cut.csv.gz", PACKED[:30], "cut.csv.gz, .*download it again"), ("cut.txt.gz", PACKED[:30], "cut.txt.gz: .*again"),
    ("two.txt.gz", b"\x1f\x8b", "two.txt.gz: .*ended.*download it again"),
    ("sum.jsonl.gz", PACKED[:-8] + bytes(8), "sum.jsonl.gz, .*CRC check failed.*download it again"),
    ("method.txt.gz", PACKED[:2] + b"\7" + PACKED[3:], "method.txt.gz: .*compression method.*download it again"),
    ("deep.json", "[" * 100_000, "deep.json, .*recursion.*again as UTF-8 json"),
    ("deep.jsonl", ONE + '{"text": ' * 50_000, "deep.jsonl, in or after line 2: .*recursion"),
    ("digits.jsonl", '{"text": ' + "9" * 5000 + "}", "digits.jsonl, in or after line 1: Exceeds the limit"),
    ("long.jsonl", lambda: ONE + '{"instruction": "' + "x" * 50_000_000,
     "long.jsonl, line 2, column 17: .*Unterminated"),
    ("long.json", lambda: "x" * 50_000_000, "long.json, line 1, column 1: not valid JSON"),
    ("long.csv", lambda: "x" * 50_000_000 + ",b\n1,2\n", "long.csv, line 2: unknown kind of record with 'xxx.* xxx"),
    ("key.jsonl", lambda: '{"' + "k" * 50_000_000 + '": 1}',
     "line 1: unknown kind .*--prompt_format and --response_format$"),
    ("field.jsonl", lambda: '{"text": ["' + "y" * 50_000_000 + '"]}', """'text' must be text, not ."y{38}$"""),
    # not what a record is
    ("number.json", "3", "^number.json, line 1: a record is an object with named fields, not 3$"),
    ("null.jsonl", ONE + "null", "line 2: a record is an object with named fields, not null"),
    ("string.json", '["text"]', '^string.json, record 1: a record is an object with named fields, not "text"$'),
    *((f"white.{kind}", text, "white.*: 100,000 characters of white space in a row are too many for the tokenizer")
      for kind, text in (("txt", "a" + " \n" * 100_000 + "b"),
                         ("jsonl", json.dumps({"prompt": "a" + " " * 200_000, "completion": "b"})))),
    ("lists.jsonl", "[" * 500 + "]" * 500,
     r"a record is an object with named fields, not \[{40}; name a file that is one list .json$"),
    ("margin.jsonl", '{"text": ' + "[" * 850 + "]" * 850 + "}", r"line 1: 'text' must be text, not \[{40}$"),
    ("none.jsonl", "{}", "line 1: unknown kind of record with no fields: expected instruction and output, .*"),
    ("unknown.jsonl", '{"question": "a"}', "line 1: unknown kind of record with 'question': .*give --prompt_format"),
    ("wrapped.json", f'{{"data": [{ONE.strip()}]}}', "line 1: unknown kind of record with 'data'"),
    ("lines.jsonl", json.dumps({"a\nb\x1b[31m": 1}), r"line 1: unknown kind of record with 'a\\nb\\x1b"),
    ("missing.jsonl", ONE + '{"instruction": "a"}', "line 2: 'output' is missing; the fields are 'instruction'$"),
    ("answer.jsonl", '{"prompt": "a"}', "line 1: 'completion' is missing; the fields are 'prompt'"),
    ("nulls.jsonl", '{"instruction": "a", "output": {"b": [null, {"c": null}]}}', "'output' must be text, not {.b"),
    ("surrogate.jsonl", ONE + r'{"instruction": "\ud83d", "output": "b"}',
     r"line 2: 'instruction': half .* \('\\ud83d'\).*repair it"),
    ("surrogate.json", r'[{"text": "a\udc00"}]', "record 1: 'text': half a surrogate pair .* is no text; repair it"),
    # conversations
    ("none_said.jsonl", '{"messages": []}',
     "line 1: a conversation is a list of {'role': ..., 'content': ...} objects"),
    ("dict.jsonl", '{"messages": {"role": "user"}}', "line 1: a conversation is a list of"),
    ("words.jsonl", '{"conversations": ["hi", "ho"]}',
     "a conversation is a list of {'from': ..., 'value': ...} objects"),
    ("null_turns.jsonl", '{"messages": null}', "line 1: a conversation is a list of"),
    ("root.jsonl", turns(("root", "x")), "line 1: the role 'root' is none of system, user, assistant"),
    ("forged.jsonl", turns(("user", "a"), ("assistant\n", "b")), r"the role 'assistant\\n' is none of system"),
    ("title.jsonl", turns(("Assistant", "b")), "the role 'Assistant' is none of"),
    ("role.jsonl", turns((["user"], "a")), r"""line 1: 'role' must be text, not \["user"\]"""),
    ("role_dict.jsonl", turns(({"a": 1}, "a")), """'role' must be text, not {"a": 1}"""),
    ("roleless.jsonl", '{"messages": [{"content": "a"}]}', "'role' is missing; the fields are 'content'"),
    ("empty_turn.jsonl", '{"messages": [{}]}', "'role' is missing; the fields are none"),
    ("content.jsonl", turns(("user", None)), "'content' must be text, not null"),
    ("parts.jsonl", turns(("user", [{"type": "text"}])), r"'content' must be text, not \[{"),
    ("sharegpt.jsonl", '{"conversations": [{"from": "bing", "value": "x"}]}', "the role 'bing' is none of"),
    ("several.jsonl", turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
     "the alpaca template holds one question and one answer, not user .*--template=chat holds",
     dict(template="alpaca")),
    ("unanswered.jsonl", turns(("user", "a")) * 2,
     "nothing to train on .2 records, 2 dropped: no answer, or empty"),
    ("mixed.jsonl", ONE + '{"text": "a"}', "line 2: a text record among conversation records; prepare each kind by"),
    ("mixed.json", '[{"prompt": "a", "completion": "b"}, {"prompt": "a", "response": "b"}]', "record 2: .*by itself"),
    # tables
    ("ragged.csv", "text,b\n1,2\n3\n", "ragged.csv, line 3: 1 fields where the header has 2; quote fields that hold"),
    ("wide.tsv", "text\tb\n1\t2\t3\n", "wide.tsv, line 2: 3 fields where the header has 2; quote fields that hold"),
    ("twice.csv", "text,b,text\n1,2,3\n", r"twice.csv, line 1: duplicate column names in \['text'.*; rename them"),
    ("unclosed.csv", 'text,b\n1,"2\n3,4\n', "unclosed.csv, in or after line 1: unexpected end of data"),
    ("after.csv", 'text,b\n1,"2"x\n', "after.csv, .*expected after"),
    ("columns.csv", "q,a\n1,2\n", "columns.csv, line 2: unknown kind of record with 'q', 'a'.*give --prompt_format"),
    # formats
    ("one.csv", "title,text\n1,2\n", "line 2: --response_format names {label}; the columns are title, text", COLUMNS),
    ("other.csv", "label,text\n1,2\n", "line 2: --prompt_format names {title}; the columns are label, text", COLUMNS),
    ("newline.csv", '"a\nb",c\n1,2\n', "line 3: --prompt_format names {title}; the columns are a b, c$", COLUMNS),
    ("no_columns.jsonl", "{}", "line 1: --prompt_format names {title}; the columns are none", COLUMNS),
    ("column.jsonl", '{"title": null, "label": "a"}', "line 1: 'title' must be text, not null", COLUMNS),
    ("label.jsonl", '{"title": "a", "label": {"b": null}}', "line 1: 'label' must be text, not {", COLUMNS),
    ("format.jsonl", ONE, "--response_format: needed with --prompt_format", dict(prompt_format="{a}")),
    ("instructions.jsonl", ONE, "--template=text holds records with 'text'", dict(template="text")),
    ("unicode.jsonl", ONE, r"--prompt_format: half a surrogate pair \('\\udce9'\)",
     dict(prompt_format="\udce9", response_format="b")),
    ("encoding.jsonl", ONE, "encoding='klingon' is none of bytes, gpt2", dict(encoding="klingon")),
    ("suffix.parquet", ONE, "--input: suffix.parquet is none of .json .jsonl .csv .tsv .txt.*save it so"),
]


def prepared(path, out_dir, **flags):
    return prepare_data.main(PrepareConfig(**{**dict(input=str(path), out_dir=str(out_dir), encoding="bytes", show=0,
                                                     val_fraction=0, test_fraction=0, template="chat"), **flags}))


@pytest.mark.parametrize("name, content, message, flags", [(*case, {})[:4] for case in RECORDS],
                         ids=[case[0] for case in RECORDS])
def test_records(name, content, message, flags, tmp_path):
    content = content() if callable(content) else content
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(message, tmp_path):
        prepared(tmp_path / name, tmp_path / "data", **flags)


KINDS = [({"instruction": "a", "input": "b", "output": "c"}, "instruction input output"),
         ({"prompt": "a", "completion": "b"}, "prompt completion"), ({"prompt": "a", "response": "b"}, "response"),
         ({"text": "a"}, "text")]


@pytest.mark.parametrize("record, field", [(record, field) for record, fields in KINDS for field in fields.split()])
@pytest.mark.parametrize("value", [None, True, [], {}, ["a"], {"a": None}, math.nan], ids=repr)
def test_a_field_that_is_no_text(record, field, value, tmp_path):
    if field == "input" and (value is None or value != value):
        return  # says that there is none
    write_lines(tmp_path / "a.jsonl", [record, {**record, field: value}])
    with refused(f"^a.jsonl, line 2: '{field}' must be text, not [nt{{\\[N]", tmp_path):
        prepared(tmp_path / "a.jsonl", tmp_path / "data")


def test_places_that_are_no_place_for_it(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", colour_records(3))
    for name in ("directory.jsonl", "foreign", "alone"):
        (tmp_path / name).mkdir()
    alone = write_lines(tmp_path / "alone" / "test.jsonl", colour_records(3))
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    for path, out_dir, message in (
            (tmp_path / "directory.jsonl", "data", "directory.jsonl' is a directory; give a file"),
            (tmp_path / "nothing.jsonl", "data", "nothing.jsonl' is not there; give a file"),
            ("no\0where.jsonl", "data", "is not there; give a file"),
            (source, "a.jsonl", "--out_dir=.*a.jsonl is a file; name a directory"),
            (alone, "alone", "--out_dir=.*alone holds --input itself and is written anew; name another directory"),
            (source, "a.jsonl/data", "Not a directory|File exists"),
            (source, "foreign", r"holds files that are not ours \(thesis.tex\); name another")):
        with refused(message, tmp_path):
            prepared(path, tmp_path / out_dir)


def test_files_that_come_while_preparing_stay(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "a.jsonl", colour_records(3))
    prepared(source, tmp_path / "data")
    publish = prepare_data.publish
    def late(work, out_dir):
        (out_dir / "thesis.tex").write_text("years of work")
        publish(work, out_dir)
    monkeypatch.setattr(prepare_data, "publish", late)
    prepared(source, tmp_path / "data", block_size=200)
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"
    assert load_meta(tmp_path / "data")["block_size"] == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "data"]


# ---- shards and meta.json -------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    prepared(write_lines(path / "a.jsonl", colour_records(40)), path / "prepared", val_fraction=0.2, block_size=128)
    return path / "prepared"


def shard(change, split="train"):
    """A change that puts change(tokens) in a shard's place."""
    def rewrite(directory):
        tokens = change(np.load(directory / f"{split}_00000.npy"))
        np.save(directory / f"{split}_00000.npy", tokens, allow_pickle=True)
    return rewrite


def token(place, field, value):
    def change(tokens):
        tokens[field][place] = value
        return tokens
    return change


def header(text, size=118):
    """A shard with this header."""
    head = size.to_bytes(2, "little") + text.encode().ljust(size)
    return put("train_00000.npy", b"\x93NUMPY\1\0" + head + bytes(900))


def meta(**changes):
    return config_of("meta.json", **changes)


AGAIN = ".*run prepare_data.py again$"
DISAGREE = r"prepared-copy: the train shards and meta.json disagree, [\d,]+ against [\d,]+ "
LOST = "train_00000.npy is damaged .*"
# what is wrong, what makes it so, the message
DATA = [
    ("id past the vocabulary", shard(token(7, "id", 257)), LOST + "token id 257 is past a vocabulary of 257" + AGAIN),
    ("largest id", shard(token(-1, "id", 65535), "val"),
     "val_00000.npy is damaged .the token id 65535 is past" + AGAIN),
    ("unknown flags", shard(token(3, "flags", 4)), LOST + "4 are no flags of a token" + AGAIN),
    ("all flags", shard(token(3, "flags", 255)), LOST + "255 are no flags of a token" + AGAIN),
    ("no start", shard(token(0, "flags", 0)), LOST + "does not begin with an example" + AGAIN),
    ("one start more", shard(token(4, "flags", 2)), DISAGREE + "examples" + AGAIN),
    ("one supervised more", shard(token(2, "flags", 1)), DISAGREE + "supervised_tokens" + AGAIN),
    ("fewer tokens", shard(lambda tokens: tokens[:-1]), DISAGREE + "tokens" + AGAIN),
    ("no tokens", shard(lambda tokens: tokens[:0]), LOST + "does not begin with an example" + AGAIN),
    ("cut short", cut("train_00000.npy", 900), LOST + "greater than file size" + AGAIN),
    ("header cut short", cut("train_00000.npy", 60), LOST + AGAIN), ("empty", cut("train_00000.npy", 0), LOST + AGAIN),
    ("missing", gone("train_00000.npy"), "train_00000.npy is missing: run prepare_data.py again"),
    ("missing, of val", gone("val_00000.npy"), "val_00000.npy is missing: run prepare_data.py again"),
    ("floats", shard(lambda tokens: tokens["id"].astype(np.float32)), LOST + "it holds float32 of shape" + AGAIN),
    ("wider", shard(lambda tokens: tokens.astype([("id", "<i8"), ("flags", "u1")])), LOST + "it holds .*i8" + AGAIN),
    ("big-endian", shard(lambda tokens: tokens.astype([("id", ">u2"), ("flags", "u1")])),
     LOST + "it holds .*>u2" + AGAIN),
    ("other names", shard(lambda tokens: tokens.astype([("x", "<u2"), ("flags", "u1")], copy=True)), LOST + AGAIN),
    ("two dimensions", shard(lambda tokens: tokens[None]), LOST + r"of shape \(1, \d+\), no tokens" + AGAIN),
    ("no dimension", shard(lambda tokens: tokens[0]), LOST + r"of shape \(\), no tokens" + AGAIN),
    ("objects", shard(lambda tokens: np.array([Evil()])), LOST + "Python objects in dtype" + AGAIN),
    ("a pickle", evil(pickle.dump, "train_00000.npy"), LOST + AGAIN),
    ("a zip", put("train_00000.npy", b"PK\x03\x04" + bytes(100)), LOST + "magic string" + AGAIN),
    ("an .npz", lambda path: np.savez(open(path / "train_00000.npy", "wb"), a=np.arange(3)), LOST + "magic" + AGAIN),
    ("text", put("train_00000.npy", "id,flags\n1,2\n"), LOST + "magic string" + AGAIN),
    ("header of nothing", header(""), LOST + AGAIN),
    ("header with an open string", header("{'descr': '''"), LOST + AGAIN),
    ("header with a set", header("{[]: 1}"), LOST + AGAIN), ("header of brackets", header("(" * 118), LOST + AGAIN),
    ("header too large", header("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999,)}"),
     LOST + AGAIN),
    ("header below zero", header("{'descr': '|u1', 'fortran_order': False, 'shape': (-9,)}"), LOST + AGAIN),
    ("header of a code", header("{'descr': __import__('os').mkdir('executed'), 'shape': 1}"), LOST + AGAIN),
    ("shard is a directory", lambda path: ((path / "train_00000.npy").unlink(), (path / "train_00000.npy").mkdir()),
     "train_00000.npy is missing" + AGAIN),
    ("meta.json missing", gone("meta.json"), "--data_dir: no prepared data in .*; run python prepare_data.py first"),
    ("meta.json of another version", meta(format_version=2), "has format 2, this program reads 1; run prepare_data.py"),
    ("meta.json without version", meta(format_version=GONE), "meta.json is damaged; run prepare_data.py again"),
    ("meta.json empty", put("meta.json", ""), "meta.json is damaged; run prepare_data.py again"),
    ("meta.json cut", cut("meta.json", 99), "meta.json is damaged; run prepare_data.py again"),
    ("meta.json a list", put("meta.json", "[1]"), "meta.json is damaged; run prepare_data.py again"),
    ("meta.json deep", put("meta.json", "[" * 100_000), "meta.json is damaged; run prepare_data.py again"),
    ("meta.json no UTF-8", put("meta.json", b"\xff\xfe{}"), "meta.json is damaged; run prepare_data.py again"),
    *((f"meta.json without {name}", meta(**{name: GONE}),
       f"meta.json is damaged: {name.replace('__', '.')} is None" + AGAIN)
      for name in ("encoding", "vocab_size", "block_size", "prompt", "train", "val__shards", "train__longest",
                   "val__tokens", "train__supervised_tokens", "prompt__template", "source_sha256")),
    *((f"meta.json with {name}={value!r}", meta(**{name: value}),
       f"meta.json is damaged: {name.replace('__', '.')} is .*" + AGAIN)
      for name, value in (
          ("train__examples", "9"), ("train__tokens", 9.5), ("val__longest", None), ("vocab_size", True),
          ("val__supervised_tokens", [1]), ("train__shards", {"a": 1}), ("train__shards", [3]), ("prompt", "chat"),
          ("prompt__template", 4), ("encoding", ["bytes"]), ("train", []))),
    ("meta.json with a false count", meta(train__tokens=10**30), DISAGREE + "tokens" + AGAIN),
    ("meta.json without shards", meta(train__shards=[]), DISAGREE + "examples" + AGAIN),
    ("meta.json with nothing",
     meta(train={"examples": 0, "tokens": 0, "supervised_tokens": 0, "longest": 0, "shards": []}),
     "the train split has no examples" + AGAIN),
    ("meta.json with a shard twice", meta(train__shards=["train_00000.npy"] * 2),
     "damaged: train.shards is .*" + AGAIN),
    ("meta.json with a strange name", meta(train__shards=["a\0b"]), "damaged: train.shards is .'a.x00b'.;" + AGAIN),
    ("meta.json with a long name", meta(val__shards=["[" * 4000]), "damaged: val.shards is .*" + AGAIN),
    ("meta.json with another place", meta(val__shards=["../val_00000.npy"]), "damaged: val.shards is .*" + AGAIN),
    ("meta.json with short blocks", meta(block_size=9), "examples, or some that are no 2 to 10 tokens long" + AGAIN),
    ("meta.json with too many ids", meta(vocab_size=10**12),
     "vocab_size is 1000000000000, bytes has 257 tokens" + AGAIN),
    ("meta.json with another encoding", meta(encoding="klingon"),
     "meta.json: encoding='klingon' is none of bytes, gpt2"),
]


def training(data_dir, out_dir, **flags):
    return train.main(TrainConfig(data_dir=str(data_dir), out_dir=str(out_dir), **{**dict(
        n_layer=1, n_head=1, n_embd=8, device="cpu", dtype="float32", compile="off", max_steps=1, hardest=0), **flags}))


@pytest.mark.parametrize("change, message", [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_prepared_data(change, message, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "prepared-copy")
    change(tmp_path / "prepared-copy")
    with refused(message, tmp_path):
        training(tmp_path / "prepared-copy", tmp_path / "out")


def test_a_shard_is_checked_in_parts(tmp_path):
    """As a whole and in parts of any size the answers are the same, the bad token found wherever it stands."""
    tokens = np.zeros(1000, [("id", "<u2"), ("flags", "u1")])
    tokens["flags"][::7], tokens["flags"][3::7] = prepare_data.START, prepare_data.SUPERVISED
    np.save(tmp_path / "a.npy", tokens)
    for size in (1, 7, 999, 1000, 1 << 20):
        _, starts, supervised = Shards.read(tmp_path / "a.npy", 257, size)
        assert starts.tolist() == list(range(0, 1000, 7)) and supervised == 143
    for place in (0, 998, 999):
        tokens["id"], tokens["id"][place] = 256, 300
        np.save(tmp_path / "a.npy", tokens)
        with pytest.raises(UserError, match="token id 300"):
            Shards.read(tmp_path / "a.npy", 257, 111)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("run") / "out"
    training(data, out_dir)
    return out_dir


def state(**changes):
    """A change of entries in ckpt.pt."""
    def change(directory):
        values = torch.load(directory / "ckpt.pt", weights_only=True)
        for name, value in changes.items():
            values[name] = value(values[name]) if callable(value) else value
            if value is GONE:
                del values[name]
        torch.save(values, directory / "ckpt.pt")
    return change


ANEW = ".*; start anew with --overwrite, or from its weights with --init_from="
CHECKPOINTS = [
    ("cut short", cut("ckpt.pt", 3000), "ckpt.pt cannot be read" + ANEW),
    ("cut to its first byte", cut("ckpt.pt", 1), "ckpt.pt cannot be read" + ANEW),
    ("empty", cut("ckpt.pt", 0), "ckpt.pt cannot be read" + ANEW),
    ("text", put("ckpt.pt", "step 3, loss 2.5\n"), "ckpt.pt cannot be read" + ANEW),
    ("noise", put("ckpt.pt", NOISE), "ckpt.pt cannot be read" + ANEW),
    ("a pickle that runs code", evil(pickle.dump, "ckpt.pt"), r"ckpt.pt cannot be read \(UnpicklingError\)" + ANEW),
    ("torch's pickle that runs code", evil(torch.save, "ckpt.pt"),
     r"ckpt.pt cannot be read \(UnpicklingError\)" + ANEW),
    ("a list", lambda path: torch.save([1, 2], path / "ckpt.pt"), "ckpt.pt cannot be read" + ANEW),
    ("a tensor", lambda path: torch.save(torch.ones(3), path / "ckpt.pt"), "ckpt.pt cannot be read" + ANEW),
    ("another version", state(format_version=2), "ckpt.pt has format 2, this program reads 1" + ANEW),
    *((f"without {name}", state(**{name: GONE}), rf"ckpt.pt is damaged \({name}\)" + ANEW)
      for name in ("step", "config", "data", "model_config", "dtype", "model", "optimizer", "crc", "base")),
    ("a step that is none", state(step="3"), r"ckpt.pt is damaged \(step\)" + ANEW),
    ("two wrong entries", state(model=[], elapsed=None), r"ckpt.pt is damaged \(model, elapsed\)" + ANEW),
    ("a flag from the future", state(config=lambda config: {**config, "warp": 9}),
     r"flags that .* lacks \(warp\)" + ANEW),
    *((f"a model_config of {change}", state(model_config=lambda old, change=change: {**old, **change}),
       r"ckpt.pt is damaged \(" + what + ANEW)
      for change, what in (({"n_layers": 3}, "model_config"), ({"n_embd": 64}, "its states do not fit"))),
    *((f"a model of {what}", state(model=change), r"ckpt.pt is damaged \(its states do not fit its model\)" + ANEW)
      for what, change in (
          ("no weights", {}), ("another shape", lambda model: {**model, "wte.weight": torch.ones(2, 2)}),
          ("another layer", lambda model: {**model, "h.9.ln_1.weight": torch.ones(2)}))),
    *((f"an optimizer of {what}", state(optimizer=change), r"ckpt.pt is damaged \(its states do not fit its" + ANEW)
      for what, change in (("nothing", {}), (
          "numbers", lambda old: {**old, "state": {0: 3}}), ("no moments", lambda old: {**old, "state": {0: {}}}), (
          "other shapes", lambda old: {**old, "state": {0: {**old["state"][0], "exp_avg": torch.ones(3)}}}))),
    *((f"a damaged {what} {n}", state(**{what: change}), rf"ckpt.pt is damaged \({what}\)" + ANEW)
      for n, (what, change) in enumerate((
          ("dtype", "text"), ("base", {}), ("base", {"name": 3}), ("step", -1), *(
              ("config", lambda old, change=change: {**old, **change})
              for change in ({"batch_size": "text"}, {"max_minutes": {}}, {"epochs": None})), *(
              ("model_config", lambda old, change=change: {**old, **change})
              for change in ({"n_head": "4"}, {"n_head": 0}, {"n_layer": -1}, {"dropout": "text"}))))),
    ("a seed out of range", state(config=lambda old: {**old, "seed": 10**15}), "--seed: 1000000000000000 is no number"),
    ("missing", gone("ckpt.pt"), "--resume: .*ckpt.pt is not there; name the run's --out_dir"),
    ("the log of another kind", put("log.csv", "step;loss\n1;2\n"), "log.csv is not as train.py wrote it: put it back"),
    ("the log of letters", put("log.csv", "step,epoch\nx,1\n"), "log.csv is not as train.py wrote it: put it back"),
    ("the log in bytes", put("log.csv", b"step\n\xff\xfe\n"), "log.csv is not as train.py wrote it: put it back"),
]


@pytest.mark.parametrize("change, message", [case[1:] for case in CHECKPOINTS], ids=[case[0] for case in CHECKPOINTS])
def test_checkpoints(change, message, data, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "out")
    change(tmp_path / "out")
    with refused(message, tmp_path):
        train.main(TrainConfig(data_dir=str(data), out_dir=str(tmp_path / "out"), resume=True))


# ---- weights --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model of train.py's, with its wording."""
    path = tmp_path_factory.mktemp("model")
    tiny(n_layer=1, n_embd=8, n_head=2, block_size=512).save_pretrained(path)
    (path / "prompt.json").write_text(json.dumps(dict(template="chat", prompt_format="", response_format="",
                                                      encoding="bytes")))
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(entries, data=bytes(8), length=None):
    """A safetensors file with this header, as text or as entries."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return put("model.safetensors", (length if length is not None else len(text)).to_bytes(8, "little") + text + data)


def tensors(alone=True, **changes):
    """A safetensors file of these tensors and nothing else; without config.json, if that is `alone`."""
    def change(directory):
        write_safetensors(directory / "model.safetensors", {name.replace("__", "."): x for name, x in changes.items()})
        if alone:
            (directory / "config.json").unlink()
    return change


def binary(state):
    """These contents as pytorch_model.bin in place of model.safetensors."""
    def change(directory):
        (directory / "model.safetensors").unlink()
        state(directory) if callable(state) else torch.save(state, directory / "pytorch_model.bin")
    return change


def config(**changes):
    return config_of("config.json", **changes)


FALSE = "model.safetensors is no valid safetensors file .*"
ELSE = ".*; download or write it again$"
NO_CONFIG = "config.json is no GPT-2 configuration: "
W, P = torch.zeros(257, 64), torch.zeros(16, 64)
WEIGHTS = [
    ("three bytes", put("model.safetensors", b"\1\2\3"), FALSE + "header is longer than the file" + ELSE),
    ("empty", put("model.safetensors", b""), FALSE + "header is longer than the file" + ELSE),
    ("header past the end", raw({"a": ENTRY}, length=5000), FALSE + "header is longer than the file" + ELSE),
    ("header of 2^63", raw({"a": ENTRY}, length=2**63), FALSE + "header is longer than the file" + ELSE),
    ("header too short", raw({"a": ENTRY}, length=9), FALSE + ELSE), ("header of 0", raw({}, length=0), FALSE + ELSE),
    ("header no JSON", raw("{not json"), FALSE + "Expecting property name" + ELSE),
    ("header a list", raw("[1]"), FALSE + ELSE),
    ("header deep", raw("[" * 100_000), FALSE + "recursion" + ELSE), ("header null", raw("null"), FALSE + ELSE),
    ("entry no object", raw({"a": 3}), FALSE + ELSE),
    ("entry lacks its place", raw({"a": {"dtype": "F32"}}), FALSE + ELSE),
    ("names twice", raw('{"a": 1, "a": 1}'), FALSE + "holds a name twice" + ELSE),
    ("overlap", raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),
     FALSE + "b has a false offset" + ELSE),
    ("gap", raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)),
     FALSE + "b has a false offset" + ELSE),
    ("gap before", raw({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), FALSE + "a has a false offset" + ELSE),
    ("negative offset", raw({"a": {**ENTRY, "data_offsets": [-8, 0]}}), FALSE + "a has a negative size" + ELSE),
    ("negative shape", raw({"a": {**ENTRY, "shape": [-1, -2]}}), FALSE + "a has a negative size" + ELSE),
    ("shape of floats", raw({"a": {**ENTRY, "shape": [2.0]}}), FALSE + "a has a negative size" + ELSE),
    ("shape of true", raw({"a": {**ENTRY, "shape": [True, 2]}}), FALSE + "a has a negative size" + ELSE),
    ("shape too large", raw({"a": {**ENTRY, "shape": [3]}}), FALSE + "a has a false offset" + ELSE),
    ("shape of 2^80", raw({"a": {**ENTRY, "shape": [2**40, 2**40]}}), FALSE + "a has a false offset" + ELSE),
    ("nothing times 2^80", raw({"a": {"dtype": "F32", "shape": [0, 2**62, 2**18], "data_offsets": [0, 0]}}, b""),
     FALSE + ELSE + "|wpe.weight"),
    ("nothing times 10^30", raw({"a": {"dtype": "F32", "shape": [0, 10**30], "data_offsets": [0, 0]}}, b""),
     FALSE + ELSE),
    ("unknown dtype", raw({"a": {**ENTRY, "dtype": "F33"}}), FALSE + "a is of the unknown dtype F33" + ELSE),
    ("dtype a list", raw({"a": {**ENTRY, "dtype": ["F32"]}}), FALSE + ELSE),
    ("data cut short", raw({"a": ENTRY}, bytes(7)), FALSE + "it ends before a does" + ELSE),
    ("trailing bytes", raw({"a": ENTRY}, bytes(9)), FALSE + "holds more than its header says" + ELSE),
    ("really cut short", cut("model.safetensors", 3000), FALSE + "it ends before" + ELSE),
    ("tensors of another model", raw({"a": ENTRY}),
     "model.safetensors does not fit config.json: a is .*no such tensor"),
    ("one name in two spellings", tensors(False, wte__weight=W, transformer__wte__weight=W),
     "holds wte.weight twice, once as transformer.wte.weight" + ELSE),
    ("a matrix of three dimensions", tensors(False, h__0__mlp__c_fc__weight=torch.zeros(2, 2, 2)),
     "does not fit config.json"),
    ("alone: no GPT-2", tensors(a=W), r"model.safetensors holds no GPT-2: expected .* wte.weight"),
    ("alone: a vector", tensors(wte__weight=W[0], wpe__weight=P), "holds no GPT-2: expected the matrices wte.weight"),
    ("alone: a number", tensors(wte__weight=W, wpe__weight=P[0, 0]),
     "holds no GPT-2: expected the matrices wte.weight"),
    ("alone: a layer x", tensors(wte__weight=W, wpe__weight=P, h__x__a=P), "holds no GPT-2: expected .*layers h.0"),
    ("alone: no layer", tensors(wte__weight=W, wpe__weight=P), "no GPT-2 configuration: n_layer is 0" + ELSE),
    ("alone: layer 10^7", tensors(wte__weight=W, wpe__weight=P, h__9999999__a=P),
     "does not fit config.json: .* is missing"),
    ("alone: layer 10^30", tensors(wte__weight=W, wpe__weight=P, **{f"h__{10**30}__a": P}),
     "n_layer is 1000000" + ELSE),
    ("alone: no width", tensors(wte__weight=W[:, :0], wpe__weight=P, h__0__a=P),
     "no GPT-2 configuration: n_head is 0" + ELSE),
    ("alone: odd width", tensors(wte__weight=W[:, :40], wpe__weight=P, h__0__a=P),
     "n_embd=40 is no multiple of 64; put"),
    ("config.json no JSON", put("config.json", "{"), "config.json is no JSON object; download or write it again"),
    ("config.json a list", put("config.json", "[]"), "config.json is no JSON object; download or write it again"),
    ("config.json deep", put("config.json", "[" * 100_000),
     "config.json is no JSON object; download or write it again"),
    ("config.json noise", put("config.json", NOISE), "config.json is no JSON object; download or write it again"),
    ("config.json empty", put("config.json", "{}"), NO_CONFIG + "n_layer is None" + ELSE),
    *((f"config.json without {name}", config(**{name: GONE}), NO_CONFIG + f"{name} is None" + ELSE)
      for name in ("n_layer", "n_head", "n_embd")),
    *((f"config.json with {name}={value!r}", config(**{name: value}), NO_CONFIG + f"{key} is .*" + ELSE)
      for name, key, value in (("n_layer", "n_layer", -1), ("n_layer", "n_layer", 10**18), ("n_layer", "n_layer", True),
                               ("n_head", "n_head", 0), ("n_embd", "n_embd", 10**30), ("n_embd", "n_embd", 8.0),
                               ("vocab_size", "vocab_size", "257"), ("n_positions", "block_size", [512]))),
    ("config.json with more layers", config(n_layer=3), "does not fit config.json: h.1.* is missing, expected"),
    ("config.json with 10^7 layers", config(n_layer=10**7), "does not fit config.json: h.1.* is missing, expected"),
    ("config.json wider", config(n_embd=16),
     r"does not fit config.json: h.0.* is \(24,\), expected \(48,\); this is no"),
    ("config.json much wider", config(n_embd=10**7), r"does not fit config.json: h.0.* is \(24,\), expected"),
    ("config.json with 3 heads", config(n_head=3), "config.json: n_embd=8 is no multiple of n_head=3; correct it"),
    ("config.json of another kind", config(model_type="llama"),
     "model_type is 'llama'; only GPT-2's own 'gpt2'.*take a"),
    ("config.json with ReLU", config(activation_function=["relu"]),
     "activation_function is .*only GPT-2's own.*take a"),
    (".bin that runs code", binary(evil(torch.save, "pytorch_model.bin")),
     "holds no plain tensors .*use the model's .safe"),
    (".bin that is a pickle", binary(evil(pickle.dump, "pytorch_model.bin")),
     "holds no plain tensors .*use the model's"),
    (".bin empty", binary(put("pytorch_model.bin", b"")), "holds no plain tensors .*use the model's .safetensors"),
    (".bin text", binary(put("pytorch_model.bin", "version https://git-lfs")),
     "holds no plain tensors .*use the model's"),
    (".bin noise", binary(put("pytorch_model.bin", NOISE)), "holds no plain tensors .*use the model's .safetensors"),
    (".bin a list", binary([W, P]),
     "pytorch_model.bin holds no state dict of tensors; expected GPT-2's weights by name"),
    (".bin of numbers", binary({"wte.weight": 3}), "holds no state dict of tensors; expected GPT-2's weights by name"),
    (".bin by number", binary({1: W, 2: P}), "holds no state dict of tensors; expected GPT-2's weights by name"),
    (".bin of half a model", binary({"wte.weight": W}), "does not fit config.json: h.0.* is missing, expected"),
    ("nothing", gone("model.safetensors"),
     "holds neither model.safetensors nor pytorch_model.bin nor adapter_config.json"),
]


@pytest.mark.parametrize("change, message", [case[1:] for case in WEIGHTS], ids=[case[0] for case in WEIGHTS])
def test_weights(change, message, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights, tmp_path / "model")
    change(tmp_path / "model")
    with refused(message, tmp_path):
        GPT.from_pretrained(tmp_path / "model")


ARGS = {"block_size": 16, "vocab_size": 257, "n_layer": 1, "n_head": 1, "n_embd": 64}
NANOGPT = [
    ("nothing", {}, "ckpt.pt is no checkpoint of nanoGPT; for one of train.py name its out_dir"),
    ("no dict", [1], "ckpt.pt is no checkpoint of nanoGPT"), ("no weights", {"model_args": ARGS}, "no checkpoint of"),
    ("weights a list", {"model_args": ARGS, "model": [W]}, "ckpt.pt is no checkpoint of nanoGPT"),
    ("a number for a matrix", {"model_args": ARGS, "model": {"h.0.ln_1.weight": W[0, 0]}}, "no checkpoint of nanoGPT"),
    ("a number for a tensor", {"model_args": ARGS, "model": {"wte.weight": 3}}, "ckpt.pt is no checkpoint of nanoGPT"),
    ("half a model", {"model_args": ARGS, "model": {"wte.weight": W}}, "ckpt.pt does not fit .*: h.0.* is missing"),
    ("a missing argument", {"model_args": {"n_layer": 1}, "model": {}}, "ckpt.pt is no checkpoint of nanoGPT"),
    ("no heads", {"model_args": {**ARGS, "n_head": 0}, "model": {}}, "no GPT-2 configuration: n_head is 0" + ELSE),
    ("code", Evil(), r"ckpt.pt holds no plain tensors \(UnpicklingError\)"),
]


@pytest.mark.parametrize("content, message", [case[1:] for case in NANOGPT], ids=[case[0] for case in NANOGPT])
def test_checkpoints_of_nanogpt(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "ckpt.pt")
    with refused(message, tmp_path):
        GPT.from_pretrained(tmp_path / "ckpt.pt")


# ---- adapters -------------------------------------------------------------------------------------------------------

def adapter(**changes):
    return config_of("adapter_config.json", **changes)


def updates(**changes):
    return lambda directory: write_safetensors(directory / "adapter_model.safetensors", {
        f"base_model.model.transformer.{name.replace('__', '.')}.weight": x for name, x in changes.items()})


MAKE_NONE = "in adapter_config.json make no adapter; write or download it again"
ADAPTERS = [
    ("no weights", gone("adapter_model.safetensors"), "No such file or directory: .*adapter_model.safetensors"),
    ("weights cut short", cut("adapter_model.safetensors", 400), "adapter_model.safetensors is no valid .*download or"),
    ("no JSON", put("adapter_config.json", "r = 4"),
     "adapter_config.json is no JSON object; download or write it again"),
    ("a list", put("adapter_config.json", "[4]"), "adapter_config.json is no JSON object; download or write it again"),
    ("another rank", adapter(r=8), "adapter's h.0.* does not fit this model or its rank 8; name the base that it was"),
    *((f"{name}={value!r}", adapter(**{name: value}), f"{name}={value!r}.*{MAKE_NONE}") for name, value in (
        ("r", 0), ("r", -4), ("r", "four"), ("r", None), ("lora_alpha", "16"), ("lora_alpha", None),
        ("lora_alpha", math.inf), ("lora_dropout", "0.1"), ("lora_dropout", 1.5), ("lora_dropout", None))),
    ("without rank", adapter(r=GONE), "r=None.*" + MAKE_NONE),
    ("unknown option", adapter(use_warp=True),
     "the adapter's option use_warp=True is not supported; merge it into its"),
    ("a base that is none", adapter(base_model_name_or_path=None),
     "base_model_name_or_path is None; write there which"),
    ("no base", adapter(base_model_name_or_path=GONE), "base_model_name_or_path is None; write there which weights"),
    ("a base that is a list", adapter(base_model_name_or_path=["gpt2"]),
     r"base_model_name_or_path is \['gpt2'\]; write"),
    ("a base that is not there", adapter(base_model_name_or_path="no/where"), "no model 'no/where': expected gpt2"),
    ("its own base", adapter(base_model_name_or_path="adapter"), "the base adapter is itself an adapter; name plain"),
    ("no updates", updates(), "the adapter holds no updates; write or download it again"),
    ("half an update", updates(h__0__attn__c_attn__lora_A=torch.zeros(4, 8)), "adapter's h.0.attn.c_attn does not fit"),
    ("a layer that is not there", updates(h__9__attn__c_attn__lora_A=P), "adapter's h.9.attn.c_attn does not fit"),
    ("no update", updates(wte=P), "holds .*transformer.wte.weight, which is no LoRA update of GPT-2; expected lora_A"),
]


@pytest.mark.parametrize("change, message", [case[1:] for case in ADAPTERS], ids=[case[0] for case in ADAPTERS])
def test_adapters(change, message, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    GPT.from_pretrained(weights).add_lora(4, 8.0, 0.0, ["c_attn"]).save_adapter(tmp_path / "adapter", str(weights))
    change(tmp_path / "adapter")
    with refused(message, tmp_path):
        GPT.from_pretrained("adapter")


# ---- sampling -------------------------------------------------------------------------------------------------------

def wording(**changes):
    return config_of("prompt.json", **changes)


TWO = wording(template="alpaca", prompt_format="{title}|{text}|", response_format="{label}")
PUT_BACK = ".*put back the file that train.py wrote, or remove it and give --data_dir"
NO_CHANGE = wording()
SAMPLES = [
    ("--file missing", NO_CHANGE, dict(file="nowhere.jsonl"),
     "--file: nowhere.jsonl is not there; prepare_data.py leaves"),
    ("--file a directory", NO_CHANGE, dict(file="model"), "--file: model is not there; prepare_data.py leaves"),
    ("--file empty", put("a.jsonl", ""), dict(file="model/a.jsonl"),
     "--file: model/a.jsonl holds no records; give one"),
    ("--file cut", put("a.jsonl", ONE + ONE[:9]), dict(file="model/a.jsonl"),
     "a.jsonl, line 2, column .*one record a line"),
    ("--file noise", put("a.jsonl", NOISE), dict(file="model/a.jsonl"), "a.jsonl, in or after line 1: .*UTF-8 jsonl"),
    ("--file weights", NO_CHANGE, dict(file="model/model.safetensors"), "model.safetensors, .*UTF-8"),
    ("--file no records", put("a.json", "[1]"), dict(file="model/a.json"), "a.json, record 1: a record is an object"),
    ("--file of others", put("a.csv", "q,a\n1,2\n"), dict(file="model/a.csv"), "a.csv, line 2: unknown kind of record"),
    ("--file of texts", put("a.jsonl", '{"text": "a"}'), dict(file="model/a.jsonl"),
     "line 1: a plain text has no prompt"),
    ("--file null", put("a.jsonl", '{"prompt": null}'), dict(file="model/a.jsonl"),
     "line 1: 'prompt' must be text, not"),
    ("--file role", put("a.jsonl", turns((["user"], "a"))), dict(file="model/a.jsonl"), "line 1: 'role' must be text"),
    ("--file unasked", put("a.jsonl", turns(("assistant", "a"))), dict(file="model/a.jsonl"),
     "a.jsonl, line 1: nothing is asked before the answer; give each record a prompt"),
    ("--output nowhere", put("a.jsonl", ONE), dict(file="model/a.jsonl", output="no/where"),
     "No such file or directory"),
    ("--prompt no JSON", TWO, dict(prompt="x"),
     "--prompt: this model reads the columns title, text; give a JSON object, '{"),
    ("--prompt cut", TWO, dict(prompt='{"title": "a", "te'),
     "--prompt: this model reads the columns title, text; give"),
    ("--prompt a list", TWO, dict(prompt='["a", "b"]'),
     "--prompt: this model reads the columns title, text; give a JSON"),
    ("--prompt deep", TWO, dict(prompt="[" * 100_000),
     "--prompt: this model reads the columns title, text; give a JSON"),
    ("--prompt null", TWO, dict(prompt='{"title": "a", "text": null}'), "'text' must be text, not null"),
    ("--prompt lacks one", TWO, dict(prompt='{"title": "a"}'), "--prompt: this model reads the columns title, text"),
    ("--model nowhere", NO_CHANGE, dict(model="no/where"), "no model 'no/where': expected gpt2"),
    ("--model a text", put("a.txt", "x"), dict(model="model/a.txt"), "no model 'model/a.txt': expected gpt2"),
    ("--adapter a model", NO_CHANGE, dict(adapter="model"), "--adapter: model holds no adapter; name it with --model"),
    ("--data_dir nowhere", NO_CHANGE, dict(data_dir="no"),
     "--data_dir: no prepared data in no; run python prepare_data.py"),
    ("prompt.json cut", cut("prompt.json", 20), {}, "prompt.json is no JSON object; download or write it again"),
    ("prompt.json a list", put("prompt.json", "[]"), {}, "prompt.json is no JSON object; download or write it again"),
    ("prompt.json empty", put("prompt.json", "{}"), {}, "prompt.json: template is None, no text" + PUT_BACK),
    ("prompt.json without a key", wording(response_format=GONE), {}, "prompt.json: response_format is None" + PUT_BACK),
    ("prompt.json of numbers", wording(prompt_format=3), {}, "prompt.json: prompt_format is 3, no text" + PUT_BACK),
    ("prompt.json unencoded", wording(encoding=None), {}, "prompt.json: encoding is None, no text" + PUT_BACK),
    ("prompt.json in Klingon", wording(encoding="klingon"), {}, "encoding='klingon' is none of bytes, gpt2"),
]


@pytest.mark.parametrize("change, flags, message", [case[1:] for case in SAMPLES], ids=[case[0] for case in SAMPLES])
def test_samples(change, flags, message, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(weights, tmp_path / "model")
    change(tmp_path / "model")
    with refused(message, tmp_path):
        sample.main(SampleConfig(**{**dict(model="model", device="cpu", dtype="float32", max_new_tokens=2), **(
            flags or dict(prompt="x"))}))


# ---- fuzzing --------------------------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("FUZZ", 1))
fuzz = settings(max_examples=100 * FUZZ, deadline=None, derandomize=FUZZ == 1,
                suppress_health_check=list(HealthCheck), **({} if FUZZ == 1 else {"database": None}))
NUMBERS = st.integers() | st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**30]) | st.floats()
KEYS = st.sampled_from(["role", "content", "text", "instruction", "output", "prompt"]) | st.text(max_size=5)
VALUES = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=9), lambda inner: st.lists(
    inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8)


@st.composite
def mutated(draw, contents):
    """One of these contents with a few bytes changed, left out, repeated or put in."""
    content = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        new = draw(st.binary(max_size=4) | st.sampled_from([
            b"", bytes(content[start:stop]) * 2, b"\0", b"\xff" * 8, b'"', b"{", b"[", b"\n", b"\r", b",", b"-",
            b"9" * 20, b"\\ud800", b"null", b"1e999", b"NaN", b"\xf0\x9f", b"[" * 2000]))
        content[start:stop] = new
        if draw(st.integers(0, 9)) == 0:
            del content[draw(st.integers(0, len(content))):]
    return bytes(content)


@st.composite
def edited(draw, content):
    """This JSON with a few values, anywhere in it, replaced or deleted."""
    root = [json.loads(content)]
    for _ in range(draw(st.integers(1, 3))):
        inner, key = root, 0
        while isinstance(inner[key], (dict, list)) and inner[key] and draw(st.integers(0, 4)):
            inner = inner[key]
            key = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else list(range(len(inner)))))
        if inner is not root and draw(st.integers(0, 4)) == 0:
            del inner[key]
        else:
            inner[key] = draw(VALUES)
    return json.dumps(root[0]).encode()


def survives(function, *args):
    """What the function returns, or None where it refuses in one line."""
    try:
        return function(*args)
    except (UserError, OSError) as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return None


CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]
SETS = [colour_records(4), CHATS, [{"prompt": "a", "completion": "b"}] * 2, [{"text": "la"}, {"text": "é🙂"}]]
LINES = [*("".join(json.dumps(record) + "\n" for record in records).encode() for records in SETS),
         *(json.dumps(records).encode() for records in SETS)]
TABLES = [b'text,b\n"a ""x""\n1",2\nb,3\n', b"instruction\toutput\na\tb\r\nc\td\r\n"]
FILES = [*LINES, *TABLES, *(gzip.compress(content) for content in (*LINES, *TABLES))]


def read_back(directory):
    """What training would read of prepared data; every token id is one of the vocabulary's."""
    meta = load_meta(directory)
    for split in ("train", "val"):
        shards = Shards(directory, meta, split)
        if len(shards):
            idx, targets, lengths = shards.batch(list(range(len(shards))))
            assert 0 <= int(idx.min()) and int(max(idx.max(), targets.max())) < meta["vocab_size"]
            assert int(lengths.sum()) == len(idx) and int(lengths.max()) <= meta["block_size"]
    return meta


@fuzz
@given(content=mutated(FILES) | st.binary(max_size=200) | st.lists(VALUES, max_size=3).map(json.dumps).map(str.encode)
       | edited(LINES[5]), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz", ".csv.gz"]),
       flags=st.sampled_from([
           {}, dict(template="alpaca"), dict(template="text"), dict(val_fraction=0.3, test_fraction=0.3),
           dict(block_size=9, overlong="truncate"), dict(prompt_format="{a}", response_format="{text}"),
           dict(template="text", response_format="{text}")]))
def test_fuzz_records(content, suffix, flags):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / f"a{suffix}").write_bytes(content)
        meta = survives(lambda: prepared(Path(place) / f"a{suffix}", Path(place) / "data", **flags))
        assert {path.name for path in Path(place).iterdir()} == {f"a{suffix}", *["data"] * (meta is not None)}
        if meta:
            assert read_back(Path(place) / "data") == meta


@fuzz
@given(draw=st.data())
def test_fuzz_prepared_data(draw, data):
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(data, place, dirs_exist_ok=True)
        name = draw.draw(st.sampled_from(["meta.json", "train_00000.npy", "val_00000.npy"]))
        content = (data / name).read_bytes()
        header = mutated([content[:128]]).map(lambda header: header + content[128:])
        (Path(place) / name).write_bytes(draw.draw(mutated([content]) | (
            edited(content) if name == "meta.json" else header)))
        survives(read_back, Path(place))


@fuzz
@given(draw=st.data())
def test_fuzz_weights(draw, weights):
    content = (weights / "model.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")

    def with_header(text):
        return len(text).to_bytes(8, "little") + text + content[length:]
    changed = draw.draw(mutated([content]) | mutated([content[:length]]).map(lambda head: head + content[length:])
                        | mutated([content[8:length]]).map(with_header) | edited(content[8:length]).map(with_header))
    empty, largest = torch.empty, 0

    def watched(*args, **options):
        nonlocal largest
        tensor = empty(*args, **options)
        largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model.safetensors").write_bytes(changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", watched)
            survives(lambda: list(read_safetensors(Path(place) / "model.safetensors")))
        assert largest <= len(changed)
        if draw.draw(st.booleans()):
            settings_file = (weights / "config.json").read_bytes()
            (Path(place) / "config.json").write_bytes(draw.draw(edited(settings_file) | mutated([settings_file])))
        survives(GPT.from_pretrained, place)
