"""GGUF: what llama.cpp, transformers and Ollama get.

The test with real llama.cpp needs node and, in NANOSFT_NODE, a directory where `npm install node-llama-cpp` was run.
"""
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
import torch
from conftest import assert_same_logits, chat_model, tiny, tiny_llama, tiny_qwen, with_lora
from test_chat_template import THINKING
from test_tokenizer import trained
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from model import GPT
from nanosft.chat_template import read_chat_template
from nanosft.console import UserError
from nanosft.records import Message
from sample import SampleConfig

gguf = pytest.importorskip("gguf")
SPEC = {"template": "alpaca", "prompt_format": "", "response_format": "", "encoding": "tokenizer.json"}


def llama_model(path, rope_scaling=None):
    """Positions that are not scaled, unlike chat_model's: transformers does not read the scaling of a GGUF."""
    chat_model(path)
    tiny_llama(vocab_size=2500, block_size=256, n_embd=64, head_dim=32, rope_scaling=rope_scaling).save_pretrained(path)
    return str(path)


def gpt2_model(path, **spec):
    tiny(vocab_size=2500, block_size=1024, n_embd=64).save_pretrained(path)
    (path / "tokenizer.json").write_text(trained("GPT-2"), encoding="utf-8")
    (path / "prompt.json").write_text(json.dumps({**SPEC, **spec}))
    return str(path)


def export(model, path, kind="f32"):
    sample.main(SampleConfig(model=str(model), export=str(path), gguf_type=kind))
    return path


def qwen_model(path):
    """With heads of 128, which transformers takes for granted in a GGUF."""
    chat_model(path)
    tiny_qwen(vocab_size=2600, block_size=256, n_embd=64, head_dim=128).save_pretrained(path)
    (path / "tokenizer.json").write_text(trained("Qwen"), encoding="utf-8")
    return str(path)


MODELS = {"gpt2": gpt2_model, "llama": llama_model, "qwen3": qwen_model}


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind, tolerance", [("f32", 1e-5), ("f16", 1e-2), ("bf16", 5e-2), ("q8_0", 1e-1)])
def test_transformers_reads_a_gguf_with_the_same_logits_and_tokens(family, kind, tolerance, tmp_path):
    model = MODELS[family](tmp_path / "m")
    export(model, tmp_path / "m.gguf", kind)
    others = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    assert_same_logits(model, others, tolerance)
    tokenizer, ours = (AutoTokenizer.from_pretrained(*where, **more) for where, more in (
        ([tmp_path], dict(gguf_file="m.gguf")), ([tmp_path / "m"], {})))
    for text in ("Say red.", "  naïve  日本 🙂\n\n\ttabs, don't 12345"):
        assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]


def test_lora_is_merged_and_a_file_that_is_there_stays(tmp_path):
    base = llama_model(tmp_path / "m")
    adapted = with_lora(GPT.from_pretrained(base))
    adapted.save_adapter(tmp_path / "a", base)
    export(tmp_path / "a", tmp_path / "a.gguf")
    assert_same_logits(adapted, AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf").eval())
    with pytest.raises(UserError, match="a.gguf is there already; name a file in another directory"):
        export(tmp_path / "a", tmp_path / "a.gguf")
    tiny().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "prompt.json").write_text(json.dumps({**SPEC, "encoding": "bytes"}))
    with pytest.raises(UserError, match="llama.cpp needs a tokenizer; a model of bytes has none: prepare with --model"):
        export(tmp_path / "bare", tmp_path / "b.gguf")
    with pytest.raises(UserError, match="Modelfile is there already; name a file in another directory"):
        export(tmp_path / "m", tmp_path / "b.gguf")
    assert not list(tmp_path.glob("b.gguf*"))


