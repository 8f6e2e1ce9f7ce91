"""prepare_data.py: what is learned from, exactly; splits, formats and the messages for bad records."""
import csv
import functools
import gzip
import http.server
import json
import threading

import numpy as np
import pytest
from conftest import SHARED, colour_records
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from console import UserError
from prepare_data import EOT, START, SUPERVISED, PrepareConfig, encode, get_encoding, render
from records import to_messages

BYTES = get_encoding("bytes")
STOP = BYTES.eot_token


def spec(template="alpaca", prompt_format="", response_format=""):
    return {"template": template, "prompt_format": prompt_format, "response_format": response_format}


def load(data_dir, split="train"):
    """The (ids, flags) of every example of a split, as lists."""
    meta = json.loads((data_dir / "meta.json").read_text())
    tokens = np.concatenate([np.load(data_dir / name) for name in meta[split]["shards"]])
    starts = np.append(np.flatnonzero(tokens["flags"] & START), len(tokens))
    return [(tokens["id"][start:stop].tolist(), tokens["flags"][start:stop].tolist())
            for start, stop in zip(starts[:-1], starts[1:], strict=True)]


def learned(ids, flags):
    """The supervised tokens as text, ⏹ for end-of-text."""
    return "".join("⏹" if token == STOP else chr(token) for token, flag in zip(ids, flags, strict=True)
                   if flag & SUPERVISED)


# ---- rendering: golden ids and flags per template -------------------------------------------------------------------

def golden(*segments):
    """Ids and flags spelled out by hand: text or STOP, each with whether it is supervised."""
    ids, flags = [], []
    for text, supervised in segments:
        part = [STOP] if text == STOP else list(text.encode())
        ids, flags = ids + part, flags + [SUPERVISED if supervised else 0] * len(part)
    return ids, bytes([START, *flags[1:]])


def test_alpaca_is_the_papers_prompt_and_only_the_answer_and_its_stop_are_learned():
    record = {"instruction": "Name it.", "input": "x", "output": "An x."}
    text = ("Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nName it.\n\n### Input:\nx\n\n"
            "### Response:\n")
    assert encode(render(to_messages(record, spec()), spec()), BYTES) == golden((text, 0), ("An x.", 1), (STOP, 1))
    del record["input"]
    text = ("Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nName it.\n\n### Response:\n")
    assert encode(render(to_messages(record, spec()), spec()), BYTES) == golden((text, 0), ("An x.", 1), (STOP, 1))


CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Oh"}]
CHAT = [(STOP, 0), ("system\nBe brief.", 0), (STOP, 0), ("user\nHi", 0), (STOP, 0), ("assistant\n", 0), ("Ho", 1),
        (STOP, 1), ("user\nBye", 0), (STOP, 0), ("assistant\n", 0), ("Oh", 1), (STOP, 1)]


def test_chat_learns_every_answer_and_the_stop_right_after_it():
    record = {"messages": CONVERSATION}
    assert encode(render(to_messages(record, spec("chat")), spec("chat")), BYTES) == golden(*CHAT)
    names = {"user": "human", "assistant": "gpt"}
    record = {"conversations": [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]}
                                for turn in CONVERSATION]}
    assert encode(render(to_messages(record, spec("chat")), spec("chat")), BYTES) == golden(*CHAT)


def test_text_learns_every_token_and_prompt_completion_is_rendered_as_it_is():
    assert encode(render(to_messages({"text": "la la"}, spec()), spec()), BYTES) == golden(
        (STOP, 0), ("la la", 1), (STOP, 1))
    for key in ("completion", "response"):
        record = {"prompt": "2+2=", key: "4"}
        assert encode(render(to_messages(record, spec()), spec()), BYTES) == golden(("2+2=", 0), ("4", 1), (STOP, 1))


