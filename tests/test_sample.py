"""sample.py: the prompts that training saw, whole characters while streaming, chats, files, scores, exports."""
import io
import json
import os
import stat
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import tiktoken
import torch
import transformers
from conftest import assert_same_logits, chat_model, colour_records, theirs, tiny, with_lora, write_lines
from test_tokenizer import trained

import sample
import train
from model import GPT
from nanosft import pictures, score
from nanosft.console import UserError
from nanosft.records import Message, to_messages
from nanosft.shards import FORMAT_VERSION, load_meta, write_meta
from nanosft.templates import decode, encode, get_encoding, render
from nanosft.tensors import read_safetensors
from sample import LoadedModel, SampleConfig
from train import TrainConfig

BYTES = get_encoding("bytes")
STOP = BYTES.eot_token
SPECS = {name: {"template": template, "prompt_format": prompt_format, "response_format": response_format}
         for name, template, prompt_format, response_format in (
             ("alpaca", "alpaca", "", ""), ("chat", "chat", "", ""), ("text", "text", "", ""),
             ("one", "alpaca", "Q: {question}\nA:", " {answer}"), ("answers", "alpaca", "", "{answer}"),
             ("two", "alpaca", "{title}|{abstract}|", "{label}"))}


def saved(path, spec, model=None, **changes):
    """The path of a model with its wording, as train.py leaves them."""
    (model or tiny(block_size=512, **changes)).save_pretrained(path)
    (path / "prompt.json").write_text(json.dumps({"encoding": "bytes", **spec}))
    return str(path)


def use(model, **flags):
    """sample.main with short, greedy answers on the CPU."""
    defaults = dict(model=str(model), device="cpu", dtype="float32", max_new_tokens=7)
    return sample.main(SampleConfig(**{**defaults, **flags}))


