"""Every command of the README runs, shortened, in the order in which it stands there, on small files of its kind."""
import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, colour_records, tiny

import prepare_data
import sample
import train
from config import parse_config

SCRIPTS = {"prepare_data.py": (prepare_data.main, prepare_data.PrepareConfig),
           "train.py": (train.main, train.TrainConfig), "sample.py": (sample.main, sample.SampleConfig)}
SHORTER = {"train.py": dict(max_steps=2, max_minutes=0, device="cpu", n_layer=1, n_head=2, n_embd=32),
           "sample.py": dict(max_new_tokens=4, device="cpu"), "prepare_data.py": {}}


def commands():
    """The README's commands for our three scripts, as lists of words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    inline = re.findall(r"`(python \w+\.py[^`]*)`", text)
    words = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [one for one in words if one[:1] == ["python"] and one[1] in SCRIPTS], [
        shlex.split(line) for line in inline]


def test_every_command_of_the_readme_runs_and_leaves_what_it_promises(tmp_path, monkeypatch, gpt2_encoding):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--openai-community--gpt2"
    tiny(vocab_size=50257, n_embd=64, n_head=1, block_size=1024).save_pretrained(folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (tmp_path / "instruction-data.json").write_text(json.dumps(colour_records(60)))
    (tmp_path / "lyrics.jsonl").write_text("".join(json.dumps({"text": f"la {n} " * 300}) + "\n" for n in range(40)))
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be.\n" * 400)
    with open(tmp_path / "arxiv.csv", "w", newline="") as file:
        csv.writer(file).writerows([["title", "abstract", "category"], *(
            [f"On {n}", "We show it.", ("math", "cs")[n % 2]] for n in range(120))])

    def no_input(_):
        raise EOFError
    monkeypatch.setattr("builtins.input", no_input)
    ran = 0
    for _, script, *words in commands()[0]:
        main, config_class = SCRIPTS[script]
        config = parse_config(config_class, words)
        shorter = {**SHORTER[script], **({"out_dir": "out", "overwrite": True} if config_class is train.TrainConfig
                                         and config.out_dir == "out" else {})}
        main(dataclasses.replace(config, **shorter))
        ran += 1
        if script == "train.py":
            assert (tmp_path / config.out_dir / "log.csv").is_file()
            assert (tmp_path / config.out_dir / "last" / "prompt.json").is_file()
        elif script == "sample.py" and config.file:
            assert (tmp_path / "answers.jsonl").is_file()
        elif script == "sample.py" and config.export:
            assert (tmp_path / config.export / "merges.txt").is_file()
    assert ran >= 18
    done = subprocess.run([sys.executable, ROOT / "tests" / "baseline.py", "arxiv.csv", "data/arxiv", "category"],
                          capture_output=True, text=True, check=True)
    assert re.search(r"[\d.]+% of", done.stdout)
    line, = re.findall(r"^torchrun --standalone.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    words = [str(ROOT / "train.py") if word == "train.py" else word for word in shlex.split(line)[1:]]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", *words, "--max_steps=2", "--device=cpu",
                    "--log_interval=1"], check=True, capture_output=True, timeout=120)
    with open(tmp_path / "out-two" / "log.csv", newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]


def test_the_benchmark_gives_its_rows(prepare, tmp_path):
    tiny(n_embd=64, block_size=1024).save_pretrained(tmp_path / "weights")
    prepare(colour_records(60), val_fraction=0, test_fraction=0).rename(tmp_path / "data")
    for name in ("full", "lora"):
        done = subprocess.run([sys.executable, ROOT / "tests" / "bench.py", name, "--steps=4",
                               f"--directory={tmp_path}"], capture_output=True, text=True, check=True)
        assert re.search(rf"^ROW {name} [\d.]+ s/step peak RSS [\d.]+ GB$", done.stdout, re.M)
        assert len((tmp_path / name / "log.csv").read_text().splitlines()) == 5


def test_every_flag_in_the_readme_exists():
    blocks, inline = commands()
    for _, script, *words in [one for one in inline if one[1] in SCRIPTS]:
        parse_config(SCRIPTS[script][1], words)
    known = {field.name for _, config_class in SCRIPTS.values() for field in dataclasses.fields(config_class)}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    foreign = {"help", "name", "size", "peers", "keep", "steps", "start",  # and torchrun's:
               "standalone", "nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint"}
    named = set(re.findall(r"--(\w+)", text)) - foreign
    assert named and named <= known, named - known
    assert len(blocks) >= 18


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag_with_its_default(script, capsys):
    config_class = SCRIPTS[script][1]
    with pytest.raises(SystemExit):
        parse_config(config_class, ["--help"])
    out = capsys.readouterr().out
    assert all(f"--{field.name} " in out for field in dataclasses.fields(config_class))
