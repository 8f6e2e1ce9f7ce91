"""What is malformed ends in one line that names the place and the remedy, and leaves nothing half-written behind.

    FUZZ=50 python -m pytest tests/test_bad_input.py -k fuzz    # fifty times the examples, other ones every time
"""
import gzip
import json
import math
import os
import pickle
import random
import re
import shutil
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import colour_records, tiny, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare_data
import sample
import train
from model import GPT
from nanosft import flags as flags_module
from nanosft.console import UserError
from nanosft.shards import Shards, load_meta
from nanosft.tensors import read_safetensors, write_safetensors
from prepare_data import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

GONE = "(removed)"  # in a change of JSON: the key is deleted


@contextmanager
def refused(message, directory, config_class=None):
    """Within it a UserError or OSError of one line that matches `message`; in the directory nothing comes or goes. A
    flag that the message names is one of `config_class` or, where it speaks of preparing the data, of that."""
    before = sorted(directory.rglob("*"))
    with pytest.raises((UserError, OSError), match=message) as caught:
        yield
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1001
    assert sorted(directory.rglob("*")) == before
    if config_class:
        known = set(config_class.__dataclass_fields__)
        if "prepare" in text:
            known |= set(PrepareConfig.__dataclass_fields__)
        assert set(re.findall(r"--(\w+)", text)) <= known


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


# changes of a directory, for the tables below