def turns(*contents, system=None):
    """Messages of user and assistant by turns, after a system message."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


@pytest.fixture
def heard(monkeypatch):
    """The prompts that reach the model, which answers with `replies`, lists of ids, one after the other."""
    heard = SimpleNamespace(prompts=[], replies=[])

    def generate(self, prompts, max_new_tokens, *_):
        heard.prompts.extend(prompts)
        reply = heard.replies.pop(0) if heard.replies else [STOP]
        for token in reply[:max_new_tokens]:
            yield [token] * len(prompts)
    monkeypatch.setattr(GPT, "generate", generate)
    return heard


# ---- prompts --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template, flags, record", [
    ("alpaca", dict(prompt="Hi"), {"instruction": "Hi", "output": "x"}),
    ("alpaca", dict(prompt="Do", input="this"), {"instruction": "Do", "input": "this", "output": "x"}),
    ("chat", dict(prompt="Hi"), {"instruction": "Hi", "output": "x"}),
    ("chat", dict(prompt="Hi", system="Be."), {"messages": turns("Hi", "x", system="Be.")}),
    ("one", dict(prompt='{"why?"'), {"question": '{"why?"', "answer": "x"}),
    ("answers", dict(prompt="whatever"), {"answer": "x"}),
    ("two", dict(prompt='{"title": "a", "abstract": "b"}'), {"title": "a", "abstract": "b", "label": "x"})])
def test_sampling_uses_the_prompt_ids_of_training(template, flags, record, tmp_path, heard):
    use(saved(tmp_path, SPECS[template]), **flags)
    ids, supervised = encode(render(to_messages(record, SPECS[template])[0], SPECS[template]), BYTES)
    assert heard.prompts == [ids[:supervised.index(1)]]


def test_plain_models_and_text_models_go_on_with_the_text(tmp_path, heard, gpt2_encoding):
    use(saved(tmp_path / "t", SPECS["text"]), prompt="la la")
    tiny(vocab_size=50257).save_pretrained(tmp_path / "plain")
    use(tmp_path / "plain", prompt="Once <|endoftext|>")
    assert heard.prompts == [[STOP, *b"la la"], gpt2_encoding.encode_ordinary("Once <|endoftext|>")]


def test_streaming_never_breaks_a_character(tmp_path, heard, monkeypatch):
    model, writes = saved(tmp_path, SPECS["chat"]), []
    heard.replies = [[*"né 🙂!".encode(), STOP], [*"🙂".encode()[:2], STOP]]
    monkeypatch.setattr("builtins.print", lambda *words, end="\n", **_: writes.append(" ".join(words) + end))
    assert use(model, prompt="x", max_new_tokens=20) == ["né 🙂!"]
    assert "🙂" in writes and "".join(writes) == "né 🙂!\n"
    use(model, prompt="x")
    assert "".join(writes).endswith("\n�\n")  # what never became a character is shown as such


def test_draws_depend_on_the_seed_alone(tmp_path):
    model = saved(tmp_path, SPECS["chat"])
    first, again, other = (use(model, prompt="x", temperature=1.0, num_samples=2, max_new_tokens=20, seed=seed)
                           for seed in (1, 1, 2))
    assert first == again != other and first[0] != first[1]


def test_an_answer_ends_before_the_stop_text_and_shows_no_part_of_it(tmp_path, heard, monkeypatch):
    model, writes = saved(tmp_path, SPECS["chat"]), []
    heard.replies = [b"one\n.\n", b"one\n\ntwo", [*b"one\n", STOP], b"one"]
    monkeypatch.setattr("builtins.print", lambda *words, end="\n", **_: writes.append(" ".join(words) + end))
    for stop, expected in ((r"\n\n", "one\n.\n"), (r"\n\n", "one"), (r"\n\n", "one\n"), ("o", "")):
        writes.clear()
        assert use(model, prompt="x", stop=stop, max_new_tokens=20) == [expected]
        assert "".join(writes).removesuffix("(cut: the context of 512 tokens is full)\n") == expected + "\n"


def test_what_cuts_an_answer_is_said(tmp_path, heard, capsys):
    model = saved(tmp_path / "m", SPECS["chat"])
    use(model, prompt="x")
    assert "cut" not in capsys.readouterr().out
    heard.replies = [b"abc"]
    use(model, prompt="x")
    assert capsys.readouterr().out.splitlines()[-1] == "(cut: the context of 512 tokens is full)"
    heard.replies = [b"abcdefg", b"abc", b"abcdefg", b"abcdefg"]
    flags = dict(batch_size=1, output=str(tmp_path / "a"))
    use(model, file=str(write_lines(tmp_path / "r.jsonl", [{"question": "a"}, {"question": "bc"}])), **flags)
    assert [line for line in capsys.readouterr().out.splitlines() if " cut " in line] == [
        "1 of 2 answers were cut after 7 tokens (--max_new_tokens)", "1 of 2 answers were cut by the context"]
    use(model, file=str(tmp_path / "r.jsonl"), stop="c", **flags)
    assert " cut " not in capsys.readouterr().out


def test_a_batch_ends_where_the_stop_text_has_come_in_every_row(tmp_path, monkeypatch, capsys):
    model, steps = saved(tmp_path / "m", SPECS["chat"]), []

    def generate(self, prompts, max_new_tokens, *_):
        for tokens in zip(b"ab.cdefgh", [*b"a.", STOP, *[None] * 6], b"abcd.fghi", strict=True):
            steps.append(tokens)
            yield list(tokens)
    monkeypatch.setattr(GPT, "generate", generate)
    file, output = write_lines(tmp_path / "r.jsonl", [{"question": "a"}] * 3), tmp_path / "a"
    use(model, file=str(file), stop=".", max_new_tokens=9, output=str(output))
    assert [json.loads(line)["response"] for line in output.read_text().splitlines()] == ["ab", "a", "abcd"]
    assert len(steps) == 5 and " cut " not in capsys.readouterr().out


def test_an_answer_that_the_context_cuts_before_others_end_is_counted(tmp_path, capsys):
    model = saved(tmp_path / "m", SPECS["one"], tiny(block_size=64))
    file = write_lines(tmp_path / "r.jsonl", [{"question": "x" * 50}, {"question": "x"}])
    for batch_size in (1, 2):
        use(model, file=str(file), output=str(tmp_path / "a"), max_new_tokens=20, batch_size=batch_size)
        out = capsys.readouterr().out
        assert "1 of 2 answers were cut by the context" in out and "1 of 2 answers were cut after 20 tokens" in out


def test_a_model_without_wording_begins_as_it_was_trained_and_holds_one_question(tmp_path, heard):
    model = Path(chat_model(tmp_path / "m"))
    values = json.loads((model / "tokenizer_config.json").read_text())
    del values["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(values))
    heard.replies = [[]] * 2
    use(model, prompt="Say red.")
    loaded, = sample.load(SampleConfig(model=str(model), device="cpu"))
    text = loaded.encoding.encode_ordinary("Say red.")
    begin = [loaded.encoding.encode_single_token("<|im_start|>")] if loaded.spec["starts_with_bos"] else []
    assert heard.prompts == [begin + text] and loaded.spec["template"] == ""
    file = write_lines(tmp_path / "r.jsonl", [{"messages": turns("a", "b", "c")}])
    with pytest.raises(UserError, match="r.jsonl, line 1: this model answers one question, without"):
        use(model, file=str(file), output=str(tmp_path / "a"))
    use(model, export=str(tmp_path / "e"))
    assert (tmp_path / "e" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"--model={model} has no tokenizer.json; put the model's into"):
        use(model, prompt="Say red.")


def test_a_text_model_begins_by_itself_and_a_prompt_may_stand_in_a_file(tmp_path, heard, capsys):
    model = saved(tmp_path / "a, b", SPECS["text"])  # a comma in a path is no second model
    assert len(use(model, temperature=1.0, num_samples=2, max_new_tokens=9)) == 2
    assert "(cut after" not in capsys.readouterr().out  # nobody needs to hear what was asked for
    heard.replies = [b"l" * 256]
    assert sample.main(SampleConfig(model=model, device="cpu")) == ["l" * 256]
    assert "(cut after 256 tokens: --max_new_tokens)" in capsys.readouterr().out
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="--prompt_file: .*; save it as UTF-8, or give --text_encoding=cp1252"):
        use(model, prompt_file=str(tmp_path / "prompt.txt"))
    heard.replies = [[STOP]]
    use(model, prompt_file=str(tmp_path / "prompt.txt"), text_encoding="cp1252")
    assert heard.prompts.pop() == [STOP, *"caf\xe9".encode()]
    (tmp_path / "prompt.txt").write_text("la\nla\n")
    capsys.readouterr()
    heard.replies = [[*b" lo", STOP], [*b" lu", STOP]]
    assert use(model, prompt_file=str(tmp_path / "prompt.txt"), temperature=1.0, num_samples=2) == [" lo", " lu"]
    assert capsys.readouterr().out == "--- 1 of 2 ---\nla\nla lo\n--- 2 of 2 ---\nla\nla lu\n"
    assert heard.prompts == [[STOP], [STOP], [STOP], [STOP, *b"la\nla"], [STOP, *b"la\nla"]]


PAIR = {"template": "alpaca", "prompt_format": "{prompt}", "response_format": "{completion}"}
# what the model was trained on, a record of a file, how the prompt is worded, the reference
WORDED = {
    "chat, Alpaca": (SPECS["chat"], {"instruction": "q", "input": "i", "output": "a"},
                     "⏹user\nq\n\ni⏹assistant\n", "a"),
    "chat, a pair": (SPECS["chat"], {"prompt": "q", "completion": "a"}, "⏹user\nq⏹assistant\n", "a"),
    "chat, messages": (SPECS["chat"], {"messages": turns("q", "a")}, "⏹user\nq⏹assistant\n", "a"),
    "chat, Dolly": (SPECS["chat"], {"instruction": "q", "context": "c", "response": "a"},
                    "⏹user\nq\n\nc⏹assistant\n", "a"),
    "one column, its own": (SPECS["one"], {"question": "q", "answer": "a"}, "Q: q\nA:", " a"),
    "one column, no answer": (SPECS["one"], {"question": "q"}, "Q: q\nA:", None),
    "one column, a pair": (SPECS["one"], {"prompt": "q", "response": "a"}, "Q: q\nA:", "a"),
    "one column, messages": (SPECS["one"], {"messages": turns("q", "a")}, "Q: q\nA:", "a"),
    "a pair, under another name": (PAIR, {"prompt": "q", "response": "a"}, "q", "a"),
    "a pair, Alpaca": (PAIR, {"instruction": "q", "output": "a"}, "q", "a"),
    "a pair, with a context": (PAIR, {"prompt": "q", "context": "c", "completion": "a"}, "q\n\nc", "a"),
    "a pair, messages": (PAIR, {"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "q", "a"),
    "text by a format": ({**SPECS["text"], "response_format": "{c}!"}, {"question": "q", "answer": "a"}, "⏹q", "a"),
    "text, a question": (SPECS["text"], {"question": "q", "answer": "a"}, "⏹q", "a"),
}


@pytest.mark.parametrize("spec, record, prompt, reference", WORDED.values(), ids=WORDED)
def test_a_file_of_any_kind_is_worded_as_training_was(spec, record, prompt, reference, tmp_path):
    loaded = LoadedModel("", tiny(block_size=512), BYTES, {**spec}, "")
    (ids,), references = sample.read_prompts([("line 1", record)], loaded, SampleConfig(file="f.jsonl"))
    assert "".join("⏹" if token == STOP else chr(token) for token in ids) == prompt and references == [reference]


def test_a_model_without_a_template_is_asked_raw_and_says_so(tmp_path, heard, capsys, gpt2_encoding):
    tiny(vocab_size=50257, block_size=512).save_pretrained(tmp_path / "m")
    use(tmp_path / "m", file=str(write_lines(tmp_path / "r.jsonl", [{"instruction": "Hi", "output": "Ho"}])),
        output=str(tmp_path / "a"))
    assert heard.prompts == [gpt2_encoding.encode_ordinary("Hi")]
    assert "has no template of its own: the prompts go raw (--data_dir names one)" in capsys.readouterr().out


# ---- chats ----------------------------------------------------------------------------------------------------------

def talk(monkeypatch, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_chat_keeps_the_conversation_as_the_ids_that_training_would_have_seen(tmp_path, heard, monkeypatch):
    talk(monkeypatch, "Hi", "", "Bye", "Again")
    heard.replies = [[*b"Ho", STOP], b"cut by leng", [STOP]]
    use(saved(tmp_path, SPECS["chat"]), system="S", max_new_tokens=11)
    said = turns("Hi", "Ho", "Bye", "cut by leng", "Again", system="S")
    for prompt, count in zip(heard.prompts, (2, 4, 6), strict=True):
        messages, _ = to_messages({"messages": said[:count]}, SPECS["chat"])
        assert prompt == encode(render(messages, SPECS["chat"]), BYTES)[0]


def test_a_full_context_drops_the_oldest_whole_turns_and_says_so(tmp_path, heard, monkeypatch, capsys):
    talk(monkeypatch, "a" * 200, "b" * 200, "c" * 200, "d" * 600)
    use(saved(tmp_path, SPECS["chat"]), system="S", max_new_tokens=20)
    assert "(the context is full: the oldest turn is forgotten)" in capsys.readouterr().out
    assert bytes(token for token in heard.prompts[2] if token < 256).startswith(b"system\nSuser\nb")


def test_a_prompt_that_cannot_fit_is_refused_and_nothing_is_forgotten_for_it(tmp_path, monkeypatch, capsys):
    talk(monkeypatch, "a" * 200, "b" * 600, "c" * 200)
    asked, generate = [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda self, prompts, *rest: asked.extend(prompts) or generate(
        self, prompts, *rest))
    use(saved(tmp_path, SPECS["chat"]))
    out = capsys.readouterr().out
    assert "the prompt has 617 tokens, the context 512: shorten it" in out and "forgotten" not in out
    assert bytes(token for token in asked[2] if token < 256).startswith(b"user\na")


SPACED = """{% for m in messages %}{{ '<|im_start|>' + m.role + (':\n' if m.role == 'user' else ':\n ')
+ m.content + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant:\n' }}{% endif %}"""


def test_what_a_template_writes_between_a_prompt_and_its_answer_is_there_in_all_that_is_asked(
        tmp_path, heard, monkeypatch):
    """A space: in labels, in half an answer, and once, not twice, in the turns of a chat."""
    model = Path(chat_model(tmp_path / "m"))
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": SPACED}))
    loaded, = sample.load(SampleConfig(model=str(model), device="cpu"))
    ids = loaded.encoding.encode_ordinary
    assert score.label_set([], "red , blue", loaded) == {"red": ids(" red") + [2], "blue": ids(" blue") + [2]}
    heard.replies = [[*ids(" Ho."), 2], [2], [*ids(" ho."), 2]]
    talk(monkeypatch, "Hi", "Bye")
    use(model, system="S")
    chat = [{"role": "system", "content": "S"}, *turns("Hi", "Ho.", "Bye")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert heard.prompts[1] == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert use(model, prompt="Hi", answer="Ho") == ["Ho ho."]
    assert heard.prompts[2] == loaded.prompt_ids([Message("user", {"content": "Hi"})]) + ids(" Ho")


AROUND = {  # what stands before an answer and after it, in the template's example and in what the model writes
    "a line end after it": ("", "\n", "{{ '<|im_start|>assistant:\n' }}"),
    "both": (" ", "\n", "{{ '<|im_start|>assistant:\n' }}"),
    "the header is answered": ("<|im_start|>assistant:\n", "", ""),
}


@pytest.mark.parametrize("before, after, prompting", AROUND.values(), ids=AROUND)
def test_what_stands_around_an_answer_comes_once(before, after, prompting, tmp_path, heard, monkeypatch):
    model, source = Path(chat_model(tmp_path / "m")), (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':\n' }}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        f"{{{{ {before.split(chr(10))[-1]!r} + m.content + {after!r} }}}}{{% endif %}}{{{{ '<|im_end|>' }}}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{prompting}{{% endif %}}")
    values = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**values, "chat_template": source}))
    loaded, = sample.load(SampleConfig(model=str(model), device="cpu"))
    messages = [Message("user", {"content": "Hi"}), Message("assistant", {"text": "Ho."})]
    prompt, example = (encode(render(messages[:count], loaded.spec), loaded.encoding)[0] for count in (1, 2))
    answer = example[len(prompt):]
    heard.replies = [answer, [2], [2], [2]]
    talk(monkeypatch, "Hi", "Bye")
    use(model, max_new_tokens=40)
    assert heard.prompts[1][:len(example)] == example  # the turn that was answered, as training would have it
    use(model, prompt="Hi", answer="Ho.")
    assert heard.prompts[2] == example[:len(heard.prompts[2])]
    assert loaded.encoding.decode(heard.prompts[2]).endswith("Ho.")
    (model / "tokenizer_config.json").write_text(json.dumps(
        {**values, "chat_template": source.replace(" + m.content", " + m.content | trim")}))
    use(model, prompt="Hi", answer=" ")  # nothing, where a template trims
    assert loaded.encoding.decode(heard.prompts[3]) == loaded.encoding.decode(prompt) + before


