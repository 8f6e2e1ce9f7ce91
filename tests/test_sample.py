"""sample.py: the prompts that training saw, whole characters while streaming, chats, files and messages."""
import io
import json

import pytest
import torch
from conftest import randomise, tiny

import sample
from config import UserError
from model import GPT, GPTConfig
from prepare_data import encode, get_encoding, render, to_messages
from sample import SampleConfig

BYTES = get_encoding("bytes")
STOP = BYTES.eot_token
SPECS = {"alpaca": {"template": "alpaca", "prompt_format": "", "response_format": ""},
         "chat": {"template": "chat", "prompt_format": "", "response_format": ""},
         "text": {"template": "text", "prompt_format": "", "response_format": ""},
         "one": {"template": "alpaca", "prompt_format": "Q: {question}\nA:", "response_format": " {answer}"},
         "two": {"template": "alpaca", "prompt_format": "{title}|{abstract}|", "response_format": "{label}"}}


def saved(path, spec, **changes):
    model = tiny(block_size=512, **changes)
    model.save_pretrained(path)
    (path / "prompt.json").write_text(json.dumps({**spec, "encoding": "bytes"}))
    return str(path)


@pytest.fixture
def heard(monkeypatch):
    """The prompts that reach the model, and a way to put answers into its mouth: heard.say(ids, ...)."""
    class Heard(list):
        replies = []

        def say(self, *replies):
            self.replies = [list(reply) for reply in replies]
    log = Heard()

    def generate(self, prompts, max_new_tokens, *_):
        log.extend(prompts)
        reply = log.replies.pop(0) if log.replies else [STOP]
        for token in reply[:max_new_tokens]:
            yield [token] * len(prompts)
    monkeypatch.setattr(GPT, "generate", generate)
    return log


@pytest.mark.parametrize("template, prompt, record", [
    ("alpaca", "Hi", {"instruction": "Hi", "output": "x"}), ("chat", "Hi", {"instruction": "Hi", "output": "x"}),
    ("one", "why?", {"question": "why?", "answer": "x"}),
    ("two", '{"title": "a", "abstract": "b"}', {"title": "a", "abstract": "b", "label": "x"})])
def test_sampling_with_no_flags_uses_the_prompt_ids_of_training(template, prompt, record, tmp_path, heard):
    spec = SPECS[template]
    sample.main(SampleConfig(model=saved(tmp_path, spec), prompt=prompt, device="cpu"))
    ids, flags = encode(render(to_messages(record, spec), spec), BYTES)
    assert heard == [ids[:flags.index(1)]]


def test_alpacas_input_and_chats_system_prompt_reach_the_model(tmp_path, heard):
    sample.main(SampleConfig(model=saved(tmp_path / "a", SPECS["alpaca"]), prompt="Do", input="this", device="cpu"))
    sample.main(SampleConfig(model=saved(tmp_path / "c", SPECS["chat"]), prompt="Hi", system="Be.", device="cpu"))
    assert bytes(heard[0]).endswith(b"### Instruction:\nDo\n\n### Input:\nthis\n\n### Response:\n")
    assert heard[1] == [STOP, *b"system\nBe.", STOP, *b"user\nHi", STOP, *b"assistant\n"]


def test_plain_models_and_text_models_go_on_with_the_text(tmp_path, heard, gpt2_encoding):
    sample.main(SampleConfig(model=saved(tmp_path / "t", SPECS["text"]), prompt="la la", device="cpu"))
    tiny(vocab_size=50257).save_pretrained(tmp_path / "plain")
    sample.main(SampleConfig(model=str(tmp_path / "plain"), prompt="Once <|endoftext|>", device="cpu"))
    assert heard == [[STOP, *b"la la"], gpt2_encoding.encode_ordinary("Once <|endoftext|>")]