def put(name, content):
    """A change that writes this text or these bytes."""
    return lambda directory: (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def cut(name, size):
    return lambda directory: os.truncate(directory / name, size)


def gone(name):
    return lambda directory: (directory / name).unlink()


def config_of(name, **changes):
    return lambda directory: edit(directory / name, **changes)


def evil(save, name):
    """A change that writes a file with a pickle that would run code."""
    def change(directory):
        with open(directory / name, "wb") as file:
            save({"format_version": 2, "wte.weight": Evil()}, file)
    return change


def prepared(path, out_dir, **flags):
    template = "" if ".txt" in str(path) or "prompt_format" in flags else "chat"
    return prepare_data.main(PrepareConfig(**{**dict(input=str(path), out_dir=str(out_dir), encoding="bytes", show=0,
                                                     val_fraction=0, test_fraction=0, template=template), **flags}))


def training(data_dir, out_dir):
    return train.main(TrainConfig(data_dir=str(data_dir), out_dir=str(out_dir), n_layer=1, n_head=1, n_embd=8,
                                  device="cpu", dtype="float32", max_steps=1))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A directory with data, a run on them, a model with its wording, and an adapter over it."""
    path = tmp_path_factory.mktemp("work")
    prepared(write_lines(path / "a.jsonl", colour_records(40)), path / "data", val_fraction=0.2, block_size=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.pictures, "plot_losses", lambda *_: None)  # which takes seconds
        training(path / "data", path / "out")
    tiny(n_layer=1, n_embd=8, n_head=2, block_size=512).save_pretrained(path / "model")
    (path / "model" / "prompt.json").write_text(json.dumps(dict(template="chat", prompt_format="", response_format="",
                                                                encoding="bytes")))
    GPT.from_pretrained(path / "model").add_lora(4, 8.0, 0.0, ["c_attn"]).save_adapter(path / "adapter", "model")
    return path


def test_the_evil_pickle_would_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "executed").is_dir()


def test_a_bug_of_ours_shows_its_traceback(monkeypatch):
    def buggy(config):
        return config.no_such_flag
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr(flags_module, "protect_output", lambda: None)
    with pytest.raises(AttributeError):
        flags_module.run(buggy, TrainConfig)


# ---- records --------------------------------------------------------------------------------------------------------

ONE = '{"instruction": "a", "output": "b"}\n'
NOISE = random.Random(0).randbytes(5000)
PACKED = gzip.compress((ONE * 500).encode())
COLUMNS = dict(prompt_format="{title}:", response_format=" {label}")


def turns(*pairs):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in pairs]}) + "\n"


AS_UTF8 = "save it as UTF-8, or give its encoding, such as --text_encoding=cp1252"
# file, its content or what makes it, the message, flags
RECORDS = [
    # cut short, damaged, or nothing at all
    ("cut.json", '[{"instruction": "a", "outp', "^cut.json, line 1, column 23: not valid JSON .*or a list of records$"),
    ("open.json", f"[{ONE}", "^open.json, line 1, column 37: not valid JSON .*or a list of records$"),
    ("cut.jsonl", ONE + ONE[:20], "^cut.jsonl, line 2, column .*not valid JSON .*expected one record a line, or a l"),
    ("comma.json", '[{"a": 1},]', "^comma.json, line 1, column 11: not valid JSON"),
    ("empty.json", "", "^--input: empty.json leaves nothing to train on .it is empty.$"),
    *((f"empty.{kind}", "", "leaves nothing to train on") for kind in ("jsonl", "csv", "txt", "jsonl.gz")),
    ("blank.jsonl", "\n \n\t\n", "leaves nothing to train on"), ("list.json", "[]", "leaves nothing to train on"),
    ("bom.jsonl", "\ufeff", "leaves nothing to train on"), ("header.csv", "text,b\n", "leaves nothing to train on"),
    ("latin1.csv", b"text\ncaf\xe9\n", f"latin1.csv, in or after line 1: .*0xe9.*{AS_UTF8}"),
    ("later.json", b"[" + b" " * 9000 + b'"caf\xe9"]', f"later.json, in or after .*0xe9.*{AS_UTF8}"),
    *((f"noise.{kind}", NOISE, f"noise.{kind}.*{AS_UTF8}") for kind in ("jsonl", "csv", "json", "txt", "txt.gz")),
    ("noise.gz", NOISE, "noise.gz is none of .json"),
    ("cut.jsonl.gz", PACKED[:-9], "cut.jsonl.gz, in or after line .*ended before.*download it again"),
    ("sum.jsonl.gz", PACKED[:-8] + bytes(8), "sum.jsonl.gz, .*CRC check failed.*download it again"),
    ("method.txt.gz", PACKED[:2] + b"\7" + PACKED[3:], "method.txt.gz, .*compression method.*download it again"),
    ("deep.json", "[" * 100_000, "deep.json, .*recursion.*save or download it again"),
    ("deep.jsonl", ONE + '{"text": ' * 50_000, "deep.jsonl, in or after line 1: .*recursion"),
    ("digits.jsonl", '{"text": ' + "9" * 5000 + "}", "digits.jsonl, in or after line 1: Exceeds the limit"),
    ("long.jsonl", lambda: ONE + '{"instruction": "' + "x" * 20_000_000, "line 2, column 17: .*Unterminated"),
    ("long.csv", lambda: "x" * 20_000_000 + ",b\n1,2\n",
     "leaves nothing .*1 dropped: unknown kind of record .first: long.csv, line 2: 'xxx.* "),
    ("field.jsonl", lambda: '{"text": {"y": "' + "y" * 20_000_000 + '"}}',
     """dropped: a field that is no text .first: field.jsonl, line 1: 'text' is {"y": "y{33}.."""),
    # not what a record is
    ("number.json", "3", "1 dropped: a record is an object with named fields .first: number.json, line 1: not 3"),
    ("white.txt", "a" + " \n" * 100_000 + "b", "100,000 characters of white space in a row are too many for the tok"),
    ("white.jsonl", json.dumps({"text": "a" + " " * 200_000}), "dropped: 100,000 characters of white space"),
    ("lists.jsonl", "[" * 500 + "]" * 500, r"named fields .*: not \[{40}"),
    ("lines.jsonl", json.dumps({"a\nb\x1b[31m": 1}), r"unknown kind of record .*line 1: 'a\\nb\\x1b"),
    ("several.jsonl", turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
     "the alpaca template holds one question and one answer .*--template=chat", dict(template="alpaca")),
    ("unanswered.jsonl", turns(("user", "a")) * 2, "nothing to train on .2 records; 2 dropped: no answer .first: una"),
    # tables
    ("ragged.csv", "text,b\n1,2\n3\n", "ragged.csv, line 3: 1 fields where the header has 2; fill in the others"),
    ("wide.tsv", "text\tb\n1\t2\t3\n", "wide.tsv, line 2: 3 fields where the header has 2; quote fields that hold"),
    ("twice.csv", "text,b,text\n1,2,3\n", r"twice.csv, line 1: duplicate column names in \['text'.*; rename them"),
    ("unclosed.csv", 'text,b\n1,"2\n3,4\n', "unclosed.csv, in or after line 1: unexpected end of data"),
    ("header.tsv", 'text\t"b\n1\t2\n3\t4\n', "header.tsv, in or after line 1: unexpected end of data; check"),
    ("columns.csv", "Q,a\n1,2\n", "unknown kind of record .first: columns.csv, line 2: 'Q', 'a'; .* --prompt_format"),
    # formats
    ("one.csv", "title,text\n1,2\n", "--response_format names {label}; the columns are title, text", COLUMNS),
    ("other.csv", "label,text\n1,2\n", "--prompt_format names {title}; the columns are label, text", COLUMNS),
    ("newline.csv", '"a\nb",c\n1,2\n', "line 3: --prompt_format names {title}; the columns are a b, c", COLUMNS),
    ("column.jsonl", '{"title": null, "label": "a"}', "1 dropped: no question", COLUMNS),
    ("column.jsonl", '{"title": ["b", "c"], "label": "a"}', "no text .*line 1: 'title' is .\"b", COLUMNS),
    ("label.jsonl", '{"title": "a", "label": {"b": null}}', "line 1: 'label' is {", COLUMNS),
    ("format.jsonl", ONE, "--response_format: needed with --prompt_format", dict(prompt_format="{a}")),
    ("instructions.jsonl", ONE, "--template=text holds records with 'text'", dict(template="text")),
    ("unicode.jsonl", ONE, "--prompt_format: half a surrogate", dict(prompt_format="\udce9", response_format="{b}")),
    ("answer.jsonl", ONE, "--response_format: 'b' names no column, as {label} does", dict(response_format="b")),
    ("both.jsonl", ONE, "--template: text leaves no place for --prompt_format", dict(template="text", **COLUMNS)),
    ("encoding.jsonl", ONE, "encoding='klingon' is none of bytes, gpt2", dict(encoding="klingon")),
    ("suffix.xlsx", ONE, "--input: suffix.xlsx is none of .json .jsonl .ndjson .csv .tsv .txt .parquet or.*save it so"),
]


@pytest.mark.parametrize("name, content, message, flags",
                         [pytest.param(*(*row, {})[:4], id=row[0]) for row in RECORDS])
def test_records(name, content, message, flags, tmp_path):
    content = content() if callable(content) else content
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with refused(message, tmp_path, PrepareConfig):
        prepared(tmp_path / name, tmp_path / "data", **flags)


def test_paths_that_cannot_be_used(tmp_path):
    source = write_lines(tmp_path / "a.jsonl", colour_records(3))
    for name in ("directory.jsonl", "foreign", "alone"):
        (tmp_path / name).mkdir()
    alone = write_lines(tmp_path / "alone" / "test.jsonl", colour_records(3))
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    for path, out_dir, message in (
            (tmp_path / "directory.jsonl", "data", "directory.jsonl' is a directory without such files; give a file"),
            (tmp_path / "nothing.jsonl", "data", "nothing.jsonl' is not there; give a file"),
            ("no\0where.jsonl", "data", "is not there; give a file"),
            (source, "a.jsonl", "--out_dir=.*a.jsonl is a file; name a directory"),
            (alone, "alone", "--out_dir=.*alone holds the input itself and is written anew; name another directory"),
            (source, "a.jsonl/data", "Not a directory|File exists"),
            (source, "foreign", r"holds files that are not ours \(thesis.tex\); name another")):
        with refused(message, tmp_path, PrepareConfig):
            prepared(path, tmp_path / out_dir)