@pytest.mark.parametrize("spec, kept", [
    (SPECS["chat"], True), ({**SPECS["chat"], "turns": "several"}, True), ({**SPECS["chat"], "turns": "one"}, False),
    (SPECS["alpaca"], False), (SPECS["one"], False)])
def test_a_chat_keeps_its_turns_if_the_model_learned_several(spec, kept, tmp_path, heard, monkeypatch, capsys):
    talk(monkeypatch, "first", "second")
    heard.replies = [b"one", b"two"]
    use(saved(tmp_path, spec))
    assert (b"first" in bytes(token for token in heard.prompts[1] if token < 256)) == kept
    assert ("each answered by itself" in capsys.readouterr().out) != kept


# ---- files and scores -----------------------------------------------------------------------------------------------

RECORDS = [{"instruction": "a" * n, "output": "out", "id": n} for n in (30, 5, 600, 12, 9)]


def test_a_file_is_answered_in_order_scored_and_written(tmp_path, capsys):
    model, source, output = saved(tmp_path / "m", SPECS["chat"]), tmp_path / "records.jsonl", tmp_path / "answers.jsonl"
    flags = dict(file=str(write_lines(source, RECORDS)), output=str(output))
    use(model, **flags, batch_size=2)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{k: v for k, v in answer.items() if k != "response"} for answer in answers] == RECORDS
    assert answers[2]["response"] is None
    assert "1 of 5 prompts are longer than the context of 512" in capsys.readouterr().out
    for answer in answers[:2]:
        assert use(model, prompt=answer["instruction"]) == [answer["response"]]
    told = [{**record, "output": f" {answer['response']}\n"} for record, answer in zip(RECORDS, answers, strict=True)]
    told[0]["output"], told[1] = "wrong", {"instruction": RECORDS[1]["instruction"], "response": "mine"}
    told[4]["output"] = None
    write_lines(source, told)
    assert use(model, **flags) == {"records": 5, "scored": 4, "exact": 1}
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "exact match 1/4 (25.0 %)"
    assert """the records have a 'response' of their own: the model's stands under "model's response"\n""" in out
    assert json.loads(output.read_text().splitlines()[1]) == {**told[1], "model's response": answers[1]["response"]}


