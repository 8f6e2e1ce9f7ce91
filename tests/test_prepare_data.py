"""prepare_data.py: what is learned from, exactly; the split, the formats, the shards."""
import csv
import gzip
import json
from itertools import combinations

import jinja2
import numpy as np
import pytest
from conftest import ROOT, SHARED, chat_model, colour_records, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
from model import IGNORE_INDEX
from nanosft.console import UserError
from nanosft.records import to_messages
from nanosft.shards import (
    START,
    SUPERVISED,
    Shards,
    ShardWriter,
    examples_of_step,
    load_meta,
    micro_batches,
    order_of_epoch,
)
from nanosft.templates import EOT, as_rendered, chat_template, encode, get_encoding, render
from prepare_data import PrepareConfig

BYTES = get_encoding("bytes")
STOP = BYTES.eot_token
ALL = dict(val_fraction=0, test_fraction=0)  # nothing is held out


def spec(template="alpaca", prompt_format="", response_format=""):
    return {"template": template, "prompt_format": prompt_format, "response_format": response_format}


def example(record, wording):
    return encode(render(to_messages(record, wording)[0], wording), BYTES)


def load(data_dir, split="train"):
    """The (ids, flags) of every example of a split, as lists."""
    shards = Shards(data_dir, load_meta(data_dir), split)
    return [(tokens["id"].tolist(), tokens["flags"].tolist()) for tokens in shards]


def learned(ids, flags):
    """The supervised tokens as text, ⏹ for end-of-text."""
    tokens = [token for token, flag in zip(ids, flags, strict=True) if flag & SUPERVISED]
    return "".join("⏹" if token == STOP else chr(token) for token in tokens)


# ---- templates: golden ids and flags --------------------------------------------------------------------------------

ABOUT = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
CONVERSATION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Bye"},
                {"role": "assistant", "content": "Oh"}]
SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
            for turn in CONVERSATION]
CHAT = [(STOP, 0), ("system\nBe brief.", 0), (STOP, 0), ("user\nHi", 0), (STOP, 0), ("assistant\n", 0), ("Ho", 1),
        (STOP, 1), ("user\nBye", 0), (STOP, 0), ("assistant\n", 0), ("Oh", 1), (STOP, 1)]
FORMATS = spec("alpaca", 'T: {title} {"k": 1}\n{a b}', " {label}{}")
# record, spec, its segments spelled out by hand: text or STOP, and whether it is supervised
GOLDEN = {
    "alpaca with an input": (
        {"instruction": "Name it.", "input": "x", "output": "An x."}, spec(),
        [(f"{ABOUT}, paired with an input that provides further context. {WRITE}Name it.\n\n### Input:\nx\n\n### "
          "Response:\n", 0), ("An x.", 1), (STOP, 1)]),
    "alpaca without": ({"instruction": "Name it.", "output": "An x."}, spec(),
                       [(f"{ABOUT}. {WRITE}Name it.\n\n### Response:\n", 0), ("An x.", 1), (STOP, 1)]),
    "chat": ({"messages": CONVERSATION}, spec("chat"), CHAT),
    "ShareGPT": ({"conversations": SHAREGPT}, spec("chat"), CHAT),
    "text": ({"text": "la la"}, spec(), [(STOP, 0), ("la la", 1), (STOP, 1)]),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, spec(), [("2+2=", 0), ("4", 1), (STOP, 1)]),
    "prompt and response": ({"prompt": "2+2=", "response": "4"}, spec(), [("2+2=", 0), ("4", 1), (STOP, 1)]),
    "formats replace names and nothing else": (
        {"title": "{label} <|endoftext|> %s", "a b": 2.5, "label": "math", "unused": None}, FORMATS,
        [('T: {label} <|endoftext|> %s {"k": 1}\n2.5', 0), (" math{}", 1), (STOP, 1)]),
    "something stands before the first token": (
        {"label": "a"}, spec("alpaca", "", "{label}"), [(STOP, 0), ("a", 1), (STOP, 1)]),
    "NaN is no input": ({"instruction": "a", "input": float("nan"), "output": "b"}, spec(),
                        [(f"{ABOUT}. {WRITE}a\n\n### Response:\n", 0), ("b", 1), (STOP, 1)]),
}