# ---- shards and meta.json -------------------------------------------------------------------------------------------

def meta(**changes):
    return config_of("meta.json", **changes)


AGAIN = " is damaged: run prepare_data.py again$"
TRAIN, META = "train_00000.npy" + AGAIN, "meta.json is damaged, or of another version: run prepare_data.py again$"
# what is wrong, what makes it so, the message
DATA = [
    ("cut short", cut("train_00000.npy", 900), TRAIN), ("empty", cut("val_00000.npy", 0), "val_00000.npy" + AGAIN),
    ("a pickle", evil(pickle.dump, "train_00000.npy"), TRAIN), ("noise", put("train_00000.npy", NOISE), TRAIN),
    ("missing", gone("train_00000.npy"), "train_00000.npy is missing: run prepare_data.py again"),
    ("missing, of val", gone("val_00000.npy"), "val_00000.npy is missing: run prepare_data.py again"),
    ("a directory", lambda path: ((path / "train_00000.npy").unlink(), (path / "train_00000.npy").mkdir()),
     "train_00000.npy is missing"),
    ("meta.json missing", gone("meta.json"), "--data_dir: no prepared data in .*; run python prepare_data.py first"),
    ("meta.json of another version", meta(format_version=1), META),
    ("meta.json empty", put("meta.json", ""), META), ("meta.json cut", cut("meta.json", 99), META),
    ("meta.json a list", put("meta.json", "[1]"), META), ("meta.json deep", put("meta.json", "[" * 100_000), META),
    ("meta.json no UTF-8", put("meta.json", b"\xff\xfe{}"), META),
    *((f"meta.json without {name}", meta(**{name: GONE}), META)
      for name in ("format_version", "checksum", "encoding", "stop", "prompt", "train", "train__shards")),
    *((f"meta.json with {name}={value!r}", meta(**{name: value}), META) for name, value in (
        ("checksum", 3), ("vocab_size", 258), ("val__longest", None), ("encoding", "gpt2"), ("train", []),
        ("train__shards", {"../val_00000.npy": "0"}), ("prompt__template", "text"))),
]


def test_any_byte_of_a_shard_that_changes_is_found(work, tmp_path):
    content, meta = (work / "data" / "train_00000.npy").read_bytes(), load_meta(work / "data")
    for place in random.Random(0).sample(range(len(content)), 50):
        changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]
        (tmp_path / "train_00000.npy").write_bytes(changed)
        with refused(TRAIN, tmp_path):
            Shards(tmp_path, meta, "train")


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def saved(kind="", **changes):
    """A change of entries in ckpt.pt or, with `kind`, in one of its entries; the checksum stays."""
    def change(directory):
        content = torch.load(directory / "ckpt.pt", weights_only=True)
        inner = content[kind] if kind else content
        inner.update(changes)
        for name, value in changes.items():
            if value is GONE:
                del inner[name]
        torch.save(content, directory / "ckpt.pt")
    return change


def log(content):
    return put("log.csv", content), "log.csv is not as train.py wrote it: put it back, or remove it"


UNREADABLE = "ckpt.pt cannot be read .*; start anew with --overwrite, or from its weights with --init_from="
OTHER_SUM = "ckpt.pt cannot be read .*checksum.*; start anew with --overwrite"
CHECKPOINTS = [
    ("cut short", cut("ckpt.pt", 3000), UNREADABLE), ("empty", cut("ckpt.pt", 0), UNREADABLE),
    ("text", put("ckpt.pt", "step 3, loss 2.5\n"), UNREADABLE), ("noise", put("ckpt.pt", NOISE), UNREADABLE),
    ("a pickle that runs code", evil(pickle.dump, "ckpt.pt"), r"\(UnpicklingError.*; start anew with --overwrite"),
    ("torch's pickle that runs code", evil(torch.save, "ckpt.pt"), r"\(UnpicklingError.*; start anew with --overwrite"),
    ("a list", lambda path: torch.save([1, 2], path / "ckpt.pt"), UNREADABLE),
    ("another version", saved(format_version=1), "format 1, this program reads 3.*; start anew with --overwrite, or"),
    *((f"without {name}", saved(**{name: GONE}), UNREADABLE) for name in ("format_version", "values", "tensors")),
    *((f"another {name}", saved("values", **{name: value}), OTHER_SUM) for name, value in (
        ("state", {"step": 3}), ("config", {"warp": 9}), ("data", "0"), ("model_config", {}), ("dtype", "text"))),
    *((f"{name}: {value}", saved("tensors", **{name: value}), UNREADABLE) for name, value in (
        ("masters", {}), ("means", []), ("squares", None), ("steps", torch.ones(3)), ("masters", GONE))),
    ("missing", gone("ckpt.pt"), "--resume: .*ckpt.pt is not there; name the run's --out_dir"),
    ("a log of another kind", *log("step;loss\n1;2\n")), ("a log of letters", *log("step,epoch\nx,1\n")),
    ("a log in bytes", *log(b"step\n\xff\xfe\n")),
]


# ---- weights --------------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw(entries, data=bytes(8), length=None):
    """A safetensors file with this header, as text or as entries."""
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return put("model.safetensors", (len(text) if length is None else length).to_bytes(8, "little") + text + data)


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


