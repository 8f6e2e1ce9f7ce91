"""sample.py: the prompts that training saw, whole characters while streaming, chats, files and messages."""
import io
import json

import pytest
import torch
import transformers
from conftest import randomise, tiny

import sample
import score
import weights
from console import UserError
from model import GPT, GPTConfig
from prepare_data import encode, get_encoding, render
from records import to_messages
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
             (dict(model=two, prompt='{"title": "x"}'), "--prompt: this model reads the columns title, abstract"),
             (dict(model=two, system="x", prompt="x"), "--system: only the chat template"),
             (dict(model=chat, file="nowhere.jsonl"), "--file: nowhere.jsonl is not there"),
             (dict(model=chat, file="bad.jsonl", output="chat"), "--output=chat is a directory; name a file"),
             (dict(model=two, export=chat), "chat holds a model already; name another directory"),
             (dict(model=chat, file="bad.jsonl"), "bad.jsonl, line 2: 'instruction' must be text, not null"),
             (dict(model=chat, data_dir="nowhere"), "--data_dir: no prepared data in nowhere")]
    for flags, message in cases:
        with pytest.raises(UserError) as caught:
            sample.main(SampleConfig(**flags, device="cpu"))
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--temperature: -1.0 is neither 0 nor.*--top_p: 0.0 is not in"):
        SampleConfig(temperature=-1, top_p=0)


@pytest.mark.parametrize("turns, kept", [("one", False), ("several", True), (None, True)])
def test_a_chat_keeps_its_turns_if_the_model_learned_several(turns, kept, tmp_path, heard, monkeypatch, capsys):
    model = saved(tmp_path, {**SPECS["chat"], **({"turns": turns} if turns else {})})
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))
    heard.say(b"one", b"two")
    sample.main(SampleConfig(model=model, device="cpu"))
    assert (b"first" in bytes(token for token in heard[1] if token < 256)) == kept
    assert ("each answered by itself" in capsys.readouterr().out) != kept


def test_other_answers_than_the_labels_are_told_of(capsys):
    score.confusion([("a", "a"), ("b", "a"), ("c", "a")], ["a", "b"])
    assert "1 of 3 records have another answer than these labels: they count as wrong" in capsys.readouterr().out


def test_formats_with_emoji_are_exported_as_they_are():
    spec = {"template": "alpaca", "prompt_format": "🙂\n{q} ->", "response_format": " {a}"}
    rendered = transformers.utils.chat_template_utils.render_jinja_template(
        [[{"role": "user", "content": "why?"}]], chat_template=sample.chat_template(spec))[0][0]
    assert rendered == "🙂\nwhy? ->"


def test_a_tiny_top_p_still_draws_the_likeliest():
    from model import draw
    logits, generator = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)), torch.Generator()
    assert torch.equal(draw(logits, 1.0, 0, 1e-50, generator), logits.argmax(-1))


def test_a_model_with_fewer_ids_than_its_encoding_is_refused(tmp_path, gpt2_encoding):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has 257 token ids, the gpt2 encoding 50257: give the --data_dir"):
        sample.main(SampleConfig(model=str(tmp_path), prompt="x", device="cpu"))


def test_bfloat16_weights_follow_float32():
    model, idx = tiny().eval(), torch.arange(50)[None]
    exact, half = (logits - logits.mean(-1, keepdim=True) for logits in (model(idx), model.bfloat16()(idx)))
    assert half.dtype == torch.float32 and (half - exact).norm() < 0.02 * exact.norm()


def test_a_half_written_answer_is_gone_on_with(tmp_path, heard, capsys):
    heard.say([*b" ends", STOP])
    assert sample.main(SampleConfig(model=saved(tmp_path, SPECS["chat"]), prompt="x", answer="It", device="cpu")) == [
        "It ends"]
    assert bytes(heard[0][-12:]) == b"assistant\nIt" and capsys.readouterr().out == "It ends\n"


# ---- classification -------------------------------------------------------------------------------------------------