@pytest.mark.parametrize("record, wording, segments", GOLDEN.values(), ids=GOLDEN)
def test_ids_and_flags_of_every_kind_of_record(record, wording, segments):
    ids, flags = [], []
    for text, supervised in segments:
        part = [STOP] if text == STOP else list(text.encode())
        ids, flags = ids + part, flags + [supervised * SUPERVISED] * len(part)
    assert example(record, wording) == (ids, bytes([START, *flags[1:]]))


TEXT = st.text(max_size=30).filter(lambda text: text.strip()) | st.sampled_from(
    ["<|endoftext|>", "### Response:\n", "user\nhi", "assistant\n", "\n\nsystem\nobey", "{output}", "a\x00b"])


@st.composite
def records(draw):
    kind, texts = draw(st.sampled_from(["alpaca", "chat", "prompt", "formats"])), [draw(TEXT) for _ in range(3)]
    if kind == "alpaca":
        return dict(zip(("instruction", "input", "output"), texts, strict=True)), spec("alpaca")
    if kind == "prompt":
        return dict(zip(("prompt", "unused", "completion"), texts, strict=True)), spec("alpaca")
    if kind == "formats":
        return dict(zip("abc", texts, strict=True)), spec("alpaca", "{a}\n{b}:", " {c}")
    turns = draw(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=4))
    turns += [("user", texts[0]), ("assistant", texts[1])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}, spec("chat")


@settings(max_examples=300, deadline=None)
@given(records())
def test_the_sampling_prompt_is_how_training_began_and_no_content_becomes_a_special_token(case):
    record, wording = case
    messages, _ = to_messages(record, wording)
    ids, flags = encode(render(messages, wording), BYTES)
    answer = next(iter(messages[-1].fields.values()))
    prompt, _ = encode(render(messages[:-1], wording), BYTES)
    assert ids == prompt + list(answer.encode()) + [STOP]
    assert [flag & SUPERVISED for flag in flags[len(prompt):]] == [1] * (len(ids) - len(prompt))
    stops = [flag & SUPERVISED for token, flag in zip(ids, flags, strict=True) if token == STOP]
    if wording["template"] == "chat":  # one before each turn and one at the end, whatever the contents hold
        assert len(stops) == len(messages) + 1 and sum(stops) == sum(role == "assistant" for role, *_ in messages)
    else:
        assert sum(stops) == 1 and len(stops) == 1 + (ids[0] == STOP)


def jinja(wording, messages, unanswered=False):
    """What transformers renders with the template that sample.py exports."""
    def refuse(message):
        raise jinja2.TemplateError(message)
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        chat_template(wording), globals={"raise_exception": refuse})
    return template.render(messages=messages, add_generation_prompt=unanswered, eos_token="⏹", bos_token="⏵")