def test_formats_replace_names_and_nothing_else():
    formats = spec("alpaca", 'T: {title} {"k": 1}\n{a b}', " {label}{}")
    record = {"title": "{label} <|endoftext|> %s", "a b": 2.5, "label": "math", "unused": None}
    assert encode(render(to_messages(record, formats), formats), BYTES) == golden(
        ('T: {label} <|endoftext|> %s {"k": 1}\n2.5', 0), (" math{}", 1), (STOP, 1))
    with pytest.raises(UserError, match=r"--prompt_format names \{titel\}; the columns are title"):
        to_messages(record, spec("alpaca", "{titel}", "{label}"))
    assert encode(render(to_messages({"label": "a"}, spec("alpaca", "", "{label}")), spec("alpaca", "", "{label}")),
                  BYTES) == golden((STOP, 0), ("a", 1), (STOP, 1))  # something must stand before the first token


TEXT = st.text(max_size=30) | st.sampled_from(
    ["<|endoftext|>", "### Response:\n", "user\nhi", "assistant\n", "\n\nsystem\nobey", "{output}", "a\x00b"])


@st.composite
def records(draw):
    kind = draw(st.sampled_from(["alpaca", "chat", "prompt", "formats"]))
    if kind == "alpaca":
        return {"instruction": draw(TEXT), "input": draw(TEXT), "output": draw(TEXT)}, spec("alpaca")
    if kind == "prompt":
        return {"prompt": draw(TEXT), "completion": draw(TEXT)}, spec("alpaca")
    if kind == "formats":
        return {"a": draw(TEXT), "b": draw(TEXT), "c": draw(TEXT)}, spec("alpaca", "{a}\n{b}:", " {c}")
    turns = draw(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=4))
    turns = [*turns, ("user", draw(TEXT)), ("assistant", draw(TEXT))]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}, spec("chat")


@settings(max_examples=300, deadline=None)
@given(records())
def test_the_sampling_prompt_is_how_training_began_and_no_content_becomes_a_special_token(case):
    record, wording = case
    messages = to_messages(record, wording)
    ids, flags = encode(render(messages, wording), BYTES)
    answer = next(iter(messages[-1][1].values()))
    prompt, _ = encode(render(messages[:-1], wording), BYTES)
    assert ids == prompt + list(answer.encode()) + [STOP]
    assert [flag & SUPERVISED for flag in flags[len(prompt):]] == [1] * (len(ids) - len(prompt))
    turns = len(messages) + 1 if wording["template"] == "chat" else 1 + (ids[0] == STOP)
    assert ids.count(STOP) == turns  # one before each turn and one at the end, whatever the contents hold
    if wording["template"] == "chat":
        assert sum(flag & SUPERVISED for token, flag in zip(ids, flags, strict=True) if token == STOP) == sum(
            role == "assistant" for role, _ in messages)


def test_special_text_round_trips_in_gpt2s_encoding(gpt2_encoding):
    text = "<|endoftext|> and <|endoftext|>"
    ids, _ = encode(render(to_messages({"instruction": text, "output": text}, spec()), spec()), gpt2_encoding)
    assert ids.count(gpt2_encoding.eot_token) == 1 and ids[-1] == gpt2_encoding.eot_token
    assert gpt2_encoding.decode(ids[:-1]).endswith("### Response:\n" + text)


# ---- the whole script -----------------------------------------------------------------------------------------------

def test_an_oracle_that_knows_the_flags_learns_exactly_the_answers(prepare):
    data = prepare(colour_records(), val_fraction=0, test_fraction=0)
    expected = sorted(record["output"] + "⏹" for record in colour_records())
    assert sorted(learned(*example) for example in load(data)) == expected
    assert all(flags[0] == START and ids.count(STOP) == 3 for ids, flags in load(data))