def ollama(path, messages):
    """What Ollama (Execute in its template.go) makes of a conversation by a Modelfile: Go's words in Jinja's."""
    source, blocks, text = path.read_text().partition('TEMPLATE """')[2].removesuffix('"""\n'), [], ""
    words = {'$last := ""': "{% set own = namespace(last='') %}", "$last = .Content": "{% set own.last = m.content %}",
             "$last": "{{ own.last }}", ".Content": "{{ m.content }}", ".System": "{{ system }}", "else": "{% else %}"}
    for piece in re.split(r"(\{\{ .*? \}\})", source):
        word = piece[3:-3]
        if not piece.startswith("{{ ") or word.startswith('"'):  # literal text
            text += piece
        elif word == "end":
            text += "{% end" + blocks.pop() + " %}"
        elif word.startswith(("if", "range")):
            blocks.append("if" if word.startswith("if") else "for")
            text += {"if .System": "{% if system %}", "range .Messages": "{% for m in messages %}",
                     'if eq .Role "user"': "{% if m.role == 'user' %}",
                     'if eq .Role "assistant"': "{% if m.role == 'assistant' %}"}[word]
        else:
            text += words[word]
    system = "".join(message["content"] for message in messages if message["role"] == "system")
    return jinja2.Environment(keep_trailing_newline=True).from_string(text).render(messages=messages, system=system)


COLUMNS = dict(prompt_format='Q: {q} {{\'x\'}} """ {q}\nA:', response_format="{a}")
MODELFILES = {
    "alpaca": {}, "one turn": dict(template="chat", turns="one"), "turns": dict(template="chat", turns="several"),
    "text": dict(template="text"), "text by a format": dict(template="text", response_format="{a}"),
    "no column": dict(prompt_format="Sing:", response_format="{a}"), "a column, twice": COLUMNS,
    "chat by a format": dict(template="chat", **COLUMNS), "a model's": dict(template="model"),
    "a model's by a format": dict(template="model", **COLUMNS)}
DEFAULT = """{% if messages[0].role != 'system' %}<|im_start|>system\nBe {kind}.<|im_end|>\n{% endif %}"""
SYSTEM_LAST = """{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n' %}\
{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.last and m.role == 'user' %}{{ system }}{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ONE = "{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}"
OTHERS = ("a default system prompt", "an empty thought", "one question", "a system prompt before the last question")


@pytest.mark.parametrize("name", [*MODELFILES, *OTHERS])
def test_a_modelfile_words_conversations_as_sample_py_does(name, tmp_path):
    spec, path = MODELFILES.get(name, dict(template="model")), tmp_path / "m"
    if spec.get("template") != "model":
        gpt2_model(path, **spec)
    else:
        chat_model(path)
        template = read_chat_template(path)
        template = dict(zip(OTHERS, (DEFAULT + template, THINKING, ONE + template, SYSTEM_LAST), strict=True)
                        ).get(name, template)
        (path / "tokenizer_config.json").write_text(json.dumps(
            {**json.loads((path / "tokenizer_config.json").read_text()), "chat_template": template}))
        (path / "prompt.json").write_text(json.dumps({**SPEC, **spec}))
    export(path, tmp_path / "m.gguf")
    text = (tmp_path / "Modelfile").read_text()
    loaded, = sample.load(SampleConfig(model=str(path), device="cpu", dtype="float32"))
    stop = loaded.encoding.decode([loaded.stop])
    assert text.startswith(f'FROM ./m.gguf\nPARAMETER stop "{stop}"\nPARAMETER temperature 0\nTEMPLATE """')
    system, asked, told, again = ({"role": role, "content": f"{role} {number}"} for number, role in enumerate(
        ("system", "user", "assistant", "user")))
    for said in ([asked], [system, asked], [asked, told, again], [system, asked, told, again]):
        if said[0] is system and not loaded.is_chat():
            continue
        ours = said if loaded.keeps_turns() and name not in OTHERS[2:] else [*said[:said[0] is system], said[-1]]
        messages = [Message(message["role"], {"content": message["content"]}) for message in ours]
        assert ollama(tmp_path / "Modelfile", said) == loaded.encoding.decode(loaded.prompt_ids(messages))


def test_columns_are_worded_by_who_asks_ollama(tmp_path, capsys):
    export(gpt2_model(tmp_path / "m", prompt_format="{q}|{r}", response_format="{a}"), tmp_path / "m.gguf")
    assert "word the columns of each as in '{q}|{r}'" in capsys.readouterr().out
    assert ollama(tmp_path / "Modelfile", [{"role": "user", "content": "1|2"}]) == "1|2"