def test_the_exported_chat_template_is_ours_and_refuses_what_it_cannot_hold():
    def own(record, wording, stop=None):
        segments = render(to_messages(record, wording)[0][:stop], wording)
        return "".join("⏹" if text is EOT else text for text, _ in segments)

    assert jinja(spec("chat"), CONVERSATION) == own({"messages": CONVERSATION}, spec("chat"))
    assert jinja(spec("chat"), CONVERSATION[:-1], True) == own({"messages": CONVERSATION}, spec("chat"), -1)
    worded = {"role": "user", "content": "q is é"}, {"role": "assistant", "content": "b"}  # by hand, as the export says
    assert jinja(spec("chat", "q is {q}", "{a}"), worded) == own({"q": "é", "a": "b"}, spec("chat", "q is {q}", "{a}"))
    question, bos = 'é🙂 "a"\\n', {**spec(), "bos_token": "⏵", "starts_with_bos": True}
    one = [{"role": "user", "content": question}, {"role": "assistant", "content": "b"}]
    for record, wording in (({"instruction": question, "output": "b"}, spec()),
                            ({"prompt": question, "completion": "b"}, spec()),
                            ({"instruction": question, "output": "b"}, bos),
                            ({"q": question, "a": "b"}, spec("alpaca", '{q} "\n\\ 🙂 {q}:', "{a}"))):
        wording = as_rendered(to_messages(record, wording)[0], wording)
        assert jinja(wording, one) == own(record, wording) and jinja(wording, one[:1]) == own(record, wording, -1)
        for messages in ([], CONVERSATION[:2], CONVERSATION[1:4], CONVERSATION[1:], one[::-1], [one[0], one[0]]):
            with pytest.raises(jinja2.TemplateError, match="answers one question"):
                jinja(wording, messages)
    for wording in spec("text"), spec("alpaca", "", "{a}"), spec("alpaca", "{a}{b}", "{c}"):
        assert chat_template(wording) is None


# ---- splits, duplicates, lengths ------------------------------------------------------------------------------------

def test_few_different_answers_are_counted(prepare, capsys):
    records = [{"title": f"t{i}", "kind": ["cat", "dog"][i % 3 == 0]} for i in range(30)]
    for column, said in ("kind", "2 different answers: cat (20), dog (10)\n"), ("title", ""):
        prepare(records * 2, template="", prompt_format="{title}\n", response_format=f" {{{column}}}")
        out = capsys.readouterr().out
        assert said in out and ("different answers" in out) == bool(said)


def test_one_question_is_held_out_in_every_wording(prepare, tmp_path):
    asked = [(f"Name colour {i}.", f"of fruit {i}" if i % 2 else "") for i in range(100)]
    pairs = [{"instruction": a, "input": b, "output": "red"} for a, b in asked]
    turns = [{"messages": [{"role": "user", "content": f"{a}\n\n{b}" if b else a},
                           {"role": "assistant", "content": "green"}]} for a, b in asked]
    own = dict(template="", prompt_format="{instruction} {input} =", response_format=" {output}")
    held_out = []
    for records, flags in (pairs, {}), (pairs, dict(template="chat")), (turns, {}), (pairs, own), (
            turns, dict(model=chat_model(tmp_path / "m"), encoding="", template="")):
        lines = (prepare(records, **dict(template="", block_size=512) | flags) / "test.jsonl").read_text().splitlines()
        held_out.append([records.index(json.loads(line)) for line in lines])
    assert 3 <= len(held_out[0]) <= 25 and held_out == held_out[:1] * 5


@pytest.mark.parametrize("template", ["text", "model"])
def test_records_in_a_models_tokens_are_split_by_their_text_or_question(template, prepare, tmp_path):
    """All begin with the same special token, or the same greeting, which tells none from another."""
    records = {"text": [{"text": f"song {i}"} for i in range(60)], "model": [{"messages": [
        {"role": role, "content": content} for role, content in (
            ("assistant", "Hello!"), ("user", f"What is {i}?"), ("assistant", f"{i}."))]} for i in range(60)]}[template]
    data = prepare(records, model=chat_model(tmp_path / "m"), encoding="", template=template, val_fraction=0.2,
                   test_fraction=0.3)
    meta = load_meta(data)
    counts = [meta[split]["examples"] for split in ("train", "val", "test")]
    assert sum(counts) == 60 and all(6 <= count <= 40 for count in counts)


def test_pairs_are_no_texts_and_a_template_comes_with_a_tokenizer(prepare, tmp_path):
    with pytest.raises(UserError, match="--template=text holds records with 'text', or --response_format"):
        prepare([{"prompt": "q", "completion": "a"}], template="text")
    tiny().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(UserError, match="--template=model: .*m brings no chat template; take"):
        prepare(colour_records(), template="model", encoding="", model=str(tmp_path / "m"))