ELSE = ".*; download or write it again$"
FALSE = "model.safetensors is no valid safetensors file .*"
NO_CONFIG = "config.json is no configuration of a model: "
NO_OBJECT = "config.json is no JSON object; download or write it again"
NO_GPT2 = "model.safetensors holds no GPT-2: expected the matrices wte.weight and wpe.weight and layers h.0"
NO_BIN = "holds no plain tensors .*use a .safetensors file"
NO_STATE = "holds no state dict of tensors; for a checkpoint of train.py name"
NO_FIT = "model.* does not fit config.json: .*; this is another kind of model, or a broken file"
W, P = torch.zeros(257, 64), torch.zeros(16, 64)
WEIGHTS = [
    *((f"header {header}", raw(header, bytes(size)), FALSE + ELSE) for header, size in (
        ([1], 8), ({"a": ENTRY}, 4), ({"a": ENTRY}, 9), ({"a": 3}, 8), ({"a": {"dtype": "F32"}}, 8),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12), ({"a": {**ENTRY, "shape": [-1, -2]}}, 8),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, 8), ({"a": {**ENTRY, "data_offsets": [8, 16]}}, 16),
        ({"a": {**ENTRY, "dtype": "F33"}}, 8), ({"a": {**ENTRY, "shape": 2}}, 8), ({"a": {**ENTRY, "shape": [3]}}, 8),
        ({"a": {**ENTRY, "shape": [0, 10**30], "data_offsets": [0, 0]}}, 0))),
    ("three bytes", put("model.safetensors", b"\1\2\3"), FALSE + "header is longer than the file" + ELSE),
    ("empty", put("model.safetensors", b""), FALSE + "header is longer than the file" + ELSE),
    ("header of 2^63", raw({"a": ENTRY}, length=2**63), FALSE + "header is longer than the file" + ELSE),
    ("header too short", raw({"a": ENTRY}, length=9), FALSE + ELSE), ("header of 0", raw({}, length=0), FALSE + ELSE),
    ("header deep", raw("[" * 100_000), FALSE + "recursion" + ELSE), ("header null", raw("null"), FALSE + ELSE),
    ("gap", raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, bytes(20)), FALSE + "b has a false" + ELSE),
    ("shape of true", raw({"a": {**ENTRY, "shape": [True, 2]}}), FALSE + "a has a .* size" + ELSE),
    ("shape of 2^80", raw({"a": {**ENTRY, "shape": [2**40, 2**40]}}), FALSE + "a has a false offset" + ELSE),
    ("dtype a list", raw({"a": {**ENTRY, "dtype": ["F32"]}}), FALSE + ELSE),
    ("really cut short", cut("model.safetensors", 3000), FALSE + "it ends before" + ELSE),
    ("tensors of another model", raw({"a": ENTRY}), NO_FIT),
    ("a matrix of three dimensions", tensors(False, h__0__mlp__c_fc__weight=torch.zeros(2, 2, 2)), NO_FIT),
    ("alone: no GPT-2", tensors(a=W), NO_GPT2), ("alone: a vector", tensors(wte__weight=W[0], wpe__weight=P), NO_GPT2),
    ("alone: no layer", tensors(wte__weight=W, wpe__weight=P), NO_GPT2),
    ("alone: a layer x", tensors(wte__weight=W, wpe__weight=P, h__x__a=P), NO_GPT2),
    ("alone: layer 10^7", tensors(wte__weight=W, wpe__weight=P, h__9999999__a=P), NO_FIT),
    ("alone: layer 10^30", tensors(wte__weight=W, wpe__weight=P, **{f"h__{10**30}__a": P}), "n_layer is 10000" + ELSE),
    ("alone: odd width", tensors(wte__weight=W[:, :40], wpe__weight=P, h__0__a=P), "n_embd=40 is no multiple of 64; "),
    *((f"config.json: {what}", put("config.json", content), NO_OBJECT) for what, content in (
        ("no JSON", "{"), ("a list", "[]"), ("deep", "[" * 100_000), ("noise", NOISE))),
    ("config.json: empty", put("config.json", "{}"), NO_CONFIG + r"n_\w+ is None" + ELSE),
    *((f"config.json with {name}={value!r}", config(**{name: value}), NO_CONFIG + f"{key} is .*" + ELSE)
      for name, key, value in (("n_layer", "n_layer", -1), ("n_layer", "n_layer", True), ("n_head", "n_head", 0),
                               ("n_embd", "n_embd", 10**30), ("n_embd", "n_embd", 8.0), ("n_head", "n_head", GONE),
                               ("vocab_size", "vocab_size", "257"), ("n_positions", "block_size", [512]))),
    ("config.json with 10^7 layers", config(n_layer=10**7), NO_FIT), ("much wider", config(n_embd=10**7), NO_FIT),
    (".bin that runs code", binary(evil(torch.save, "pytorch_model.bin")), NO_BIN),
    (".bin that is a pickle", binary(evil(pickle.dump, "pytorch_model.bin")), NO_BIN),
    (".bin text", binary(put("pytorch_model.bin", "version https://git-lfs")), NO_BIN),
    (".bin a list", binary([W, P]), NO_STATE), (".bin of numbers", binary({"wte.weight": 3}), NO_STATE),
    (".bin by number", binary({1: W, 2: P}), NO_FIT), (".bin of half a model", binary({"wte.weight": W}), NO_FIT),
    ("nothing", gone("model.safetensors"), "holds no model.safetensors or adapter_config.json: name a directory"),
]


ARGS = {"block_size": 16, "vocab_size": 257, "n_layer": 1, "n_head": 1, "n_embd": 64}
NO_NANOGPT = "ckpt.pt holds no (state dict of tensors|GPT-2: expected the matrices)"


