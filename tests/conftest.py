"""Shared by the tests: tiny models and data, processes, and the way to GPT-2's vocabulary where it is at hand."""
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

if workers := os.getenv("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, and so do the scripts that they start
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(workers))))
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
if (SHARED / "tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken"))
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers  # noqa: E402

import prepare_data  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanosft.templates import get_encoding  # noqa: E402
from nanosft.weights import LLAMA  # noqa: E402

WORDS = "red green blue black white brown grey pink gold silver".split()


def randomise(model, std=0.1, seed=0):
    """Every parameter random, norms and biases too: with the usual initial values many mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            offset = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0  # a norm's
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + offset)
    return model


def tiny(seed=0, std=0.1, **changes):
    config = dict(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=32, eos_token_id=256, bos_token_id=256)
    return randomise(GPT(GPTConfig(**{**config, **changes})), std, seed)


def tiny_llama(seed=0, std=0.1, **changes):
    """With all that a Llama may have: heads that share keys and are wider than n_embd / n_head, scaled rotary
    positions, an output head of its own."""
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=32)
    return tiny(seed, std, **{**LLAMA, **dict(n_kv_head=2, head_dim=16, n_inner=48, rope_theta=100.0,
                                              rope_scaling=scaling, tied_head=False), **changes})


def chat_model(path):
    """A tiny Llama with a tokenizer and a chat template of its own at this path."""
    from test_chat_template import CHATML
    from test_tokenizer import trained
    tiny_llama(vocab_size=2500, block_size=256).save_pretrained(path)
    (path / "tokenizer.json").write_text(trained("Llama 3"), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "chat_template": CHATML}))
    return str(path)


def tiny_qwen(seed=0, std=0.1, **changes):
    return tiny_llama(seed, std, **{"qk_norm": True, "rope_scaling": None, **changes})


FAMILIES = {"gpt2": tiny, "llama": tiny_llama, "qwen3": tiny_qwen}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def with_lora(model, targets=(), seed=3):
    """The model with a LoRA update whose every value is random."""
    model, generator = model.add_lora(4, 6.0, 0.0, targets), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def theirs(path):
    """transformers' model of a directory."""
    return transformers.AutoModelForCausalLM.from_pretrained(path).eval()


def logits(model):
    """Of a fixed text, by a model, ours or others', or by the one at a path."""
    model = model if isinstance(model, torch.nn.Module) else GPT.from_pretrained(model)
    with torch.no_grad():
        found = model.eval()(torch.arange(48)[None])
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_same_logits(ours, others, tolerance=1e-4):
    """Each is a model or, if ours, its path."""
    expected = logits(others)
    assert (logits(ours) - expected).abs().max() < tolerance * expected.std()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def colour_records(count=60):
    """Records whose answers have unequal lengths and follow from the prompt."""
    return [{"instruction": f"Say {' and '.join(WORDS[(i * 7 + j) % 10] for j in range(1 + i % 4))} {i}.",
             "output": " ".join(WORDS[(i * 7 + j) % 10] for j in range(1 + i % 4))} for i in range(count)]


def prepared(source, out_dir, **flags):
    """Prepares records, or those of a file, in the bytes encoding with short prompts; returns out_dir."""
    if isinstance(source, list):
        source = write_lines(out_dir.parent / "records.jsonl", source)
    prepare_data.main(prepare_data.PrepareConfig(**{**dict(
        input=str(source), out_dir=str(out_dir), encoding="bytes", show=0, block_size=128,
        template="" if ".txt" in str(source) or "prompt_format" in flags else "chat"), **flags}))
    return out_dir


@pytest.fixture
def prepare(tmp_path):
    """prepare(records, **flags) -> data_dir, a new one each time that out_dir does not name one."""
    def prepare_anew(source, out_dir=None, **flags):
        return prepared(source, out_dir or tmp_path / f"data-{len(list(tmp_path.iterdir()))}", **flags)
    return prepare_anew


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The directory of prepared data that nobody changes."""
    return prepared(colour_records(80), tmp_path_factory.mktemp("data") / "prepared")


# ---- what train.py leaves -------------------------------------------------------------------------------------------

def checkpoint(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def masters(out_dir):
    return checkpoint(out_dir)["tensors"]["masters"]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def rows(out_dir):
    """log.csv without a last row that is not whole; [] where there is none."""
    if not (out_dir / "log.csv").exists():
        return []
    with open(out_dir / "log.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row.values()]


def column(out_dir, name):
    return [float(row[name]) for row in rows(out_dir) if row[name]]


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spawn():
    """spawn(*words, **options) -> a Python process on one thread, with pipes, that is dead when the test has ended. It
    hears SIGINT and SIGHUP, though they are ignored here (in the background, under nohup)."""
    jobs, numbers = [], (signal.SIGINT, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, lambda *_: None)  # a child inherits only what is ignored

    def start(*words, **options):
        defaults = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        jobs.append(subprocess.Popen([sys.executable, *map(str, words)], text=True, **{**defaults, **options}))
        return jobs[-1]

    yield start
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    for job in jobs:
        job.terminate()  # torchrun ends its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(15)
        job.kill()
        job.communicate()


@pytest.fixture(scope="session")
def gpt2_encoding():
    try:
        return get_encoding("gpt2")
    except ValueError:
        pytest.skip("GPT-2's vocabulary is neither cached nor can it be downloaded")
