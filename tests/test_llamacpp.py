"""GGUF: what llama.cpp, transformers and Ollama get.

The test with real llama.cpp needs node and, in NANOSFT_NODE, a directory where `npm install node-llama-cpp` was run.
"""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import assert_same_logits, chat_model, tiny, tiny_llama, tiny_qwen, with_lora
from test_tokenizer import trained
from transformers import AutoModelForCausalLM, AutoTokenizer

import sample
from model import GPT
from nanosft.console import UserError
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


TURN = "<|endoftext|>user\n{{ .Prompt }}<|endoftext|>assistant\n"
MODELFILES = {
    "alpaca": ({}, "### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}"),
    "chat": (dict(template="chat"), "{{ if .System }}<|endoftext|>system\n{{ .System }}" + TURN + "{{ else }}" + TURN
             + "{{ end }}{{ .Response }}"),
    "chat by a format": (dict(template="chat", prompt_format="Q: {q}", response_format="{a}"),
                         f'"""{TURN.replace("{{", "Q: {{", 1)}{{{{ .Response }}}}'),
    "text": (dict(template="text"), '"""<|endoftext|>{{ .Prompt }}{{ .Response }}'),
    "text by a format": (dict(template="text", response_format="{a}"), '"""<|endoftext|>{{ .Prompt }}{{ .Response }}'),
    "two columns": (dict(prompt_format="{q}|{r}", response_format="{a}"), '"""{{ .Prompt }}{{ .Response }}'),
    "no column": (dict(prompt_format="Sing:", response_format="{a}"), '"""Sing:{{ .Response }}'),
    "a column": (dict(prompt_format="Q: {q} {{'x'}}\nA:", response_format="{a}"),
                 """Q: {{ .Prompt }} {{ "{" }}{{ "{" }}'x'}}\nA:{{ .Response }}"""),
    "quotes": (dict(prompt_format='Text: """\n{q}"""', response_format="{a}"),
               r"""Text: {{ "\"\"\"" }}""" + "\n" + r"""{{ .Prompt }}{{ "\"\"\"" }}{{ .Response }}"""),
}


@pytest.mark.parametrize("spec, end", MODELFILES.values(), ids=MODELFILES)
def test_a_modelfile_words_the_prompt_as_training_did(spec, end, tmp_path, capsys):
    export(gpt2_model(tmp_path / "m", **spec), tmp_path / "m.gguf")
    said = "word the columns of each as in '{q}|{r}'" in capsys.readouterr().out
    assert said == ("|" in spec.get("prompt_format", ""))
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith('FROM ./m.gguf\nPARAMETER stop "<|endoftext|>"') and text.endswith(f'{end}"""\n')


@pytest.mark.parametrize("question, said", [("", False), ("{q}", False), ("Q: {q}", True)])
def test_an_export_says_if_its_chat_template_words_no_questions(question, said, tmp_path, capsys):
    model = chat_model(tmp_path / "m")
    (tmp_path / "m" / "prompt.json").write_text(json.dumps(
        {"template": "model", "encoding": "tokenizer.json", "prompt_format": question, "response_format": "{a}"}))
    export(model, tmp_path / "e")
    assert ("does not word questions: give each as in 'Q: {q}'" in capsys.readouterr().out) == said


@pytest.mark.parametrize("wording, before", [({}, ""), (dict(prompt_format="Q: {q}", response_format="{a}"), "Q: ")])
def test_a_models_own_template_becomes_ollamas(wording, before, tmp_path):
    model = chat_model(tmp_path / "m")
    if wording:
        (tmp_path / "m" / "prompt.json").write_text(json.dumps(
            {"template": "model", "encoding": "tokenizer.json", **wording}))
    export(model, tmp_path / "m.gguf")
    start, end = "<|im_start|>", "<|im_end|>"
    user = f"{start}user\n{before}{{{{ .Prompt }}}}{end}\n{start}assistant\n"
    if not wording:
        system = f"{start}system\n{{{{ .System }}}}{end}\n{user}"
        user = f"{{{{ if .System }}}}{system}{{{{ else }}}}{user}{{{{ end }}}}"
    assert (tmp_path / "Modelfile").read_text().endswith(f'TEMPLATE """{user}{{{{ .Response }}}}"""\n')


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