def labelled(path, **counts):
    return str(write_lines(path / "r.jsonl", [{"title": f"t{n}", "abstract": "x", "label": label}
                                              for label, count in counts.items() for n in range(count)]))


def test_a_file_with_few_answers_is_scored_as_classification(tmp_path, monkeypatch, capsys):
    model, file = saved(tmp_path / "m", SPECS["two"]), labelled(tmp_path, cat=6, dog=3, owl=1)
    monkeypatch.setattr(GPT, "log_likelihood", lambda self, prompts, answers: torch.tensor(
        [[2.0 if bytes(a[:-1]) == b"dog" and b"t0" in bytes(p) else 1.0 if bytes(a[:-1]) == b"cat" else 0.0
          for a in answers] for p in prompts]))
    result = use(model, file=file, output=str(tmp_path / "a"))
    assert result == {"records": 10, "scored": 10, "exact": 0, "no_label": 10, "likelihood": 6, "majority": 6}
    written = [json.loads(line)["likeliest label"] for line in (tmp_path / "a").read_text().splitlines()]
    assert Counter(written) == {"cat": 7, "dog": 3}
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if "at the top" in line) + 1
    assert [line.split() for line in lines[first:first + 5]] == [
        ["cat", "dog", "owl", "recall"], ["cat", "5", "1", "0", "83%"],
        ["dog", "2", "1", "0", "33%"], ["owl", "0", "1", "0", "0%"], ["precision", "71%", "33%", "-"]]
    assert lines[-4:] == ["likeliest label right 6/10 (60.0 %)",
                          "always the commonest label 6/10 (60.0 %)",
                          "answers with no known label 10/10 (100.0 %)",
                          "exact match 0/10 (0.0 %)"]