NANOGPT = [
    ({}, NO_NANOGPT), ([1], NO_NANOGPT), ({"model_args": ARGS}, NO_NANOGPT),
    ({"model_args": ARGS, "model": {"h.0.ln_1.weight": W[0, 0]}}, "ckpt.pt does not fit config.json"),
    ({"model_args": {"n_layer": 1}, "model": {}}, NO_NANOGPT),
    ({"model_args": ARGS, "model": {"wte.weight": W}}, "ckpt.pt does not fit config.json"),
    ({"model_args": {**ARGS, "n_head": 0}, "model": {}}, "no configuration of a model: n_head is 0" + ELSE),
    (Evil(), r"ckpt.pt holds no plain tensors \(UnpicklingError\)")]


# ---- adapters -------------------------------------------------------------------------------------------------------

def adapter(**changes):
    return config_of("adapter_config.json", **changes)


def base_is(value):
    return adapter(base_model_name_or_path=value)


def updates(**changes):
    return lambda directory: write_safetensors(directory / "adapter_model.safetensors", {
        f"base_model.model.transformer.{name.replace('__', '.')}.weight": x for name, x in changes.items()})


ADAPTERS = [
    ("no weights", gone("adapter_model.safetensors"), "No such file or directory: .*adapter_model.safetensors"),
    ("weights cut short", cut("adapter_model.safetensors", 400), "adapter_model.safetensors is no valid .*download or"),
    ("no JSON", put("adapter_config.json", "r = 4"), "adapter_config.json is no JSON object; download or write"),
    ("another rank", adapter(r=8), "h.0.* does not fit this model or rank 8; name the adapter's base"),
    *((f"{name}={value!r}", adapter(**{name: value}),
       f"{name}={value!r}.*in adapter_config.json make no adapter; write or download it again") for name, value in (
        ("r", 0), ("r", 2.0), ("r", "four"), ("r", None), ("lora_alpha", "16"), ("lora_alpha", math.inf),
        ("lora_dropout", 1.5), ("lora_dropout", None))),
    ("unknown option", adapter(use_warp=True), "option use_warp=True is not supported; merge it into"),
    ("a base that is none", base_is(None), "its base None is not there; write as base_model_name"),
    ("a base that is a list", base_is(["gpt2"]), r"its base \['gpt2'\] is not there; write as base_model"),
    ("a base that is not there", base_is("no/where/at"), "its base 'no/where/at' is not there; write as"),
    ("its own base", base_is("adapter"), "the base adapter is itself an adapter; name plain"),
    ("no updates", updates(), "the adapter holds no updates; write or download it again"),
    ("half an update", updates(h__0__attn__c_attn__lora_A=torch.zeros(4, 8)), "h.0.attn.c_attn does not fit"),
    ("a layer that is not there", updates(h__9__attn__c_attn__lora_A=P), "h.9.attn.c_attn does not fit"),
    ("no update", updates(wte=P), "holds .*transformer.wte.weight; expected lora_A and lora_B of .*: merge it into"),
    ("the output head", updates(lm_head__lora_A=P), "holds .*lm_head.lora_A.weight; expected .* in blocks alone"),
    ("a revision", adapter(revision="v2"), "option revision='v2' is not supported; merge it"),
]


DAMAGED = {  # a table, and what finds the damage in the directory or file that its changes are for
    "data": (DATA, lambda: training("data", "new")),
    "out": (CHECKPOINTS, lambda: train.main(TrainConfig(data_dir="data", out_dir="out", resume=True))),
    "model": (WEIGHTS, lambda: GPT.from_pretrained("model")),
    "adapter": (ADAPTERS, lambda: GPT.from_pretrained("adapter")),
    "ckpt.pt": ([(str(number), partial(torch.save, content), message)
                 for number, (content, message) in enumerate(NANOGPT)],
                lambda: GPT.from_pretrained("ckpt.pt"))}


@pytest.mark.parametrize("place, change, message", [
    pytest.param(place, *row, id=f"{place}: {name}") for place, (table, _) in DAMAGED.items() for name, *row in table])