def test_the_split_depends_on_the_prompt_alone_and_adding_records_moves_none(prepare):
    base = colour_records(300)
    again = [{**record, "output": record["output"].upper()} for record in base]
    first, both = prepare(base), prepare(base + again, "both.jsonl")

    def prompts(data):
        held_out = {json.loads(line)["instruction"] for line in (data / "test.jsonl").read_text().splitlines()}
        return held_out, {split: {bytes(token for token, flag in zip(ids, flags, strict=True)
                                        if not flag & SUPERVISED and token != STOP) for ids, flags in load(data, split)}
                          for split in ("train", "val")}

    held_out, shards = prompts(first)
    assert prompts(both) == (held_out, shards)
    assert not shards["train"] & shards["val"]
    meta = json.loads((first / "meta.json").read_text())
    assert 15 <= meta["test"]["examples"] <= 50 and 5 <= meta["val"]["examples"] <= 30
    assert json.loads((both / "meta.json").read_text())["train"]["examples"] == 2 * meta["train"]["examples"]
    assert meta["train"]["examples"] + meta["val"]["examples"] + meta["test"]["examples"] == 300


def test_exact_duplicates_are_dropped_and_counted(prepare, capsys):
    data = prepare(colour_records(20) * 3, val_fraction=0, test_fraction=0)
    assert len(load(data)) == 20
    assert "40 dropped: exact duplicates" in capsys.readouterr().out


LONG = {"instruction": "Repeat: " + "x" * 300, "input": "é" * 40, "output": "the answer"}


def test_overlong_examples_are_dropped_or_lose_prompt_but_never_answer_or_stop(prepare, capsys):
    records = [*colour_records(10), LONG]
    flags = dict(val_fraction=0, test_fraction=0, template="alpaca", block_size=300)
    assert len(load(prepare(records, **flags))) == 10
    assert "1 dropped: longer than --block_size=300" in capsys.readouterr().out
    examples = load(prepare(records, overlong="truncate", **flags))
    assert "1 truncated to --block_size=300" in capsys.readouterr().out
    long = examples[-1]
    assert len(examples) == 11 and len(long[0]) <= 301
    assert learned(*long) == "the answer⏹" and bytes(long[0][:-1]).startswith(b"Below is an instruction")
    assert "é" * 40 in bytes(long[0][:-1]).decode()  # the longest field alone was cut
    with pytest.raises(UserError, match="nothing to train on .*longer than --block_size=20"):
        prepare([LONG], overlong="truncate", val_fraction=0, test_fraction=0, block_size=20)


def test_long_text_is_cut_into_blocks_and_nothing_is_lost(prepare):
    song = "".join(chr(97 + i % 26) for i in range(1000))
    examples = load(prepare([{"text": song}, {"text": "short"}], val_fraction=0, test_fraction=0, block_size=64))
    assert "".join(learned(*example) for example in examples) == song + "⏹" + "short⏹"
    assert max(len(ids) for ids, _ in examples) == 65
    assert all(before[0][-1] == after[0][0] for before, after in zip(examples[:15], examples[1:16], strict=True))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_a_text_file_is_one_document_split_at_its_end(prepare, tmp_path, suffix):
    text = "".join(f"line {i} über 日本\r\n" for i in range(4000))
    path = tmp_path / f"book{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else b"\xef\xbb\xbf" + text.encode())
    data, plain = prepare(path), text.replace("\r\n", "\n")
    def part(split):
        return bytes(token for ids, flags in load(data, split) for token, flag in zip(ids, flags, strict=True)
                     if flag & SUPERVISED and token != STOP).decode()
    test = json.loads((data / "test.jsonl").read_text())["text"]
    assert part("train") + part("val") + test == plain
    assert len(test) == round(0.1 * len(plain)) and len(part("val")) == round(0.05 * len(plain))
    assert json.loads((data / "meta.json").read_text())["prompt"]["template"] == "text"


def test_a_document_is_tokenised_in_pieces_as_in_one(prepare, tmp_path, gpt2_encoding, monkeypatch):
    text = "\n".join(f"  Act {i}.\n\nEnter KING, {'spoken ' * (i % 5)}\t\n   aside" for i in range(3000))
    (tmp_path / "play.txt").write_text(text)
    monkeypatch.setattr(prepare_data, "PIECE", 1000)
    data = prepare(tmp_path / "play.txt", encoding="gpt2", val_fraction=0, test_fraction=0)
    ids = [token for ids, flags in load(data) for token, flag in zip(ids, flags, strict=True) if flag & SUPERVISED]
    assert ids == gpt2_encoding.encode_ordinary(text) + [gpt2_encoding.eot_token]