def test_the_split_depends_on_the_prompt_alone_and_adding_records_moves_none(prepare):
    base = colour_records(300)
    again = [{**record, "output": record["output"].upper()} for record in base]
    first, both = prepare(base), prepare(base + again)

    def prompts(data):
        test = {json.loads(line)["instruction"] for line in (data / "test.jsonl").read_text().splitlines()}
        train, val = ({tuple(ids[:flags.index(SUPERVISED)]) for ids, flags in load(data, split)}
                      for split in ("train", "val"))
        return test, train, val

    test, train, val = prompts(first)
    assert prompts(both) == (test, train, val) and not train & val
    counts = [load_meta(first)[split]["examples"] for split in ("train", "val", "test")]
    assert sum(counts) == 300 and 5 <= counts[1] <= 30 and 15 <= counts[2] <= 50
    assert load_meta(both)["train"]["examples"] == 2 * counts[0]


def test_the_chef_is_held_out(tmp_path):
    prepare_data.main(PrepareConfig(out_dir=str(tmp_path / "demo"), show=0))
    held_out = [json.loads(line) for line in (tmp_path / "demo" / "test.jsonl").read_text().splitlines()]
    chef = "Convert the active sentence to passive: 'The chef cooks the meal every day.'"
    assert [record["output"] for record in held_out if record["instruction"] == chef] == [
        "The meal is cooked by the chef every day."]
    lines = (ROOT / "data" / "demo.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert 1100 <= len(records) <= 4000 and sum(map(len, lines)) < 1_000_000
    assert len({record["output"] for record in records}) == len(records)  # no held-out answer can occur in training
    assert sum("passive" in record["instruction"] for record in records) > len(records) / 2


def test_conversations_that_open_with_the_same_greeting_are_split(prepare):
    records = [{"conversations": [{"from": "gpt", "value": "Hello!"}, {"from": "human", "value": f"q{i}"},
                                  {"from": "gpt", "value": "a"}]} for i in range(200)]
    meta = load_meta(prepare(records, val_fraction=0.2, test_fraction=0.2))
    assert all(20 <= meta[split]["examples"] <= 150 for split in ("train", "val", "test"))


USER, ANSWER = [{"role": role, "content": "x"} for role in ("user", "assistant")]
LONG = {"instruction": "Repeat: " + "x" * 300, "input": "é" * 40, "output": "the answer"}
# records, flags, how many examples are left, a line of the report
COUNTED = {
    "duplicates": (colour_records(20) * 3, {}, 20,
                   "40 dropped: same prompt and answer as before (first: records.jsonl, line 21)"),
    "other answers learned": ([{"messages": [USER, {**ANSWER, "weight": first}, USER, {**ANSWER, "weight": 1 - first}]}
                               for first in (1, 0, 1)], {}, 2,
                              "1 dropped: same prompt and answer as before (first: records.jsonl, line 3)"),
    "overlong": ([*colour_records(10), LONG], dict(template="alpaca", block_size=300), 10,
                 "1 dropped: longer than --block_size=300 (first: records.jsonl, line 11)"),
    "nobody answered": ([{"messages": [USER]}, {"messages": [USER, ANSWER, USER]}], {}, 1,
                        "1 cut: turns at the end that nobody answered"),
}


@pytest.mark.parametrize("records, flags, left, line", COUNTED.values(), ids=COUNTED)
def test_what_is_dropped_or_cut_is_counted(records, flags, left, line, prepare, capsys):
    data = prepare(records, **ALL, **flags)
    assert len(load(data)) == left and line in capsys.readouterr().out.splitlines()


# ---- formats --------------------------------------------------------------------------------------------------------

def test_long_text_is_cut_into_blocks_and_nothing_is_lost(prepare):
    song = "".join(chr(97 + i % 26) for i in range(1000))
    examples = load(prepare([{"text": song}, {"text": "short"}], block_size=64, **ALL))
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
    assert load_meta(data)["prompt"]["template"] == "text"


@pytest.mark.parametrize("suffix, delimiter", [(".csv", ","), (".tsv", "\t")])
def test_tables_keep_quoted_newlines_and_every_character(prepare, tmp_path, suffix, delimiter):
    rows = [["title", "category"], ['A "quoted"\nline, two\r\nthree', "math"], ["naïve 🙂", "cs"]]
    with open(tmp_path / f"t{suffix}", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter, lineterminator="\r\n").writerows(rows)
    data = prepare(tmp_path / f"t{suffix}", prompt_format=r"{title}\n\tis:", response_format=" {category}", **ALL)
    assert [bytes(ids[:-1]).decode() for ids, _ in load(data)] == [
        'A "quoted"\nline, two\r\nthree\n\tis: math', "naïve 🙂\n\tis: cs"]
    assert load_meta(data)["prompt"]["prompt_format"] == "{title}\n\tis:"


# ---- shards ---------------------------------------------------------------------------------------------------------

def test_shards_hold_whole_examples_and_join_to_the_same_tokens(prepare):
    one, many = prepare(colour_records()), prepare(colour_records(), shard_tokens=200)
    shards = load_meta(many)["train"]["shards"]
    assert len(shards) > 5 and load(one) == load(many)
    assert all(np.load(many / name)["flags"][0] & START for name in shards)


def test_batches_hold_each_example_once_with_the_next_token_as_target(prepare):
    data = prepare(colour_records(), **ALL)
    shards = Shards(data, load_meta(data), "train", max_examples=50)
    own = {}
    for world_size in (1, 3, 60):
        batches = [shards.batches(range(50), 150, rank, world_size) for rank in range(world_size)]
        assert [len(mine) > 0 for mine in batches] == [rank < 50 for rank in range(world_size)]
        seen = []
        for idx, targets, lengths in (batch for mine in batches for batch in mine):
            assert len(lengths) * max(lengths) <= 150 or len(lengths) == 1
            seen += zip(map(tuple, idx.split(lengths)), map(tuple, targets.split(lengths)), strict=True)
        own[world_size] = sorted((list(map(int, idx)), list(map(int, targets))) for idx, targets in seen)
    expected = [(ids[:-1], [token if flag & SUPERVISED else IGNORE_INDEX for token, flag in zip(
        ids[1:], flags[1:], strict=True)]) for ids, flags in load(data)[:50]]
    assert own[1] == own[3] == own[60] == sorted(expected)
    assert shards.supervised(range(50)) == sum(target != IGNORE_INDEX for _, targets in expected for target in targets)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(1, 400))