@pytest.mark.parametrize("question, said", [("", False), ("{q}", False), ("Q: {q}", True)])
def test_an_export_says_if_its_chat_template_words_no_questions(question, said, tmp_path, capsys):
    model = chat_model(tmp_path / "m")
    (tmp_path / "m" / "prompt.json").write_text(json.dumps(
        {"template": "model", "encoding": "tokenizer.json", "prompt_format": question, "response_format": "{a}"}))
    export(model, tmp_path / "e")
    assert ("does not word questions: give each as in 'Q: {q}'" in capsys.readouterr().out) == said


NODE = os.getenv("NANOSFT_NODE", "")
ASK = """\
import {getLlama} from "node-llama-cpp";
import fs from "fs";
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: process.argv[2]});
const context = await model.createContext({contextSize: 256, threads: 1, experimentalKvCacheKeyType: "F32",
                                           experimentalKvCacheValueType: "F32"});
const sequence = context.getSequence();
const asked = JSON.parse(fs.readFileSync(process.argv[3])), answers = [], tokens = [];
for (const {ids, text} of asked) {
    const answer = [];
    await sequence.clearHistory();
    for await (const token of sequence.evaluate(ids, {temperature: 0})) {
        answer.push(token);
        if (answer.length === 24) break;
    }
    answers.push(answer);
    tokens.push(model.tokenize(text));
}
console.log(JSON.stringify({answers, tokens}));
process.exit(0);
"""


@pytest.mark.skipif(not NODE or not shutil.which("node"), reason="NANOSFT_NODE names no directory with node-llama-cpp")
@pytest.mark.parametrize("family", [*MODELS, "SmolLM2", "scaled rope"])
def test_real_llama_cpp_answers_token_for_token(family, tmp_path):
    smollm2 = os.getenv("NANOSFT_SMOLLM2", "/tmp/smollm2")
    if family == "SmolLM2" and not (Path(smollm2) / "ready").exists():
        pytest.skip(f"no SmolLM2 in {smollm2}")
    model = smollm2 if family == "SmolLM2" else MODELS.get(family, chat_model)(tmp_path / "m")
    loaded, = sample.load(SampleConfig(model=model, device="cpu", dtype="float32"))
    export(model, tmp_path / "m.gguf")
    texts = [f"Name {number} colours, {word}?" for number, word in enumerate("red green blue don't 12345".split() * 4)]
    prompts = [loaded.encoding.encode_ordinary(text) for text in texts]
    ours = [[] for _ in prompts]
    for step in loaded.model.generate(prompts, 24, stop=loaded.stop):
        for answer, token in zip(ours, step, strict=True):
            if token not in (None, loaded.stop):
                answer.append(token)
    (tmp_path / "asked.json").write_text(json.dumps([dict(ids=ids, text=text)
                                                     for ids, text in zip(prompts, texts, strict=True)]))
    script = Path(NODE) / f"ask-{os.getpid()}.mjs"
    script.write_text(ASK)
    try:
        done = subprocess.run(["node", script, tmp_path / "m.gguf", tmp_path / "asked.json"], capture_output=True,
                              text=True, cwd=NODE, timeout=60)
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs["tokens"] == prompts
    if family == "SmolLM2":
        assert theirs["answers"] == ours
    for prompt, own, other in zip(prompts, ours, theirs["answers"], strict=True):
        count = next((i for i, pair in enumerate(zip(own, other, strict=False)) if pair[0] != pair[1]), None)
        if count is not None:  # random weights: llama.cpp looks GELU up in a table of 16 bits, which decides ties anew
            with torch.no_grad():
                last = loaded.model(torch.tensor([prompt + own[:count]]))[0, -1]
            assert last[own[count]] - last[other[count]] < 0.01 * last.std()
    assert sum(own == other for own, other in zip(ours, theirs["answers"], strict=True)) >= 17
    assert torch.tensor([len(answer) for answer in ours]).float().mean() > 5
