"""Every command of README and docs runs, shortened, in the order of the text; every flag that they name exists."""
import dataclasses
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
from conftest import ROOT, chat_model, colour_records, tiny, write_lines

import prepare_data
import sample
import train
from nanosft.flags import parse_config

SCRIPTS = {"prepare_data.py": (prepare_data.main, prepare_data.PrepareConfig),
           "train.py": (train.main, train.TrainConfig), "sample.py": (sample.main, sample.SampleConfig)}
SHORTER = {"prepare_data.py": {}, "sample.py": dict(max_new_tokens=4, device="cpu", dtype="float32"),
           "train.py": dict(max_steps=2, max_minutes=0, eval_interval=0, n_layer=1, n_head=2, n_embd=32, device="cpu",
                            dtype="float32", overwrite=True)}
TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
TOKENIZER = json.dumps({"model": {"vocab": {"\u0120the": 262}}})  # of GPT-2's, as much as is looked at
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    """The commands in a page's sh blocks, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    parts = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


@pytest.fixture
def work(tmp_path, monkeypatch, gpt2_encoding):
    """A directory with the files that the commands name, small ones, and tiny models in the hub's cache."""
    for name in ("openai-community--gpt2", "HuggingFaceTB--SmolLM2-135M-Instruct"):
        snapshot = tmp_path / "hub" / f"models--{name}" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text("abc")
        if "SmolLM2" in name:
            chat_model(snapshot)
        else:
            tiny(vocab_size=50257, n_layer=1, n_embd=32, n_head=1, block_size=1024).save_pretrained(snapshot)
            (snapshot / "tokenizer.json").write_text(TOKENIZER)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo_by_hand.jsonl").write_bytes((ROOT / "data" / "demo_by_hand.jsonl").read_bytes())
    (tmp_path / "instruction-data.json").write_text(json.dumps(colour_records()))
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be.\n" * 400)
    write_lines(tmp_path / "lyrics.jsonl", [{"text": f"la {n} " * 100} for n in range(40)])
    write_lines(tmp_path / "conversations.jsonl", [{"messages": [
        {"role": role, "content": f"Hi {n}."} for role in ("user", "assistant") * 2]} for n in range(40)])
    rows = "".join(f"On {n},We show it.,{('math', 'cs')[n % 2]}\n" for n in range(120))
    (tmp_path / "arxiv.csv").write_text("title,abstract,category\n" + rows)
    (tmp_path / "eight.csv").write_text("title,abstract,category\n" + "".join(rows.splitlines(True)[:8]))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat ends at once
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no pictures: they take half of the time
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def run_script(script, words):
    """Runs one command of ours, shortened, and checks that it leaves what it promises."""
    main, config_class = SCRIPTS[script]
    config = dataclasses.replace(parse_config(config_class, words), **SHORTER[script])
    main(config)
    if script == "train.py":
        assert Path(config.out_dir, "log.csv").is_file() and Path(config.out_dir, "last", "prompt.json").is_file()
    elif script == "sample.py" and config.file:
        assert Path("answers.jsonl").is_file()
    elif script == "sample.py" and config.export:
        assert Path(config.export, "tokenizer.json").read_text() == TOKENIZER
        assert Path(config.export, "chat_template.jinja").is_file()


@pytest.mark.slow
def test_every_command_of_readme_and_docs_runs_and_leaves_what_it_promises(work):
    ran = 0
    for words in [words for page in PAGES for words in commands(page)]:
        if words[0] == "python" and words[1] in SCRIPTS:
            run_script(words[1], words[2:])
        elif words[:2] == ["python", "tests/baseline.py"]:
            subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True, capture_output=True)
        elif words[0] == "torchrun" and "--standalone" in words:
            words = [str(ROOT / word) if word in SCRIPTS else word for word in words[1:]]
            subprocess.run([sys.executable, "-m", "torch.distributed.run", *words, "--max_steps=2", "--device=cpu",
                            "--dtype=float32", "--eval_interval=0"], check=True, capture_output=True, timeout=120)
            assert len(Path("out-two", "log.csv").read_text().splitlines()) == 3
        else:
            continue
        ran += 1
    assert ran >= 35


def test_every_flag_in_readme_and_docs_exists():
    own = {script: {field.name for field in dataclasses.fields(SCRIPTS[script][1])} for script in SCRIPTS}
    bench = re.findall(r'"--([\w-]+)"', (ROOT / "tests" / "bench.py").read_text(encoding="utf-8"))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        unknown = set(re.findall(r"--([a-z][\w-]*)", text)) - set().union(*own.values(), TORCHRUN, bench, ["help"])
        assert not unknown, (page.name, unknown)
        # a flag in a command belongs to the script before it
        inline = [shlex.split(command) for command in re.findall(r"`([^`\n]*\.py [^`\n]*)`", text)]
        for words in [*commands(page), *inline]:
            for script in own.keys() & set(words):
                flags = [word[2:].split("=")[0] for word in words[words.index(script):] if word.startswith("--")]
                assert set(flags) <= own[script] | {"help"}, words


def test_the_benchmark_gives_its_rows(prepare, tmp_path):
    tiny(n_embd=64, block_size=1024).save_pretrained(tmp_path / "weights")
    prepare(colour_records(60), val_fraction=0, test_fraction=0).rename(tmp_path / "data")
    for name in ("full", "lora"):
        done = subprocess.run([sys.executable, ROOT / "tests" / "bench.py", name, "--steps=4",
                               f"--directory={tmp_path}"], capture_output=True, text=True, check=True)
        assert re.search(rf"^ROW {name} [\d.]+ s/step peak RSS [\d.]+ GB$", done.stdout, re.M)
        assert len((tmp_path / name / "log.csv").read_text().splitlines()) == 5



@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, capsys):
    with pytest.raises(SystemExit):
        parse_config(SCRIPTS[script][1], ["--help"])
    out = capsys.readouterr().out
    assert all(f"--{field.name} " in out for field in dataclasses.fields(SCRIPTS[script][1]))


def test_every_break_of_mutations_py_quotes_one_place():
    assert len({mutations.where(name).name for name in mutations.MUTATIONS}) > 15
