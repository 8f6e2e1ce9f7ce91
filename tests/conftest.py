"""Shared by the tests: tiny models and data, processes, and the way to GPT-2's vocabulary where it is at hand."""
import contextlib
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

import prepare_data  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from nanosft.templates import get_encoding  # noqa: E402

WORDS = "red green blue black white brown grey pink gold silver".split()


def randomise(model, std=0.1, seed=0):
    """Every parameter random, norms and biases too: with the usual initial values many mistakes do not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            offset = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + offset)
    return model


def tiny(seed=0, std=0.1, **changes):
    config = dict(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=32, eos_token_id=256)
    return randomise(GPT(GPTConfig(**{**config, **changes})), std, seed)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def colour_records(count=60):
    """Records whose answers have unequal lengths and follow from the prompt."""
    return [{"instruction": f"Say {' and '.join(WORDS[(i * 7 + j) % 10] for j in range(1 + i % 4))} {i}.",
             "output": " ".join(WORDS[(i * 7 + j) % 10] for j in range(1 + i % 4))} for i in range(count)]


@pytest.fixture
def prepare(tmp_path):
    """prepare(records, **flags) -> data_dir, in the bytes encoding with short prompts."""
    def prepare_records(records, name="records.jsonl", **flags):
        source = write_lines(tmp_path / name, records) if isinstance(records, list) else records
        out_dir = tmp_path / f"data-{len(list(tmp_path.iterdir()))}"
        prepare_data.main(prepare_data.PrepareConfig(**{**dict(
            input=str(source), out_dir=str(out_dir), encoding="bytes", show=0, template="chat", block_size=128,
        ), **flags}))
        return out_dir
    return prepare_records


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