def test_packing_ends_and_places_every_example_once_within_max_tokens(lengths, max_tokens):
    groups = micro_batches(range(len(lengths)), lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens for group in groups)
    assert max(lengths) == lengths[groups[0][0]]  # the longest goes first


class Lengths(list):
    """What of Shards the order of examples depends on."""
    __hash__ = object.__hash__
    lengths = property(np.array)


def test_a_conversation_of_more_turns_than_tokens_is_dropped_before_it_is_rendered(prepare, monkeypatch, capsys):
    rendered, real = [], prepare_data.templates.render
    monkeypatch.setattr(prepare_data.templates, "render", lambda kept, spec: rendered.append(kept) or real(kept, spec))
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    prepare([{"messages": turns * n} for n in [300, *range(1, 20)]], template="chat", block_size=599)
    assert len(rendered) == 19
    assert "1 dropped: longer than --block_size=599 (first: records.jsonl, line 1)" in capsys.readouterr().out


def test_an_epoch_is_shuffled_once_and_the_first_begins_with_the_longest_example():
    order_of_epoch.cache_clear()
    data = Lengths(np.random.default_rng(3).integers(1, 90, 1003).tolist())
    first, second = ([examples_of_step(step, data, 8, seed=77).tolist() for step in range(start, start + 126)]
                     for start in (0, 126))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(1003))
    assert order_of_epoch.cache_info().misses == 2
    assert max(data.lengths[first[0]]) == max(data) > max(data.lengths[second[0]])
    assert [len(batch) for batch in first] == [len(batch) for batch in second] == [8] * 125 + [3]
    orders = [order_of_epoch(data, 8, seed, epoch) for seed, epoch in ((77, 0), (77, 1), (77, 2), (78, 0))]
    neighbours = [set(zip(order, np.roll(order, 1), strict=True)) for order in orders]  # a turned order has the same
    assert all(len(one & other) < 9 for one, other in combinations(neighbours, 2))


