"""A real pretrained Llama, SmolLM2-135M-Instruct: its ids, logits and answers are transformers', from records to
export."""
import io
import shutil

import peft
import pytest
import torch
import transformers
from conftest import assert_same_logits, colour_records, theirs, with_lora, write_lines
from test_sample import turns
from test_tokenizer import SMOLLM2
from torch.nn.functional import cross_entropy

import prepare_data
import sample
import train
from model import GPT
from nanosft.records import Message
from nanosft.shards import SUPERVISED, Shards, load_meta
from prepare_data import PrepareConfig
from sample import SampleConfig
from train import TrainConfig

pytestmark = pytest.mark.skipif(not (SMOLLM2 / "model.safetensors").exists(), reason=(
    f"no SmolLM2 in {SMOLLM2}: hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir {SMOLLM2}, or name its "
    "directory in NANOSFT_SMOLLM2"))

FRANCE, PARIS = "What is the capital of France?", "The capital of France is Paris."
PROMPTS = [FRANCE, "Hi", "Name three colours.", "Why is the sky blue?", "Who wrote Hamlet?", "Describe a sunset.",
           "Write a story about a fox who finds a lamp in the wood.", "Translate to French: Good morning, my friend.",
           "List the planets of the solar system in order.", "Explain photosynthesis to a child of ten.",
           "What is 17 + 25? Show your work.", "What does DNA stand for?", "Give me a recipe for pancakes.",
           "Convert the active sentence to passive: 'The chef cooks the meal every day.'",
           "Write a Python function that returns the n-th Fibonacci number.", "Translate to Chinese: 天空是蓝色的 🙂",
           "Summarise: The cat sat on the mat all day because it was warm, and nobody had the heart to wake it.",
           "How do I boil an egg so that the yolk stays soft?", "def f(x):\n    return x**2\n\nWhat does f do?",
           "Sort these words: " + " ".join(f"{word}{n}" for n in range(20) for word in ("pear", "fig", "plum"))]


def load(model=SMOLLM2):
    return sample.load(SampleConfig(model=str(model), device="cpu", dtype="float32"))


def use(**flags):
    return sample.main(SampleConfig(device="cpu", dtype="float32", **flags))


@pytest.fixture(scope="module")
def ours():
    return load()[0].model


@pytest.fixture(scope="module")
def others():
    return theirs(SMOLLM2).float()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, which goes with the test: it may hold gigabytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tiktoken.get_encoding", None)  # no other vocabulary is needed
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def heard(monkeypatch):
    """The prompts that reach the model."""
    prompts, generate = [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda *words: prompts.extend(words[1]) or generate(*words))
    return prompts


def templated(tokenizer, messages):
    """transformers' ids of a conversation, with the beginning of the answer where it lacks one."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=messages[-1]["role"] == "user",
                                         return_dict=False)


def answers_of(model, prompts, count=64):
    """`count` ids after each of the prompts."""
    return list(map(list, zip(*model.generate(prompts, count), strict=True)))


def logits_of(model, ids):
    """Ours or transformers', (T, vocab_size)."""
    with torch.no_grad():
        found = model(torch.tensor([ids]))
    return (found if isinstance(found, torch.Tensor) else found.logits)[0]


# ---- the model ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_greedy_answers_are_the_same_with_a_cache_without_in_a_batch_and_in_transformers(ours, others, tokenizer):
    prompts = [templated(tokenizer, turns(text)) for text in PROMPTS]
    answers = answers_of(ours, prompts)
    assert [len(answer) for answer in answers] == [64] * 20
    assert [answers_of(ours, [prompt]) for prompt in prompts] == [[answer] for answer in answers]
    for prompt, answer in zip(prompts, answers, strict=True):  # without a cache, each token after all those before it
        assert logits_of(ours, prompt + answer)[len(prompt) - 1:-1].argmax(-1).tolist() == answer
    others.generation_config.eos_token_id = None
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    found = others.generate(**padded, max_new_tokens=64, do_sample=False)
    assert found[:, padded["input_ids"].size(1):].tolist() == answers


def test_logits_and_log_likelihoods_are_those_of_transformers(ours, others, tokenizer):
    ids = templated(tokenizer, turns(*PROMPTS))
    expected = logits_of(others, ids)
    assert (logits_of(ours, ids) - expected).abs().max() < 1e-4 * expected.std()
    answers = [tokenizer.encode(text) + [2] for text in (PARIS, "Red", "Hello! How can I help you today?")]
    for text in PROMPTS[:3]:
        prompt = templated(tokenizer, turns(text))
        losses = [cross_entropy(logits_of(others, prompt + answer)[len(prompt) - 1:-1], torch.tensor(answer),
                                reduction="sum").item() for answer in answers]
        assert (-ours.log_likelihood([prompt], answers)[0]).tolist() == pytest.approx(losses, rel=1e-5)


def test_a_long_prompt_takes_the_memory_that_it_needs(ours):
    with torch.inference_mode():
        _, cache, lengths = ours.prefill([list(range(100, 1600))], 64)
    assert cache.shape == (2, 30, 1, 3, 1564, 64) and lengths.tolist() == [1500]  # of a context of 8,192


# ---- records and training -------------------------------------------------------------------------------------------

CHAT = turns("Hi", "Ho", "天?", "So\n", system="Be.")