def test_labels_can_be_named_and_models_stand_side_by_side(tmp_path, capsys):
    one, two = saved(tmp_path / "one", SPECS["two"]), saved(tmp_path / "two", SPECS["two"], seed=4)
    flags = dict(file=labelled(tmp_path, cat=2, dog=2), labels="cat,dog,emu", output=str(tmp_path / "a"))
    both = use(f"{one},{two}", **flags)
    out = capsys.readouterr().out
    assert "emu" in out and [line for line in out.splitlines() if line.startswith(str(tmp_path))][-2:] == [
        f"{one}:", f"{two}:"]
    record = json.loads((tmp_path / "a").read_text().splitlines()[0])
    assert set(record) == {"title", "abstract", "label", *(f"{what} of {name}" for name in (one, two)
                                                           for what in ("response", "likeliest label"))}
    assert record[f"likeliest label of {one}"] in ("cat", "dog", "emu")
    assert both == {name: use(name, **flags) for name in (one, two)}


def test_new_rows_get_a_label_and_may_be_in_another_encoding(tmp_path, capsys):
    model, rows = saved(tmp_path / "m", SPECS["two"]), "title,abstract\ncaf\xe9,a\nt\xfcr,b\n"
    (tmp_path / "new.csv").write_text(rows, encoding="cp1252")
    flags = dict(file=str(tmp_path / "new.csv"), output=str(tmp_path / "a"), max_new_tokens=3)
    with pytest.raises(UserError, match="such as --text_encoding=cp1252"):
        use(model, **flags)
    assert use(model, labels="cat,dog", text_encoding="cp1252", **flags)["scored"] == 0
    records = [json.loads(line) for line in (tmp_path / "a").read_text(encoding="utf-8").splitlines()]
    assert [record["title"] for record in records] == ["caf\xe9", "t\xfcr"]
    assert all(record["likeliest label"] in ("cat", "dog") for record in records)
    with pytest.raises(UserError, match="--labels: none of label is an answer of the file's; name such as cat"):
        use(model, file=labelled(tmp_path, cat=2, dog=2), labels="label", output=str(tmp_path / "a"))


@pytest.mark.parametrize("names", ["cat,dog", "It is cat!,It is dog!"])
def test_classes_are_named_alone_or_in_the_words_of_training_for_new_rows_too(names, tmp_path):
    model = saved(tmp_path / "m", {**SPECS["two"], "response_format": " It is {label}!"})
    with_answers, without = labelled(tmp_path, cat=2, dog=2), str(write_lines(tmp_path / "new.jsonl", [
        {"title": "t", "abstract": "a"}]))
    for file in (with_answers, without):
        use(model, file=file, labels=names, output=str(tmp_path / "a"), max_new_tokens=1)
        for line in (tmp_path / "a").read_text().splitlines():
            assert json.loads(line)["likeliest label"] in ("It is cat!", "It is dog!")