def table(path, rows, delimiter):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    return path


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables_keep_quoted_newlines_and_every_character(prepare, tmp_path, suffix, delimiter):
    rows = [["title", "category"], ['A "quoted"\nline, two\r\nthree', "math"], ["naïve 🙂", "cs"]]
    data = prepare(table(tmp_path / f"t{suffix}", rows, delimiter), val_fraction=0, test_fraction=0,
                   prompt_format=r"{title}\n\tis:", response_format=" {category}")
    assert [bytes(ids[:-1]).decode() for ids, _ in load(data)] == [
        'A "quoted"\nline, two\r\nthree\n\tis: math', "naïve 🙂\n\tis: cs"]
    assert json.loads((data / "meta.json").read_text())["prompt"]["prompt_format"] == "{title}\n\tis:"


def test_shards_hold_whole_examples_and_join_to_the_same_tokens(prepare):
    one, many = prepare(colour_records()), prepare(colour_records(), shard_tokens=200)
    shards = json.loads((many / "meta.json").read_text())["train"]["shards"]
    assert len(shards) > 5 and load(one) == load(many)
    assert all(np.load(many / name)["flags"][0] & START for name in shards)


def test_the_same_input_gives_the_same_bytes_and_a_new_run_replaces_the_old(prepare, tmp_path):
    one = prepare(colour_records())
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    prepare(colour_records()[:30], "fewer.jsonl", out_dir=str(one), shard_tokens=50)
    prepare(colour_records(), out_dir=str(one))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before
    (one / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not ours .notes.txt."):
        prepare(colour_records(), out_dir=str(one))


def test_the_bundled_demo_keeps_its_promises():
    lines = (prepare_data.Path(prepare_data.__file__).parent / "data" / "demo.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert 1100 <= len(records) <= 4000 and sum(map(len, lines)) < 1_000_000
    assert len({record["output"] for record in records}) == len(records)  # no held-out answer can occur in training
    assert sum("passive" in record["instruction"] for record in records) > len(records) / 2


def test_the_chef_is_held_out(tmp_path, monkeypatch):
    prepare_data.main(PrepareConfig(out_dir=str(tmp_path / "demo"), show=0))
    held_out = [json.loads(line) for line in (tmp_path / "demo" / "test.jsonl").read_text().splitlines()]
    chef = "Convert the active sentence to passive: 'The chef cooks the meal every day.'"
    assert [record["output"] for record in held_out if record["instruction"] == chef] == [
        "The meal is cooked by the chef every day."]


# ---- bad input ------------------------------------------------------------------------------------------------------

GOOD = '{"instruction": "a", "output": "b"}\n'
BAD = {
    "not_json.jsonl": (GOOD + "{oops}\n", "not_json.jsonl, line 2, column 2: not valid JSON"),
    "cut.json": ('[{"instruction": "a", "output": "b"}, {"instr', "cut.json.*not valid JSON"),
    "missing.jsonl": (GOOD + '{"instruction": "a"}\n', "missing.jsonl, line 2: 'output' is missing"),
    "unknown.jsonl": (GOOD + '{"question": "a", "answer": "b"}\n', "line 2: unknown kind of record with 'question'"),
    "nested.json": ('[{"instruction": "a", "output": {"b": null}}]', "record 1: 'output' must be text, not"),
    "null.jsonl": ('{"instruction": null, "output": "b"}\n', "line 1: 'instruction' must be text, not null"),
    "list.jsonl": (GOOD + "[1, 2]\n", r"line 2: a record is an object with named fields, not \[1, 2\]"),
    "number.json": ("3", "line 1: a record is an object"),
    "surrogate.jsonl": (GOOD + '{"instruction": "\\ud800", "output": "b"}\n',
                        "line 2: 'instruction': half a surrogate pair"),
    "latin1.jsonl": (GOOD.encode() + b'{"instruction": "caf\xe9", "output": "b"}\n', "UTF-8"),
    "empty.jsonl": ("", "leaves nothing to train on .it is empty"),
    "empty.json": ("", "leaves nothing to train on"),
    "no_answers.jsonl": ('{"instruction": "a", "output": ""}\n' * 3, "nothing to train on .*3 dropped: no answer"),
    "role.jsonl": ('{"messages": [{"role": "root", "content": "x"}]}\n', "line 1: the role 'root' is none of system"),
    "turns.jsonl": ('{"messages": ["hi"]}\n', "line 1: a conversation is a list of"),
    "several.jsonl": (json.dumps({"messages": CONVERSATION}) + "\n", "line 1: the alpaca template holds one question"),
    "ragged.csv": ("a,b\n1,2\n3\n", "ragged.csv, line 3: 1 fields where the header has 2"),
    "twice.csv": ("a,a\n1,2\n", "twice.csv, line 1: duplicate column names"),
    "broken.csv": ('a,b\n"1,2\n', "broken.csv.*unexpected end of data"),
    "deep.jsonl": ("[" * 100_000 + "\n", "deep.jsonl.*line 1"),
    "cut.jsonl.gz": (gzip.compress(GOOD.encode() * 50)[:-12], "cut.jsonl.gz"),
    "table.xlsx": ("x", "table.xlsx is none of .json .jsonl"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_with_the_place_and_leaves_nothing(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    config = PrepareConfig(input=str(tmp_path / name), out_dir=str(tmp_path / "data"), encoding="bytes",
                           val_fraction=0, test_fraction=0)
    with pytest.raises(UserError, match=message) as caught:
        prepare_data.main(config)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_flags_out_of_range_are_all_named_at_once():
    with pytest.raises(UserError, match=r"--val_fraction: 2.0 .*--template: 'x'.*--block_size: 0"):
        PrepareConfig(val_fraction=2.0, template="x", block_size=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/instruction-data.json")
def test_the_chapter_7_records(gpt2_encoding, tmp_path, capsys):
    source = str(SHARED / "data" / "instruction-data.json")
    meta = prepare_data.main(PrepareConfig(input=source, out_dir=str(tmp_path / "d")))
    assert sum(meta[split]["examples"] for split in ("train", "val", "test")) == 1100
    assert meta["vocab_size"] == 50257 and meta["eot"] == 50256 and EOT is None
    assert ">>>" in capsys.readouterr().out
    for ids, flags in load(tmp_path / "d"):
        assert ids.count(50256) == 1 and ids[-1] == 50256 and flags[-1] == SUPERVISED


# ---- found by trying to break it ------------------------------------------------------------------------------------

def test_a_file_is_never_taken_for_an_out_dir_and_a_link_stays_one(tmp_path):
    source = tmp_path / "records.jsonl"
    source.write_text(GOOD * 1)
    flags = dict(input=str(source), encoding="bytes", val_fraction=0, test_fraction=0, show=0)
    with pytest.raises(UserError, match="is a file; name a directory"):
        prepare_data.main(PrepareConfig(**flags, out_dir=str(source)))
    assert source.read_text() == GOOD
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare_data.main(PrepareConfig(**flags, out_dir=str(tmp_path / "link")))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "meta.json").is_file()


def test_kinds_are_not_mixed(prepare):
    for first, second in (({"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}),
                          ({"prompt": "a", "completion": "b"}, {"prompt": "c", "response": "d"}),
                          ({"text": "a"}, {"instruction": "a", "output": "b"})):
        with pytest.raises(UserError, match="line 2: a .* record among .* records"):
            prepare([first, second])


def test_what_truncation_makes_equal_is_dropped(prepare, capsys):
    records = [{"prompt": "c" * 200 + f" {i}", "completion": "b"} for i in range(100)]
    data = prepare(records, block_size=100, overlong="truncate", val_fraction=0, test_fraction=0)
    assert len(load(data)) == 1
    assert "99 dropped: exact duplicates" in capsys.readouterr().out


def test_truncation_shortens_field_after_field_by_tokens(prepare):
    record = {"instruction": "i" * 120, "input": "é漢" * 55, "output": "the answer"}
    (ids, flags), = load(prepare([record], template="alpaca", block_size=330, overlong="truncate", val_fraction=0,
                                 test_fraction=0))
    assert learned(ids, flags) == "the answer⏹" and len(ids) <= 331 and b"i" * 100 in bytes(ids[:-1])


def test_conversations_that_open_with_the_same_greeting_are_split(prepare):
    records = [{"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": f"q{i}"},
                                  {"from": "gpt", "value": "a"}]} for i in range(200)]
    data = prepare(records, val_fraction=0.2, test_fraction=0.2)
    meta = json.loads((data / "meta.json").read_text())
    assert all(20 <= meta[split]["examples"] <= 150 for split in ("train", "val", "test"))


def test_missing_values_are_not_learned(prepare, capsys):
    records = [{"instruction": "a", "input": float("nan"), "output": "b"}, {"instruction": "c", "output": "  "}]
    (ids, _), = load(prepare(records, template="alpaca", val_fraction=0, test_fraction=0, block_size=400))
    assert b"nan" not in bytes(ids[:-1]) and "1 dropped: no answer" in capsys.readouterr().out
    with pytest.raises(UserError, match="'output' must be text, not NaN"):
        prepare([{"instruction": "a", "output": float("nan")}])


@pytest.mark.parametrize("name, content", [("a.txt", b"caf\xe9"), ("a.txt.gz", gzip.compress(b"text" * 99)[:-9]),
                                           ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99)[:20] + b"x" * 40)])
def test_damaged_files_get_one_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        prepare_data.main(PrepareConfig(input=str(tmp_path / name), out_dir=str(tmp_path / "d"), encoding="bytes"))
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a b.jsonl", "http://127.0.0.1:1/é.jsonl"])
def test_a_url_that_cannot_be_fetched_gets_one_line(url, tmp_path):
    with pytest.raises(UserError, match="--input: cannot download"):
        prepare_data.main(PrepareConfig(input=url, out_dir=str(tmp_path / "d"), encoding="bytes"))


def test_a_url_is_fetched_and_read_like_a_file(tmp_path):
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress(GOOD.encode()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    meta = prepare_data.main(PrepareConfig(
        input=f"http://127.0.0.1:{server.server_port}/records.jsonl.gz?download=true", out_dir=str(tmp_path / "data"),
        encoding="bytes", val_fraction=0, test_fraction=0))
    server.shutdown()
    assert meta["source"] == "records.jsonl.gz" and learned(*load(tmp_path / "data")[0]) == "b⏹"


def test_turns_that_nobody_answered_are_cut_and_counted(prepare, capsys):
    asked, answered = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    records = [{"messages": [asked]}, {"messages": [asked, answered, asked]}]
    (ids, flags), = load(prepare(records, val_fraction=0, test_fraction=0))
    assert learned(ids, flags) == "x⏹" and bytes(token for token in ids if token != STOP) == b"user\nxassistant\nx"
    out = capsys.readouterr().out
    assert "1 cut: turns at the end that nobody answered" in out and "1 dropped: no answer" in out


def test_a_prompt_that_is_shortened_stands_on_one_side_with_all_its_answers(prepare):
    """Answers of different length shorten it differently."""
    records = [{"instruction": f"Question {i}: " + "why " * 40, "output": "yes " * answer}
               for i in range(40) for answer in (2, 9, 17)]
    data = prepare(records, overlong="truncate", test_fraction=0.3, val_fraction=0)
    held = [json.loads(line)["instruction"] for line in (data / "test.jsonl").read_text().splitlines()]
    assert 0 < len(held) < 120 and all(held.count(prompt) == 3 for prompt in held)