class Console(io.StringIO):
    """Standard output that remembers every single write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


def test_streaming_never_breaks_a_character(tmp_path, heard, monkeypatch):
    model, console = saved(tmp_path, SPECS["chat"]), Console()
    heard.say([*"né 🙂!".encode(), STOP], [*"🙂".encode()[:2], STOP])
    monkeypatch.setattr("sys.stdout", console)
    assert sample.main(SampleConfig(model=model, prompt="x", device="cpu")) == ["né 🙂!"]
    assert "�" not in console.getvalue() and "🙂" in console.writes and console.getvalue() == "né 🙂!\n"
    sample.main(SampleConfig(model=model, prompt="x", device="cpu"))
    assert console.getvalue().endswith("�\n")  # what never became a character is shown as such


def talk(monkeypatch, *lines):
    lines = iter(lines)

    def read(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", read)


def test_a_chat_keeps_the_conversation_as_the_ids_that_training_would_have_seen(tmp_path, heard, monkeypatch):
    talk(monkeypatch, "Hi", "", "Bye", "Again")
    heard.say([*b"Ho", STOP], b"cut by leng", [STOP])
    sample.main(SampleConfig(model=saved(tmp_path, SPECS["chat"]), system="S", max_new_tokens=11, device="cpu"))
    said = [{"role": role, "content": content} for role, content in (
        ("system", "S"), ("user", "Hi"), ("assistant", "Ho"), ("user", "Bye"), ("assistant", "cut by leng"),
        ("user", "Again"))]
    for prompt, turns in zip(heard, (2, 4, 6), strict=True):
        assert prompt == encode(render(to_messages({"messages": said[:turns]}, SPECS["chat"]), SPECS["chat"]), BYTES)[0]


def test_a_full_context_drops_the_oldest_whole_turns_and_says_so(tmp_path, heard, monkeypatch, capsys):
    talk(monkeypatch, "a" * 200, "b" * 200, "c" * 200, "d" * 600)
    sample.main(SampleConfig(model=saved(tmp_path, SPECS["chat"]), system="S", max_new_tokens=20, device="cpu"))
    out = capsys.readouterr().out
    assert "(the context is full: the oldest 1 turns are forgotten)" in out
    assert bytes(token for token in heard[2] if token < 256).startswith(b"system\nSuser\nb")


def test_other_templates_answer_every_prompt_by_itself(tmp_path, heard, monkeypatch):
    talk(monkeypatch, "One", "Two")
    heard.say([*b"1", STOP], [*b"2", STOP])
    sample.main(SampleConfig(model=saved(tmp_path, SPECS["alpaca"]), device="cpu"))
    assert b"Two" in bytes(heard[1]) and b"One" not in bytes(heard[1])


RECORDS = [{"instruction": "a" * n, "output": "out", "id": n} for n in (30, 5, 600, 12, 9)]


def test_a_file_is_answered_in_order_scored_and_written(tmp_path, capsys):
    model = saved(tmp_path / "m", SPECS["chat"])
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    flags = dict(model=model, file=str(source), output=str(tmp_path / "answers.jsonl"), max_new_tokens=7, device="cpu",
                 dtype="float32")
    sample.main(SampleConfig(**flags, batch_size=2))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in answer.items() if k != "response"} for answer in answers] == RECORDS
    assert answers[2]["response"] is None
    assert "1 of 5 prompts are longer than the context of 512" in capsys.readouterr().out
    for answer in answers[:2]:
        alone = sample.main(SampleConfig(model=model, prompt=answer["instruction"], max_new_tokens=7, device="cpu",
                                         dtype="float32"))
        assert alone == [answer["response"]]
    told = [{**record, "output": f" {answer['response']}\n"} for record, answer in zip(RECORDS, answers, strict=True)]
    told[0]["output"], told[1] = "wrong", {"instruction": RECORDS[1]["instruction"]}
    source.write_text("".join(json.dumps(record) + "\n" for record in told))
    assert sample.main(SampleConfig(**flags)) == {"records": 5, "scored": 4, "exact": 2}
    assert capsys.readouterr().out.splitlines()[-1] == "exact match 2/4 (50.0 %)"


def test_draws_depend_on_the_seed_alone(tmp_path):
    model = saved(tmp_path, SPECS["chat"])
    def draw(seed):
        return sample.main(SampleConfig(model=model, prompt="x", temperature=1.0, num_samples=2, max_new_tokens=20,
                                        seed=seed, device="cpu"))
    first = draw(1)
    assert first == draw(1) != draw(2) and first[0] != first[1]


def test_wrong_use_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat, two = saved(tmp_path / "chat", SPECS["chat"]), saved(tmp_path / "two", SPECS["two"])
    randomise(GPT(GPTConfig(64, 257, 1, 1, 64))).save_pretrained(tmp_path / "plain")
    (tmp_path / "bad.jsonl").write_text('{"instruction": 3}\n{"instruction": null}\n')
    cases = [(dict(), "--model=out: nothing is trained there yet; run python train.py"),
             (dict(model="no/such"), "no model 'no/such'"),
             (dict(model=chat, prompt="x" * 600), "the prompt has 617 tokens, the context 512"),
             (dict(model=two, prompt="x"), '''the columns title, abstract; give a JSON object, '{"title": "..."'''),
             (dict(model=two, prompt='{"title": "x"}'), "--prompt_format names {abstract}; the columns are title"),
             (dict(model=two, system="x", prompt="x"), "--system: only the chat template"),
             (dict(model=chat, file="nowhere.jsonl"), "--file: nowhere.jsonl is not there"),
             (dict(model=chat, file="bad.jsonl"), "bad.jsonl, line 2: 'instruction' must be text, not null"),
             (dict(model=chat, data_dir="nowhere"), "--data_dir: no prepared data in nowhere")]
    for flags, message in cases:
        with pytest.raises(UserError) as caught:
            sample.main(SampleConfig(**flags, device="cpu"))
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--temperature: -1 is below 0; --top_p: 0 is not in"):
        SampleConfig(temperature=-1, top_p=0)


def test_a_model_with_fewer_ids_than_its_encoding_is_refused(tmp_path, gpt2_encoding):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 257 token ids, the gpt2 encoding 50257: give the --data_dir"):
        sample.main(SampleConfig(model=str(tmp_path), prompt="x", device="cpu"))


def test_bfloat16_weights_follow_float32():
    model, idx = tiny().eval(), torch.arange(50)[None]
    exact, half = model(idx), model.bfloat16()(idx)
    assert half.dtype == torch.float32 and (half - exact).norm() < 0.05 * exact.norm()