def labelled(tmp_path, counts):
    records = [{"title": f"t{n}", "abstract": "x", "label": label} for label, count in counts.items()
               for n in range(count)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(tmp_path / "r.jsonl")


def test_a_file_with_few_answers_is_scored_as_classification(tmp_path, monkeypatch, capsys):
    model, file = saved(tmp_path / "m", SPECS["two"]), labelled(tmp_path, {"cat": 6, "dog": 3, "owl": 1})
    order = ["cat", "dog", "owl"]
    monkeypatch.setattr(GPT, "log_likelihood", lambda self, prompts, answers: torch.tensor(
        [[2.0 if bytes(a[:-1]) == b"dog" and b"t0" in bytes(p) else 1.0 if bytes(a[:-1]) == b"cat" else 0.0
          for a in answers] for p in prompts]))
    result = sample.main(SampleConfig(model=model, file=file, output=str(tmp_path / "a"), max_new_tokens=2,
                                      device="cpu"))
    assert result == {"records": 10, "scored": 10, "exact": 0, "no_label": 10, "likelihood": 6, "majority": 6}
    out = capsys.readouterr().out
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("truth"))
    table = [line.split() for line in lines[first:first + 5]]
    assert table[0][-4:] == [*order, "recall"]
    assert table[1:4] == [["cat", "5", "1", "0", "83%"], ["dog", "2", "1", "0", "33%"], ["owl", "0", "1", "0", "0%"]]
    assert table[4] == ["precision", "71%", "33%", "0%"]
    assert "0/10 (0.0 %)  10/10 (100.0 %)  6/10 (60.0 %)          31.3 to 83.2 %  6/10 (60.0 %)" in out
    assert out.splitlines()[-1] == "exact match 0/10 (0.0 %)"


def test_labels_can_be_named_and_models_stand_side_by_side(tmp_path, capsys):
    one, two = saved(tmp_path / "one", SPECS["two"]), saved(tmp_path / "two", SPECS["two"], seed=4)
    file = labelled(tmp_path, {"cat": 2, "dog": 2})
    flags = dict(file=file, labels="cat,dog,emu", output=str(tmp_path / "a"), max_new_tokens=2, device="cpu")
    both = sample.main(SampleConfig(model=f"{one},{two}", **flags))
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(str(tmp_path)) and "(" in line]
    assert "emu" in out and rows == [one, two]
    assert both == {name: sample.main(SampleConfig(model=name, **flags)) for name in (one, two)}
    record = json.loads((tmp_path / "a").read_text().splitlines()[0])
    assert set(record) == {"title", "abstract", "label", "response"}


def test_free_text_answers_are_no_classification(tmp_path, capsys):
    source = tmp_path / "r.jsonl"
    source.write_text("".join(json.dumps({"instruction": f"q{n}", "output": f"answer {n}"}) + "\n" for n in range(9)))
    result = sample.main(SampleConfig(model=saved(tmp_path / "m", SPECS["chat"]), file=str(source), max_new_tokens=2,
                                      output=str(tmp_path / "a"), device="cpu"))
    assert "likelihood" not in result and "truth" not in capsys.readouterr().out


def test_wilsons_interval_is_the_textbooks():
    assert score.interval(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert score.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


# ---- export ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("template", ["chat", "alpaca", "one"])
def test_an_export_loads_in_transformers_with_the_same_logits_and_prompt_ids(template, tmp_path, gpt2_encoding):
    spec = {**SPECS[template], "encoding": "gpt2"}
    ours = tiny(vocab_size=50257, block_size=256)
    ours.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "prompt.json").write_text(json.dumps(spec))
    sample.main(SampleConfig(model=str(tmp_path / "m"), export=str(tmp_path / "e"), device="cpu", dtype="float32"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "e").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "e")
    for text in ("Name it.", "  naïve  日本 🙂\n\n\ttabs, don't 12345", "a" * 50, 'say "x" \\ {y} {{z}}'):
        column = {"one": {"question": text}, "alpaca": {"instruction": text}, "chat": {"instruction": text}}[template]
        prompt = encode(render(to_messages(column, spec, answered=False), spec), gpt2_encoding)[0]
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                            return_dict=False)
        assert list(ids) == prompt
        idx = torch.tensor([prompt])
        with torch.no_grad():
            assert torch.allclose(theirs(idx).logits, ours.eval()(idx), atol=1e-4)
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 50256
    assert sample.load(SampleConfig(model=str(tmp_path / "e")))[0].spec == spec


def test_the_recovered_merges_are_openais(gpt2_encoding):
    vocabulary, merges = weights.tokenizer_files(gpt2_encoding)
    lines = merges.splitlines()
    assert len(json.loads(vocabulary)) == 50257 and len(lines) == 50001
    assert lines[:4] == ["#version: 0.2", "Ġ t", "Ġ a", "h e"] and lines[-1] == "Ġg azed"


def test_labels_are_scored_as_the_answers_spell_them():
    voice = sample.Voice("", tiny(), get_encoding("bytes"), {"response_format": ""})
    given = "pos, neg,new"
    assert score.label_set([" pos", None, " neg", " pos"], given, voice) == [" pos", " neg", "new"]
    voice.spec["response_format"] = " {label}"
    assert score.label_set([], given, voice) == [" pos", " neg", " new"]
    assert score.label_set(["a" * 64, "b"] * 9, "", voice) == []  # no room for one and its stop
    with pytest.raises(UserError, match="--labels: one has 65 tokens, more than the context: give short ones"):
        score.label_set([], "b," + "a" * 64, voice)