def test_what_is_damaged(place, change, message, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    change(tmp_path / place)
    with refused(message, tmp_path, TrainConfig):
        DAMAGED[place][1]()


# ---- sampling -------------------------------------------------------------------------------------------------------

def wording(**changes):
    return config_of("prompt.json", **changes)


def file(content, name="a.jsonl", **flags):
    """A change that writes this file into the model's directory, and the flags that name it."""
    return put(name, content), dict(file=f"model/{name}", **flags)


TWO = wording(template="alpaca", prompt_format="{title}|{text}|", response_format="{label}")
TWO_COLUMNS = "--prompt: this model reads the columns title, text; give a JSON object"
PUT_BACK = ".*; remove it and give --data_dir"
PROMPT = dict(prompt="x")
SAMPLES = [
    ("--file missing", wording(), dict(file="nowhere.jsonl"), "--file: 'nowhere.jsonl' is not there; give a file"),
    ("--file empty", *file(""), "--file: model/a.jsonl holds no records; give one"),
    ("--file noise", *file(NOISE), "a.jsonl, in or after line 1: .*save it as UTF-8, or give its"),
    ("--file of texts", *file('{"text": "a"}'), "line 1: nothing is asked before .* answer; give each record"),
    ("--file unasked", *file(turns(("assistant", "a"))), "line 1: nothing is asked before .* answer; give each"),
    ("--output below a file", *file(ONE, output="model/a.jsonl/b"), "File exists"),
    *((f"--prompt {text[:20]}", TWO, dict(prompt=text), TWO_COLUMNS) for text in (
        "x", '{"title": "a", "te', '["a", "b"]', "[" * 100_000, '{"title": "a"}')),
    ("--model a comma", wording(), dict(model=",", prompt="x"), "no model ','"),
    ("--model=out", lambda path: shutil.rmtree("out"), dict(model="out"), "--model=out: nothing is trained there yet"),
    ("--prompt too long", wording(), dict(prompt="x" * 600), "the prompt has 617 tokens, the context 512: shorten it"),
    ("--system", wording(template="alpaca"), dict(system="x", prompt="x"), r"model \(alpaca template\) was trained"),
    ("--output a directory", *file(ONE, output="data"), "--output=data is no plain file; name a file"),
    ("--output over the input", *file(ONE, output="model/a.jsonl"), "--output=model/a.jsonl is a file to read; name"),
    ("--export over one", wording(), dict(export="model"), "--export=model holds files already; name"),
    ("--model nowhere", wording(), dict(model="no/where/at"), "no model 'no/where/at': expected gpt2"),
    ("--model a text", put("a.txt", "x"), dict(model="model/a.txt"), "no model 'model/a.txt': expected gpt2"),
    ("--data_dir nowhere", wording(), dict(data_dir="no"), "--data_dir: no prepared data in no; run python prepare_"),
    ("prompt.json cut", cut("prompt.json", 20), PROMPT, "prompt.json is no JSON object; download or write it"),
    *((f"prompt.json: {name} is {value!r}", wording(**{name: value}), PROMPT, f"prompt.json: {name} is .*{PUT_BACK}")
      for name, value in (("template", GONE), ("response_format", GONE), ("prompt_format", 3), ("encoding", None))),
    ("prompt.json names no template", wording(template="x"), PROMPT, f"no template is called 'x'{PUT_BACK}"),
    ("no prompt.json", gone("prompt.json"), PROMPT, "has 257 token ids, the gpt2 encoding 50257: give the --data_dir"),
    ("prompt.json in Klingon", wording(encoding="klingon"), PROMPT, "encoding='klingon' is none of bytes, gpt2"),
]


@pytest.mark.parametrize("change, flags, message", [pytest.param(*row, id=name) for name, *row in SAMPLES])
def test_samples(change, flags, message, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "model")
    with refused(message, tmp_path, SampleConfig):
        sample.main(SampleConfig(**{**dict(model="model", device="cpu", dtype="float32", max_new_tokens=2), **flags}))


# ---- remedies: what a message says to do works ----------------------------------------------------------------------

TALK = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
PREPARE, TRAIN, SAMPLE = "prepare", "train", "sample"
LONG_ONE = json.dumps({"instruction": "a" * 90, "output": "b"}) + "\n"
LABELS = 'title;label\n"1";x\n"2";y\n'
TRAINED = dict(out_dir="out", max_steps=2)


def move(name, to):
    return lambda path: (path / name).rename(path / to)


def nothing(path):
    """No change: the flags alone are wrong."""


def again(**flags):
    """What prepares `work`'s data again."""
    return lambda path: prepared(path / "a.jsonl", path / "data", **{**dict(val_fraction=0.2, block_size=128), **flags})


def chat_template_of(directory, source):
    """A model with a tokenizer and this chat template."""
    def change(path):
        from conftest import chat_model
        chat_model(path / directory)
        (path / directory / "chat_template.jinja").write_text(source)
    return change


HIDES = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}" \
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WITH_SYSTEM = turns(("system", "s"), ("user", "a"), ("assistant", "b"))
# what breaks, the script with its flags, the message, what repairs it: a change of files and of flags
REMEDIES = [
    # prepare_data.py
    (put("x.csv", b"text\ncaf\xe9\n"), PREPARE, dict(input="x.csv"), "--text_encoding=cp1252",
     None, dict(text_encoding="cp1252")),
    (put("x.csv", b"text\ncaf\xe9\n"), PREPARE, dict(input="x.csv"), "save it as UTF-8",
     put("x.csv", "text\ncafé\n"), {}),
    (put("x.csv", LABELS), PREPARE, dict(input="x.csv"), "prepare_data.py has --prompt_format and --response_format",
     None, dict(prompt_format="{title}", response_format="{label}")),
    (put("x.csv", LABELS), PREPARE, dict(input="x.csv", prompt_format="{title}", response_format="{class}"),
     "--response_format names {class}; the columns are title, label", None, dict(response_format="{label}")),
    (put("x.jsonl", TALK), PREPARE, dict(input="x.jsonl", template="alpaca"), "--template=chat holds conversations",
     None, dict(template="chat")),
    (put("x.jsonl", ONE), PREPARE, dict(input="x.jsonl", template="text"), "or --response_format",
     None, dict(response_format="{output}")),
    (put("x.jsonl", ONE), PREPARE, dict(input="x.jsonl", prompt_format="{instruction}"), "--response_format: needed",
     None, dict(response_format="{output}")),
    (put("x.json", '{"instruction": "a",, "output": "b"}'), PREPARE, dict(input="x.json"),
     "expected one record a line, or a list of records", put("x.json", ONE), {}),
    (put("x.json", '{"a": [{"text": "t"}], "b": [{"text": "u"}]}'), PREPARE, dict(input="x.json"),
     "holds several lists, a, b; save the one to train on by itself", put("x.json", '[{"text": "t"}]'), {}),
    (put("x.csv", "text,b,text\n1,2,3\n"), PREPARE, dict(input="x.csv"), "rename them",
     put("x.csv", "text,b,c\n1,2,3\n"), {}),
    (put("x.csv", "text,b\nla, la,2\n"), PREPARE, dict(input="x.csv"), "quote fields that hold the separator",
     put("x.csv", 'text,b\n"la, la",2\n'), {}),
    (put("x.xlsx", ONE), PREPARE, dict(input="x.xlsx"), "is none of .* .csv .*save it so", move("x.xlsx", "x.jsonl"),
     dict(input="x.jsonl")),
    (put("x.jsonl", ONE), PREPARE, dict(input="y.jsonl"), "is not there; give a file", None, dict(input="x.jsonl")),
    (put("x.jsonl", ONE), PREPARE, dict(input="*.csv"), "or a pattern", None, dict(input="x*.jsonl")),
    (put("x.jsonl", ONE), PREPARE, dict(input="x.jsonl", out_dir="x.jsonl"), "is a file; name a directory",
     None, dict(out_dir="y")),
    (put("x.jsonl", ONE), PREPARE, dict(input="x.jsonl", out_dir="model"), "not ours .*; name another directory",
     None, dict(out_dir="y")),
    (put("x.jsonl", LONG_ONE), PREPARE, dict(input="x.jsonl", block_size=50), "longer than --block_size=50",
     None, dict(block_size=500)),
    (put("x.jsonl", ONE), PREPARE, dict(input="x.jsonl", encoding="klingon"), "is none of bytes",
     None, dict(encoding="bytes")),
    (put("x.jsonl", ONE), PREPARE, dict(input="x.jsonl", template="model"), "--template: model needs --model",
     chat_template_of("chat", HIDES), dict(model="chat", encoding="")),
    (lambda path: (put("x.jsonl", WITH_SYSTEM)(path), chat_template_of("chat", HIDES)(path)), PREPARE,
     dict(input="x.jsonl", model="chat", encoding=""), "leave out the system prompt, or prepare with --template=chat",
     None, dict(template="chat")),
    (lambda path: (put("x.jsonl", WITH_SYSTEM)(path), chat_template_of("chat", HIDES)(path)), PREPARE,
     dict(input="x.jsonl", model="chat", encoding=""), "leave out the system prompt", put("x.jsonl", ONE), {}),
    (put("x.jsonl", ONE + '{"instruction": "c"}\n'), PREPARE, dict(input="x.jsonl", strict=True), "line 2: no answer",
     None, dict(strict=False)),
    # train.py
    (nothing, TRAIN, TRAINED, "go on with --resume", None, dict(resume=True)),
    (nothing, TRAIN, TRAINED, "replace it with --overwrite", None, dict(overwrite=True)),
    (nothing, TRAIN, TRAINED, "or name another$", None, dict(out_dir="new")),
    (nothing, TRAIN, dict(out_dir="out", resume=True, seed=3), "drop --seed=3 .it ran with 1337.",
     None, dict(seed=1337)),
    (nothing, TRAIN, dict(out_dir="out", resume=True, learning_rate=3.0), "drop --learning_rate=3.0 .it ran with 0.002",
     None, dict(learning_rate=0.002)),
    (nothing, TRAIN, dict(out_dir="out", resume=True, seed=3), "with --init_from=out", None,
     dict(resume=False, out_dir="new", init_from="out")),
    (cut("out/ckpt.pt", 900), TRAIN, dict(out_dir="out", resume=True), "start anew with --overwrite", None,
     dict(resume=False, overwrite=True)),
    (again(seed=5), TRAIN, dict(out_dir="out", resume=True), "prepare it as before", again(), {}),
    (nothing, TRAIN, dict(out_dir="new", resume=True), "start one without --resume", None, dict(resume=False)),
    (cut("data/train_00000.npy", 900), TRAIN, dict(out_dir="new"), "run prepare_data.py again", again(), {}),
    (gone("data/meta.json"), TRAIN, dict(out_dir="new"), "run python prepare_data.py first", again(), {}),
    (nothing, TRAIN, dict(out_dir="new", lora_rank=2), "name them with --init_from", None, dict(init_from="model")),
    (nothing, TRAIN, dict(out_dir="new", lora_rank=2, init_from="model", lora_targets="q_proj"),
     "this model's are c_attn, c_fc, c_proj", None, dict(lora_targets="c_attn,c_fc")),
    (nothing, TRAIN, dict(out_dir="new", init_from="adapter", lora_rank=2), "sample.py --model=adapter --export=",
     lambda path: sample.main(SampleConfig(model="adapter", export="plain", data_dir="data")), dict(init_from="plain")),
    (nothing, TRAIN, dict(out_dir="new", low_memory=True, beta2=0.999), "needs --beta2=0.99", None, dict(beta2=0.99)),
    (lambda path: tiny(block_size=60).save_pretrained(path / "short"), TRAIN, dict(out_dir="new", init_from="short"),
     "prepare the data with --block_size=60", again(block_size=60), {}),
    # sample.py
    (nothing, SAMPLE, dict(model="no/where/at", prompt="x"), "an out_dir of train.py", None, dict(model="out")),
    (lambda path: wording(template="alpaca")(path / "model"), SAMPLE, dict(prompt="x", system="s"), "leave it out",
     None, dict(system="")),
    (lambda path: TWO(path / "model"), SAMPLE, PROMPT, "give a JSON object", None,
     dict(prompt='{"title": "a", "text": "b"}')),
    (nothing, SAMPLE, dict(prompt="x" * 600), "shorten it", None, dict(prompt="x" * 400)),
    (nothing, SAMPLE, dict(export="model"), "name another directory", None, dict(export="new")),
    (gone("model/prompt.json"), SAMPLE, PROMPT, "give the --data_dir that it was trained on",
     None, dict(data_dir="data")),
    (lambda path: wording(template=3)(path / "model"), SAMPLE, PROMPT, "remove it and give --data_dir",
     gone("model/prompt.json"), dict(data_dir="data")),
    (nothing, SAMPLE, dict(file="data/none.jsonl"), "give a file, a directory with",
     again(test_fraction=0.2), dict(file="data/test.jsonl")),
    (put("x.jsonl", ""), SAMPLE, dict(file="x.jsonl"), "give one that does", put("x.jsonl", ONE), {}),
    (put("x.jsonl", '{"text": "t"}'), SAMPLE, dict(file="x.jsonl"), "give each record a prompt",
     put("x.jsonl", ONE), {}),
    (put("x.jsonl", ONE), SAMPLE, dict(file="x.jsonl", output="data"), "name a file", None, dict(output="y.jsonl")),
]


