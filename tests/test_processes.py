"""Training on several processes: the numbers of one, shared out; started by torchrun as the README says."""
import os
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT, colour_records, masters, rows

SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--device=cpu", "--dtype=float32", "--max_steps=7",
         "--eval_interval=3", "--batch_size=5", "--log_interval=1"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
pytestmark = pytest.mark.slow  # a process takes some three seconds to start


@pytest.fixture
def launch(spawn):
    """launch(processes, *flags) -> train.py as a job of so many processes."""
    def start(processes, *flags):
        torchrun = [*TORCHRUN, f"--nproc_per_node={processes}"] if processes > 1 else []
        small = [] if "--resume" in flags else SMALL
        return spawn(*torchrun, ROOT / "train.py", *small, *flags, start_new_session=True)
    return start


@pytest.fixture
def data(prepare):
    return prepare(colour_records(41), val_fraction=0.15)  # 33 or so for training: steps of five and a rest


def finish(job):
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err[-3000:]
    return out


def wait_for_checkpoint(job, out_dir):
    while not (out_dir / "ckpt.pt").exists():
        assert job.poll() is None, job.communicate()[1][-3000:]
        time.sleep(0.05)


def same(one, other):
    """Two runs have the same curves and weights, but for rounding."""
    a, b = rows(one), rows(other)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for name in ("train_loss", "val_loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens"):
        assert [float(row[name] or 0) for row in a] == pytest.approx([float(row[name] or 0) for row in b], rel=2e-5)
    a, b = masters(one), masters(other)
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert (weight - b[name]).abs().max() < 2e-4, name


@pytest.mark.parametrize("flags", [[], ["--lora_rank=4"]], ids=["full", "lora"])
def test_two_and_three_processes_give_the_numbers_of_one(flags, data, tmp_path, launch):
    common = [f"--data_dir={data}", "--micro_batch_tokens=150", "--max_steps=0", "--epochs=1.5"]
    if flags:
        finish(launch(1, *common, f"--out_dir={tmp_path / 'base'}", "--epochs=0.5"))
        common.append(f"--init_from={tmp_path / 'base'}")
    for count in (1, 2, 3):
        out = finish(launch(count, *common, *flags, f"--out_dir={tmp_path / str(count)}"))
        assert out.count("done: ") == 1  # one of them speaks for all
    same(tmp_path / "1", tmp_path / "2")
    same(tmp_path / "1", tmp_path / "3")


def test_a_step_of_fewer_examples_than_processes_loses_nothing(data, tmp_path, launch):
    common = [f"--data_dir={data}", "--batch_size=2", "--max_examples=5", "--max_steps=0", "--epochs=2"]
    for count in (1, 3):
        finish(launch(count, *common, f"--out_dir={tmp_path / str(count)}"))
    same(tmp_path / "1", tmp_path / "3")
    finish(launch(3, *common, "--dtype=bfloat16", f"--out_dir={tmp_path / 'half'}"))
    losses = [[float(row["train_loss"]) for row in rows(tmp_path / name)] for name in ("1", "half")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_stopped_job_is_resumed_with_another_number_of_processes(data, tmp_path, launch):
    common = [f"--data_dir={data}", "--max_steps=200", "--save_interval=10", "--eval_interval=0", "--dtype=float64"]
    finish(launch(1, *common, f"--out_dir={tmp_path / 'straight'}"))
    job = launch(2, *common, f"--out_dir={tmp_path / 'parts'}")
    wait_for_checkpoint(job, tmp_path / "parts")
    os.killpg(job.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    out, _ = job.communicate(timeout=60)
    assert "saved; go on with: python train.py --resume" in out
    step = torch.load(tmp_path / "parts" / "ckpt.pt", weights_only=True)["values"]["state"]["step"]
    assert 10 <= step < 200 and len(rows(tmp_path / "parts")) == step
    finish(launch(3, "--resume", f"--out_dir={tmp_path / 'parts'}"))
    same(tmp_path / "straight", tmp_path / "parts")


def test_a_killed_worker_ends_the_job_within_a_minute(data, tmp_path, launch):
    common = [f"--data_dir={data}", "--max_steps=100000", "--save_interval=20", "--eval_interval=0"]
    job = launch(2, *common, f"--out_dir={tmp_path / 'out'}")
    wait_for_checkpoint(job, tmp_path / "out")
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    job.communicate(timeout=60)
    assert job.returncode != 0
    out = finish(launch(1, "--resume", f"--out_dir={tmp_path / 'out'}", "--max_steps=1"))
    assert "nothing to do" in out  # the checkpoint loads