@pytest.mark.parametrize("flags, record, messages", [
    ({}, {"instruction": "Name it.", "input": "12", "output": "A 🙂"}, turns("Name it.\n\n12", "A 🙂")),
    ({}, {"prompt": "Q: 天?", "completion": "A"}, turns("Q: 天?", "A")), ({}, {"messages": CHAT}, CHAT),
    (dict(prompt_format="Title: {title}\\nIn a word:", response_format="{label}"), {"title": "Stars", "label": "b"},
     turns("Title: Stars\nIn a word:", "b"))])
def test_records_of_every_kind_are_turns_of_the_models_template(flags, record, messages, tokenizer, folder):
    meta = prepare_data.main(PrepareConfig(input=str(write_lines(folder / "r.jsonl", [record])), model=str(SMOLLM2),
                                           val_fraction=0, test_fraction=0, show=0, **flags))
    assert (meta["block_size"], meta["stop"], meta["model"]) == (8192, 2, str(SMOLLM2.resolve()))
    example, = Shards("data/r", meta, "train")
    assert example["id"].tolist() == templated(tokenizer, messages)
    answered = [place for i, message in enumerate(messages) if message["role"] == "assistant" for place in range(
        len(templated(tokenizer, messages[:i])), len(templated(tokenizer, messages[:i + 1])) - 1)]  # not its line end
    assert (example["flags"] & SUPERVISED).nonzero()[0].tolist() == answered


def test_a_text_is_cut_into_blocks_of_1024(folder):
    (folder / "t.txt").write_text("one two three " * 2000)
    meta = prepare_data.main(PrepareConfig(input="t.txt", model=str(SMOLLM2), show=0))
    assert (meta["block_size"], meta["train"]["longest"]) == (1024, 1025)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_was_prepared_for_a_model_is_trained_from_it_asked_and_taken_by_transformers(lora_rank, folder):
    question = "Say red and green."
    write_lines(folder / "colours.jsonl", colour_records(60))
    prepare_data.main(PrepareConfig(input="colours.jsonl", model=str(SMOLLM2), show=0))
    state = train.main(TrainConfig(data_dir="data/colours", max_steps=3, lora_rank=lora_rank, eval_interval=0,
                                   device="cpu", dtype="float32"))
    answer, = use(prompt=question, max_new_tokens=12)
    use(export="export")
    for path in "data/colours", "out/best", "out/last", "export":
        assert all((folder / path / name).read_bytes() == (SMOLLM2 / name).read_bytes()
                   for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    ours, = load("out")
    prompt = ours.prompt_ids([Message("user", {"content": question})])
    assert (logits_of(ours.model, prompt) - logits_of(GPT.from_pretrained(SMOLLM2), prompt)).abs().max() > 0.1
    for path in "out/best", "export":
        kind = peft.AutoPeftModelForCausalLM if lora_rank and path == "out/best" else transformers.AutoModelForCausalLM
        other, tokenizer = (auto.from_pretrained(path) for auto in (kind, transformers.AutoTokenizer))
        assert_same_logits(ours.model.double(), other.double())  # in float32 rounding alone may reach 1.3e-4
        ours.model.float(), other.float()
        assert templated(tokenizer, turns(question)) == prompt
        assert all(tokenizer.encode(text) == ours.encoding.encode_ordinary(text) for text in PROMPTS)
        found = other.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(found[0, len(prompt):], skip_special_tokens=True) == answer
    # the loss that train.py reports is that of transformers over the answers of the validation split
    val, loss = Shards("data/colours", load_meta("data/colours"), "val"), 0.0
    for i in range(len(val)):
        idx, targets, _ = val.batch([i])
        loss += cross_entropy(logits_of(other, idx.tolist()), targets, reduction="sum").item()
    assert state.val_loss == pytest.approx(loss / val.supervised(range(len(val))), rel=1e-4)


# ---- asking ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, system", [({}, None), (dict(answer="The capital of"), None),
                                           (dict(system="Be brief."), "Be brief.")])
def test_a_model_of_others_is_asked_in_its_own_template(flags, system, tokenizer, heard):
    assert use(model=str(SMOLLM2), prompt=FRANCE, max_new_tokens=12, **flags) == [PARIS]
    assert heard == [templated(tokenizer, turns(FRANCE, system=system)) + tokenizer.encode(flags.get("answer", ""))]


def test_a_chat_keeps_its_turns(tokenizer, heard, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{FRANCE}\nAnd of Italy?\n"))
    use(model=str(SMOLLM2), max_new_tokens=12)
    assert heard == [templated(tokenizer, turns(*said)) for said in ((FRANCE,), (FRANCE, PARIS, "And of Italy?"))]


def test_adapters_share_their_base_and_answer_as_each_does_alone(folder, tokenizer):
    for seed, name in enumerate("AB"):
        with_lora(GPT.from_pretrained(SMOLLM2), seed=seed).save_adapter(name, str(SMOLLM2))
    both, prompt = [loaded.model for loaded in load("A,B")], templated(tokenizer, turns(FRANCE))
    first, second = (dict(model.named_parameters()) for model in both)
    assert all((first[name].data_ptr() == second[name].data_ptr()) == ("lora" not in name) for name in first)
    answers = [answers_of(model, [prompt], 8) for model in both]
    assert answers == [answers_of(load(name)[0].model, [prompt], 8) for name in "AB"] and answers[0] != answers[1]
