"""Every command of README and docs runs, shortened, in the order of the text, on small files of its kind; every flag that
they name exists."""
import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, colour_records, tiny, write_lines

import prepare_data
import sample
import train
from nanosft.flags import parse_config

SCRIPTS = {"prepare_data.py": (prepare_data.main, prepare_data.PrepareConfig),
           "train.py": (train.main, train.TrainConfig), "sample.py": (sample.main, sample.SampleConfig)}
SHORTER = {"prepare_data.py": {}, "sample.py": dict(max_new_tokens=4, device="cpu"),
           "train.py": dict(max_steps=2, max_minutes=0, device="cpu", n_layer=1, n_head=2, n_embd=32)}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TORCHRUN = {"standalone", "nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint"}


def commands(page):
    """The commands in a page's sh blocks, as lists of words."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [command for command in words if command]


@pytest.fixture
def work(tmp_path, monkeypatch, gpt2_encoding):
    """A directory with the files that the commands name: records of each kind, and a tiny GPT-2 in the hub's cache."""
    folder = tmp_path / "hub" / "models--openai-community--gpt2"
    tiny(vocab_size=50257, n_layer=1, n_embd=64, n_head=1, block_size=1024).save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (tmp_path / "instruction-data.json").write_text(json.dumps(colour_records(60)))
    write_lines(tmp_path / "lyrics.jsonl", [{"text": f"la {n} " * 300} for n in range(40)])
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "More?"), ("assistant", "Yes.")]
    write_lines(tmp_path / "conversations.jsonl", [
        {"messages": [{"role": role, "content": f"{text} {n}"} for role, text in turns]} for n in range(40)])
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be.\n" * 400)
    with open(tmp_path / "arxiv.csv", "w", newline="") as file:
        rows = [[f"On {n}", "We show it.", ("math", "cs")[n % 2]] for n in range(120)]
        csv.writer(file).writerows([["title", "abstract", "category"], *rows])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo_by_hand.jsonl").write_bytes((ROOT / "data" / "demo_by_hand.jsonl").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("builtins.input", lambda prompt: "")  # replaced where a chat must end
    return tmp_path


def run_command(words, work):
    """Runs one command of ours, shortened, and checks that it leaves what it promises. False for a foreign program's."""
    if words[:2] == ["python", "tests/baseline.py"]:
        done = subprocess.run([sys.executable, ROOT / words[1], *words[2:]], capture_output=True, text=True, check=True)
        assert re.search(r"[\d.]+% of", done.stdout)
    elif words[0] == "torchrun" and "--standalone" in words:
        words = [str(ROOT / word) if word in SCRIPTS else word for word in words[1:]]
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *words, "--max_steps=2", "--device=cpu"],
                       check=True, capture_output=True, timeout=120)
        with open(work / "out-two" / "log.csv", newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]
    elif words[0] == "python" and words[1] in SCRIPTS:
        main, config_class = SCRIPTS[words[1]]
        config = dataclasses.replace(parse_config(config_class, words[2:]), **SHORTER[words[1]])
        if words[1] == "train.py":
            main(dataclasses.replace(config, overwrite=True))
            assert (work / config.out_dir / "log.csv").is_file()
            assert (work / config.out_dir / "last" / "prompt.json").is_file()
        else:
            main(config)
        if words[1] == "sample.py" and config.file:
            assert (work / "answers.jsonl").is_file()
        if words[1] == "sample.py" and config.export:
            assert (work / config.export / "merges.txt").is_file()
    else:
        return False
    return True


def test_every_command_of_readme_and_docs_runs_and_leaves_what_it_promises(work, monkeypatch):
    def no_input(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", no_input)
    ran = [run_command(words, work) for page in PAGES for words in commands(page)]
    assert sum(ran) >= 35


def test_every_flag_in_readme_and_docs_exists():
    known = {field.name for _, config_class in SCRIPTS.values() for field in dataclasses.fields(config_class)}
    bench = re.findall(r'"--([\w-]+)"', (ROOT / "tests" / "bench.py").read_text(encoding="utf-8"))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"--([a-z][\w-]*)", text))
        assert named <= known | TORCHRUN | {*bench, "help"}, (page.name, named - known)
        # inside a command, each flag belongs to the script that it is given to
        inline = [shlex.split(command) for command in re.findall(r"`([^`\n]*\.py [^`\n]*)`", text)]
        for words in [*commands(page), *inline]:
            for at, word in enumerate(words):
                if word in SCRIPTS:
                    own = {field.name for field in dataclasses.fields(SCRIPTS[word][1])} | {"help"}
                    assert {flag.split("=")[0][2:] for flag in words[at + 1:] if flag[:2] == "--"} <= own, words


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script, capsys):
    config_class = SCRIPTS[script][1]
    with pytest.raises(SystemExit):
        parse_config(config_class, ["--help"])
    out = capsys.readouterr().out
    assert all(f"--{field.name} " in out for field in dataclasses.fields(config_class))