@pytest.mark.parametrize("change, script, flags, message, repair, other_flags", REMEDIES,
                         ids=[row[3][:50] for row in REMEDIES])
def test_remedies_work(change, script, flags, message, repair, other_flags, work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(train.pictures, "plot_losses", lambda *_: None)
    main, config_class, defaults = {
        PREPARE: (prepare_data.main, PrepareConfig, dict(encoding="bytes", out_dir="x", show=0, val_fraction=0,
                                                         test_fraction=0)),
        TRAIN: (train.main, TrainConfig, dict(data_dir="data", n_layer=1, n_head=1, n_embd=8, device="cpu",
                                              dtype="float32", max_steps=1)),
        SAMPLE: (sample.main, SampleConfig, dict(model="model", device="cpu", dtype="float32", max_new_tokens=2)),
    }[script]

    def run(flags):
        if script == TRAIN and flags.get("resume"):  # the flags that a resumed run may have
            flags = {name: value for name, value in flags.items() if not name.startswith("n_")}
        return main(config_class(**flags))
    change(tmp_path)
    with pytest.raises(UserError, match=message):
        run({**defaults, **flags})
    if repair:
        repair(tmp_path)
    run({**defaults, **flags, **other_flags})


# ---- fuzzing --------------------------------------------------------------------------------------------------------

FUZZ = int(os.environ.get("FUZZ", 1))
fuzz = settings(max_examples=100 * FUZZ, deadline=None, derandomize=FUZZ == 1, database=None,
                suppress_health_check=list(HealthCheck))
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
        content[start:stop] = draw(st.binary(max_size=4) | st.sampled_from([
            b"", bytes(content[start:stop]) * 2, b"\0", b"\xff" * 8, b'"', b"{", b"[", b"\n", b"\r", b",", b"-",
            b"9" * 20, b"\\ud800", b"null", b"1e999", b"NaN", b"\xf0\x9f", b"[" * 2000]))
    return bytes(content[:draw(st.integers(0, len(content)) | st.just(len(content)))])


def survives(function, *args):
    """What the function returns, or None where it refuses in one line."""
    try:
        return function(*args)
    except (UserError, OSError) as error:
        assert str(error).isprintable() and len(str(error)) < 1001
        return None


CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]
SETS = [colour_records(4), CHATS, [{"prompt": "a", "completion": "b"}] * 2, [{"text": "la"}, {"text": "é🙂"}],
        [chat["messages"] for chat in CHATS[:1]] * 2,
        [{"question": 3, "answer": True, "system": "s", "history": [["a", "b"]]}],
        [{"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]}]]
PLAIN = [*("".join(json.dumps(record) + "\n" for record in records).encode() for records in SETS),
         *(json.dumps(records).encode() for records in SETS),
         *(json.dumps({"data": records}, indent=1).encode("utf-16") for records in SETS),
         json.dumps({"question": ["a", "b"], "answer": ["c", "d"]}).encode(), b"la\n<|endoftext|>\nlo\n",
         b'text,b\n"a ""x""\n1",2\nb,3\n', b"instruction\toutput\na\tb\r\nc\td\r\n",
         b'question; answer;;\n"a \\"x\\""; "b";;\n']
FILES = [*PLAIN, *(gzip.compress(content) for content in PLAIN)]


@fuzz
@given(content=mutated(FILES) | st.binary(max_size=200) | st.lists(VALUES, max_size=3).map(json.dumps).map(str.encode),
       suffix=st.sampled_from([f".{end}" for end in "json jsonl csv tsv txt jsonl.gz csv.gz parquet".split()]),
       flags=st.sampled_from([
           {}, dict(template="alpaca"), dict(template="text"), dict(template=""), dict(strict=True),
           dict(separator="b"), dict(text_encoding="cp1252"), dict(val_fraction=0.3, test_fraction=0.3),
           dict(block_size=9), dict(prompt_format="{a}", response_format="{text}"),
           dict(template="text", response_format="{text}")]))
def test_fuzz_records(content, suffix, flags):
    with tempfile.TemporaryDirectory() as name:
        directory, expected = Path(name), {f"a{suffix}"}
        (directory / f"a{suffix}").write_bytes(content)
        meta = survives(lambda: prepared(directory / f"a{suffix}", directory / "data", **flags))
        if meta:  # what training reads is as it was counted, and every id is one of the vocabulary's
            expected.add("data")
            assert load_meta(directory / "data") == meta
            for split in ("train", "val"):
                shards = Shards(directory / "data", meta, split)
                assert len(shards) == meta[split]["examples"]
                if len(shards):
                    idx, targets, lengths = shards.batch(range(len(shards)))
                    assert 0 <= int(idx.min()) and int(max(idx.max(), targets.max())) < meta["vocab_size"]
                    assert sum(lengths) == len(idx) and max(lengths) <= meta["block_size"]
        assert {path.name for path in directory.iterdir()} == expected


@fuzz
@given(draw=st.data())
def test_fuzz_weights(draw, work):
    content, config_json = ((work / "model" / name).read_bytes() for name in ("model.safetensors", "config.json"))
    length, empty, sizes = 8 + int.from_bytes(content[:8], "little"), torch.empty, [0]
    header = draw.draw(mutated([content[8:length]]))
    changed = draw.draw(mutated([content]) | st.just(len(header).to_bytes(8, "little") + header + content[length:]))

    def watched(*args, **options):
        tensor = empty(*args, **options)
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "model.safetensors").write_bytes(changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", watched)
            survives(lambda: list(read_safetensors(Path(directory) / "model.safetensors")))
        assert max(sizes) <= len(changed)  # a false header allocates no more than the file has
        if draw.draw(st.booleans()):
            (Path(directory) / "config.json").write_bytes(draw.draw(mutated([config_json])))
        survives(GPT.from_pretrained, directory)