def test_the_same_input_gives_the_same_bytes_and_a_new_run_replaces_the_old(prepare, tmp_path, capsys):
    one, warning = prepare(colour_records()), "held other data: what was trained on them may have seen this test.jsonl"
    prepare(colour_records(), out_dir=one)
    assert warning not in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in one.iterdir()}
    prepare(colour_records()[:30], out_dir=one, shard_tokens=50)
    assert f"{one} {warning}" in capsys.readouterr().out
    (tmp_path / "link").symlink_to(one)
    prepare(colour_records(), out_dir=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert {path.name: path.read_bytes() for path in one.iterdir()} == before


def test_files_that_come_while_preparing_stay(prepare, tmp_path, monkeypatch):
    out_dir, publish = prepare(colour_records(3)), prepare_data.publish

    def publish_late(work, place):
        (place / "thesis.tex").write_text("years of work")
        publish(work, place)
    monkeypatch.setattr(prepare_data, "publish", publish_late)
    prepare(colour_records(3), out_dir=out_dir, block_size=200)
    assert (out_dir / "thesis.tex").read_text() == "years of work" and load_meta(out_dir)["block_size"] == 200
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]  # no unfinished directory


def test_flags_out_of_range_are_all_named_at_once():
    with pytest.raises(UserError, match=r"--val_fraction: 2.0 .*--template: 'x'.*--block_size: 1 is below 2"):
        PrepareConfig(val_fraction=2.0, template="x", block_size=1)
    with pytest.raises(UserError, match="--test_fraction: 0.5 .*--val_fraction=0.5 leaves nothing to train on"):
        PrepareConfig(val_fraction=0.5, test_fraction=0.5)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data/instruction-data.json")
def test_the_chapter_7_records(gpt2_encoding, tmp_path, capsys):
    source = str(SHARED / "data" / "instruction-data.json")
    meta = prepare_data.main(PrepareConfig(input=source, out_dir=str(tmp_path / "d")))
    assert sum(meta[split]["examples"] for split in ("train", "val", "test")) == 1100
    assert meta["vocab_size"] == 50257 and meta["stop"] == 50256 and meta == load_meta(tmp_path / "d")
    assert ">>>" in capsys.readouterr().out
    for ids, flags in load(tmp_path / "d"):
        assert ids.count(50256) == 1 and ids[-1] == 50256 and flags[-1] == SUPERVISED


def test_ids_above_16_bits_are_kept(tmp_path):
    writer = ShardWriter(tmp_path, "train", 70_000, 1000)
    writer.add([5, 65_537, 69_999], bytes([START, SUPERVISED, SUPERVISED]))
    writer.close()
    assert Shards(tmp_path, {"train": writer.counts}, "train")[0]["id"].tolist() == [5, 65_537, 69_999]


def test_a_prompt_and_its_answer_are_tokenised_apart(gpt2_encoding):
    record = {"prompt": "hello wor", "completion": "ld"}
    ids, _ = encode(render(to_messages(record, spec())[0], spec()), gpt2_encoding)
    assert ids[:-1] == gpt2_encoding.encode_ordinary("hello wor") + gpt2_encoding.encode_ordinary("ld")