def test_ids_that_no_token_has_leave_no_trace_in_an_answer(tmp_path):
    """tiktoken's cl100k_base has such gaps below its highest id."""
    gaps = tiktoken.Encoding("gaps", pat_str=r"(?s).", special_tokens={"<|endoftext|>": 300},
                             mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    assert decode([72, 256, 105, 299, 195, 300], gaps) == "Hi\ufffd<|endoftext|>"
    loaded = LoadedModel("m", tiny(), gaps, SPECS["chat"], "")
    assert loaded.read([72, 270, 105, 300, None], "") == ("Hi", True)


def test_an_answer_that_is_to_name_a_class_ends_soon_after_any_of_them_unless_told_otherwise(tmp_path, capsys):
    model, file = saved(tmp_path / "m", SPECS["two"]), labelled(tmp_path, cat=3, bird=3)
    for said, longest in (({}, 8), ({"max_new_tokens": 9}, 9)):  # "bird" has four bytes
        sample.main(SampleConfig(model=model, file=file, device="cpu", output=str(tmp_path / "a"), **said))
        assert f"6 of 6 answers were cut after {longest} tokens (--max_new_tokens)" in capsys.readouterr().out


def test_a_model_without_a_template_classifies_too(tmp_path, gpt2_encoding):
    tiny(block_size=64, vocab_size=50257).save_pretrained(tmp_path / "m")
    write_lines(tmp_path / "new.jsonl", [{"question": "a or b?"}])
    flags = dict(labels="a,b", output=str(tmp_path / "a"), max_new_tokens=2)
    use(str(tmp_path / "m"), file=str(tmp_path / "new.jsonl"), **flags)
    assert json.loads((tmp_path / "a").read_text())["likeliest label"] in ("a", "b")


def test_a_plain_model_is_asked_in_a_trained_ones_words_if_its_ids_can_be_the_same(tmp_path, heard):
    trained, plain = saved(tmp_path / "trained", SPECS["alpaca"]), tmp_path / "plain"
    for vocab_size, can_be in ((257, True), (257 + 511, True), (257 + 512, False)):  # padded, or other tokens
        tiny(block_size=512, vocab_size=vocab_size).save_pretrained(plain)
        if can_be:
            assert len(use(f"{plain},{trained}", prompt="Hi")) == 2
        else:
            with pytest.raises(UserError, match="plain has 769 token ids, the bytes encoding 257: .* or ask it alone"):
                use(f"{plain},{trained}", prompt="Hi")


def test_labels_are_scored_as_the_answers_spell_them(capsys):
    loaded = LoadedModel("", tiny(), BYTES, {**SPECS["alpaca"]}, "")
    assert list(score.label_set(["pos, neg", "x"] * 5, 'x, "pos, neg"', loaded)) == ["x", "pos, neg"]
    assert list(score.label_set([" pos", None, " neg", " pos"], "pos, neg,new,", loaded)) == [" pos", " neg", "new"]
    loaded.spec["response_format"] = " {label}"
    assert score.label_set([], "pos,b", loaded) == {" pos": [*b" pos", 256], " b": [*b" b", 256]}
    capsys.readouterr()
    assert score.label_set(["a", "b", "a"], "", loaded) == score.label_set(["a", "b", "c"], "", loaded) == {}
    assert capsys.readouterr().out == "2 different answers in 3 records; if classes, name them with --labels\n"
    assert score.label_set(["a" * 64, "b"] * 9, "", loaded) == {}  # no place for one and its stop
    with pytest.raises(UserError, match="--labels: one has 65 tokens"):
        score.label_set([], "b," + "a" * 64, loaded)


def test_short_labels_have_wide_columns_and_those_that_differ_in_white_space_are_one(tmp_path, capsys):
    score.confusion(Counter({("0", "0"): 1200, ("0", "1"): 37, ("1", "0"): 101, ("1", "1"): 845}), ["0", "1"])
    assert "\n0          1200    37     97%\n1           101   845     89%\nprecision   92%   96%\n" in (
        capsys.readouterr().out)
    loaded = LoadedModel("", tiny(block_size=64), BYTES, SPECS["one"], "")
    assert list(score.label_set([" math", " math ", " cs"] * 5, "", loaded)) == [" cs", " math "]
    result = score.score(["math", "cs"], [" math", " cs "], [" math ", " cs"], [" math ", " cs"], tmp_path / "p.png")
    assert result["likelihood"] == 2 and result["no_label"] == 0
    assert "100%" in capsys.readouterr().out


def test_a_confusion_matrix_fits_a_terminal_and_is_drawn(tmp_path, capsys):
    labels = ["astro-ph", "cond-mat", " cs", "hep-ph", "hep-th", "math", "physics", "quant-ph"]
    counts = Counter({(label, label): 30 for label in labels} | {("hep-th", "hep-ph"): 10, ("?", "math"): 2})
    score.confusion(counts, labels)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 of 252 records have other answers, such as '?': they count as wrong"
    assert max(map(len, lines)) <= 80
    assert lines[3].split() == ["astro-", "cond-m", "cs", "hep-ph", "hep-th", "math", "physic", "quant-", "recall"]
    assert lines[8].split() == ["hep-th", "0", "0", "0", "10", "30", "0", "0", "0", "75%"]
    assert lines[12].split() == ["precision", "100%", "100%", "100%", "75%", "100%", "100%", "100%", "100%"]
    labels[0] = r"$\frac$"  # is no formula
    pictures.plot_confusion(counts, labels, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"drew {tmp_path / 'a.png'}\n"


def test_flags_out_of_range_are_all_named_at_once():
    with pytest.raises(UserError, match="--temperature: -1 is neither .*--top_p: 0 is not.*--export: writes one model"):
        SampleConfig(temperature=-1, top_p=0, export="new", model="chat,two")
    with pytest.raises(UserError, match="--temperature: at 0 .* give 1 with --top_k, .*--file: gets one whole answer"):
        SampleConfig(top_k=5, file="a.jsonl", answer="x")
    with pytest.raises(UserError, match="--temperature: at 0 the likeliest token is taken; .* or --num_samples"):
        SampleConfig(num_samples=2)
    with pytest.raises(UserError, match="--prompt_file: holds the prompt; .*; --labels: for the records of --file"):
        SampleConfig(prompt="x", prompt_file="x.txt", labels="a,b")
    for flag in ("prompt", "prompt_file", "input", "answer"):
        with pytest.raises(UserError, match="--file: gets one whole answer a record; leave out --prompt, "):
            SampleConfig(file="a.jsonl", **{flag: "x"})


def test_what_is_typed_is_checked_as_records_are(tmp_path):
    model = saved(tmp_path / "m", SPECS["chat"])
    for flag in ("prompt", "input", "system", "answer"):
        with pytest.raises(UserError, match=f"100,000 characters of white space in a row .*: --{flag}; cut them"):
            use(model, **{"prompt": "x", flag: "a" + " " * 100_000})
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="--prompt_file=.*empty.txt is empty; write the prompt there"):
        use(model, prompt_file=str(tmp_path / "empty.txt"))


def test_answers_go_where_a_link_leads_and_never_into_a_devices_place(tmp_path):
    model, records = saved(tmp_path / "m", SPECS["chat"]), write_lines(tmp_path / "r.jsonl", [{"instruction": "x"}])
    (tmp_path / "link").symlink_to(tmp_path / "target")
    use(model, file=str(records), output=str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and json.loads((tmp_path / "target").read_text())["instruction"] == "x"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="--output=.* is no plain file; name a file"):
            use(model, file=str(records), output=str(path))
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_column_that_a_format_names_twice_is_asked_once(tmp_path, heard):
    spec = {**SPECS["one"], "prompt_format": "{title}, again {title}:", "response_format": " {kind}"}
    model = saved(tmp_path / "m", spec)
    records = write_lines(tmp_path / "r.jsonl", [{"title": "é", "kind": "k"}])
    use(model, prompt="é")
    use(model, file=str(records), output=str(tmp_path / "a"))
    assert heard.prompts == [list("é, again é:".encode())] * 2


def test_a_record_may_be_typed_with_its_answer(tmp_path, heard):
    use(saved(tmp_path, SPECS["two"]), prompt='{"title": "a", "abstract": "b", "label": "x"}')
    use(saved(tmp_path, SPECS["two"]), prompt='{"title": "a", "abstract": "b"}')
    assert heard.prompts[0] == heard.prompts[1]


def test_a_chat_names_the_columns(tmp_path, heard, monkeypatch, capsys):
    talk(monkeypatch, '{"title": "a", "abstract": "b"}')
    use(saved(tmp_path, SPECS["two"]))
    assert "It reads JSON objects with the columns title, abstract." in capsys.readouterr().out


# ---- adapters and export --------------------------------------------------------------------------------------------

def adapter(path, base, seed, **more):
    with_lora(GPT.from_pretrained(base), seed=seed).save_adapter(path, base)
    (path / "prompt.json").write_text(json.dumps({**SPECS["chat"], "encoding": "bytes", **more}))
    return str(path)


def over(path, base):
    """An adapter whose base is said to be the adapter `base`."""
    values = json.loads((Path(base) / "adapter_config.json").read_text())
    (path / "over").mkdir()
    (path / "over" / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": base}))
    return str(path / "over")


def test_adapters_answer_side_by_side_and_on_their_own_base_alone(tmp_path, capsys):
    base = saved(tmp_path / "base", SPECS["chat"])
    a, b = adapter(tmp_path / "a", base, 1), adapter(tmp_path / "b", base, 2)
    alone = [use(name, prompt="x")[0] for name in (a, b)]
    assert use(f"{a},{b}", prompt="x") == alone and alone[0] != alone[1]
    assert f"{a}: {alone[0]}" in capsys.readouterr().out
    other = adapter(tmp_path / "c", base, 1, base_sha256="0")
    write_meta(tmp_path, {"format_version": FORMAT_VERSION, "prompt": SPECS["chat"], "encoding": "bytes"})
    for where in ("", str(tmp_path)):
        with pytest.raises(UserError, match="c was trained on other weights than .*base/model.safetensors holds; wri"):
            use(other, prompt="x", data_dir=where)
    with pytest.raises(UserError, match="is itself an adapter; name plain weights there"):
        use(over(tmp_path, a), prompt="x")
    assert use(f"{a}, {b},", prompt="x") == alone


def test_an_export_is_what_was_trained_bit_for_bit_and_lora_is_merged_in_float32(tmp_path):
    base = saved(tmp_path / "base", SPECS["chat"])
    use(base, export=str(tmp_path / "plain"), dtype="bfloat16")
    weights = dict(read_safetensors(tmp_path / "base" / "model.safetensors"))
    exported = dict(read_safetensors(tmp_path / "plain" / "model.safetensors"))
    assert weights.keys() == exported.keys() and all(torch.equal(weights[name], exported[name]) for name in weights)
    use(adapter(tmp_path / "a", base, 1), export=str(tmp_path / "merged"), dtype="bfloat16")
    assert_same_logits(tmp_path / "a", theirs(tmp_path / "merged"))
    merged = dict(read_safetensors(tmp_path / "merged" / "model.safetensors"))
    updates = dict(read_safetensors(tmp_path / "a" / "adapter_model.safetensors"))
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        lora_A, lora_B = (updates[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        expected = weights[f"{name}.weight"] + (6 / 4 * lora_B @ lora_A).t()
        assert (merged[f"{name}.weight"] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("vocab_size", [257, 300, 320])
def test_transformers_stops_where_the_encoding_does_on_padded_vocabularies(vocab_size, tmp_path):
    model = tiny(vocab_size=vocab_size, block_size=512)
    with torch.no_grad():
        model.wte.weight[STOP] = 100 * model.ln_f.bias  # by far the highest logit
    model.config.eos_token_id = vocab_size - 1
    use(saved(tmp_path / "m", SPECS["chat"], model), export=str(tmp_path / "e"))
    others = theirs(tmp_path / "e")
    ids = others.generate(torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3), max_new_tokens=9, do_sample=False)
    assert ids.tolist() == [[1, 2, 3, STOP]]
    assert others.config.eos_token_id == others.generation_config.eos_token_id == STOP


@pytest.mark.parametrize("template", ["chat", "alpaca", "one"])
def test_an_export_gives_transformers_the_logits_and_prompt_ids(template, tmp_path):
    """With the tokenizer beside the weights and our own chat template."""
    spec, model = {**SPECS[template], "encoding": "tokenizer.json"}, tiny(vocab_size=2500, block_size=256)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "tokenizer.json").write_text(trained("GPT-2"))
    encoding = get_encoding("tokenizer.json", tmp_path / "m")
    use(saved(tmp_path / "m", spec, model), export=str(tmp_path / "e"))
    others, tokenizer = theirs(tmp_path / "e"), transformers.AutoTokenizer.from_pretrained(tmp_path / "e")
    assert_same_logits(model, others)
    assert tokenizer.eos_token_id == others.generation_config.eos_token_id == encoding.eot_token
    assert json.loads((tmp_path / "e" / "prompt.json").read_text()) == spec

    def ours_of(record):
        return encode(render(to_messages(record, spec, answered=False)[0], spec), encoding)[0]

    def theirs_of(messages):
        unanswered = messages[-1]["role"] == "user"
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=unanswered, return_dict=False))

    column = "question" if template == "one" else "instruction"
    for text in ("Name it.", "  naïve  日本 🙂\n\n\ttabs, don't 12345", "a" * 50, 'say "x" \\ {y} {{z}}'):
        assert theirs_of(turns(text)) == ours_of({column: text})
    for messages in (turns("Hi", system="Be."), turns("Hi", "Ho", "Bye"), turns("Hi", "Ho", "Bye", "So", system="Be.")):
        if template == "chat":
            assert theirs_of(messages) == ours_of({"messages": messages})
        else:
            with pytest.raises(jinja2.TemplateError, match="one question"):
                theirs_of(messages)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_was_prepared_for_a_model_is_trained_from_it_and_asked_with_no_flag(lora_rank, prepare, tmp_path):
    """Its tokenizer and chat template go along, so that transformers takes best/ and an export as they are."""
    base = Path(chat_model(tmp_path / "base"))
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')  # the base's end, not that of its chat template
    data = prepare(colour_records(60), model=str(base), encoding="", template="", block_size=0)
    meta = load_meta(data)
    assert (meta["prompt"]["template"], meta["stop"], meta["block_size"]) == ("model", 2, 256)
    train.main(TrainConfig(data_dir=data, out_dir=tmp_path / "out", lora_rank=lora_rank, max_steps=3, device="cpu",
                           learning_rate=1e-2, dtype="float32"))
    asked = dict(model=str(tmp_path / "out"), device="cpu", dtype="float32", system="Be.")
    loaded, = sample.load(SampleConfig(**asked))
    sample.main(SampleConfig(export=str(tmp_path / "export"), **asked))
    for path in tmp_path / "out" / "best", tmp_path / "export":
        assert_same_logits(loaded.model, theirs(path))
        assert lora_rank and path.name == "best" or theirs(path).generation_config.eos_token_id == 2
        tokenizer, chat = transformers.AutoTokenizer.from_pretrained(path), [("system", "Be."), ("user", "Say red.")]
        asked = [Message(role, {"content": text}) for role, text in chat]
        assert loaded.prompt_ids(asked) == tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in chat], add_generation_prompt=True, return_dict=False)


def test_records_without_an_answer_shift_no_score(tmp_path, capsys):
    labels = {"a": [1], "b": [2]}
    found = score.score(["a", "b", "b"], [None, "b", "a"], labels, ["a", "b", "a"], tmp_path / "c.png")
    assert (found["scored"], found["exact"], found["likelihood"], found["no_label"]) == (2, 1, 2, 0)
    score.summary({"one": found})
    assert "1 of 3 records have no answer to compare with" in capsys.readouterr().out
    assert score.score(["b", "a"], ["a", "a"], labels, ["a", "b"], tmp_path / "c.png")["no_label"] == 0
