"""What a run survives: SIGKILL at any moment, Ctrl-C, a full disk, missing files; and that its memory is flat.

KILLS=200 pytest tests/test_kill.py -k killed -n 0 -s  # the first test's long form; by default it kills eight times
"""
import csv
import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, colour_records, tiny, write_lines

import console
import prepare_data
import train
import watch
import weights as weights_module
from config import parse_config
from model import GPT
from train import TrainConfig

KILLS = int(os.environ.get("KILLS", 8))
SMALL = dict(n_layer=2, n_head=2, n_embd=32, dropout=0.1, device="cpu", dtype="float32", compile="off", hardest=0,
             batch_size=4, lr_schedule="constant", warmup_steps=2, eval_interval=3, save_interval=2, log_interval=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    prepare_data.main(prepare_data.PrepareConfig(
        input=str(write_lines(path / "records.jsonl", colour_records(40))), out_dir=str(path / "prepared"),
        encoding="bytes", template="chat", block_size=128, show=0))
    return path / "prepared"


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models wait for their threads more than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(**flags):
    return [f"--{name}={value}" for name, value in flags.items()]


def spawn(*command, **options):
    """A process of its own on one thread, for only then are two runs of unlike parts equal to the bit."""
    return subprocess.Popen([sys.executable, *map(str, command)], text=True, **{
        **dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}), **options})


def wait_for(condition, job, seconds=60):
    """What `condition` returns once that is true, while the job runs; None where the job has ended."""
    end = time.monotonic() + seconds
    while job.poll() is None:
        if found := condition():
            return found
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def checkpoint(path):
    return torch.load(path / "ckpt.pt", weights_only=True)


def rows(path):
    """log.csv without the seconds, and without a last row that is not whole."""
    with open(path / "log.csv", newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file) if None not in row.values()]


def steps(path):
    return [int(row["step"]) for row in rows(path)]


def leftovers(path):
    return sorted(path.rglob("*.tmp"))


def equal(one, other):
    """Two runs' checkpoints and logs are the same to the bit."""
    a, b = checkpoint(one), checkpoint(other)
    moments = ([state[name] for run in (a, b) for state in run["optimizer"]["state"].values()]
               for name in ("exp_avg", "exp_avg_sq", "step"))
    for values in moments:
        half = len(values) // 2
        assert half and all(torch.equal(x, y) for x, y in zip(values[:half], values[half:], strict=True))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(weight, b["model"][name]) for name, weight in a["model"].items())
    assert [a[name] for name in ("step", "crc", "best_val_loss", "scaler")] == [
        b[name] for name in ("step", "crc", "best_val_loss", "scaler")]
    assert rows(one) == rows(other) and steps(one) == list(range(1, a["step"] + 1))


def snapshot(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# ---- SIGKILL --------------------------------------------------------------------------------------------------------

def size(path):
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has been renamed
        return 0


def kill_one(job, out_dir, chance, before):
    """Kills a run at a random moment: while it starts, between its saves, or within one."""
    kind = chance.random()
    if kind < 0.1:
        time.sleep(chance.uniform(0, 3))
    else:
        wait_for(lambda: os.stat(out_dir / "ckpt.pt").st_mtime_ns != before, job)
        time.sleep(chance.uniform(0, 0.4))
        if kind > 0.7:  # when the last byte of a new checkpoint is written
            whole = size(out_dir / "ckpt.pt")
            wait_for(lambda: any(size(path) >= whole for path in out_dir.glob("ckpt.pt.*.tmp")), job)
        elif kind > 0.4:
            wait_for(lambda: leftovers(out_dir), job)
            time.sleep(chance.choice([0, chance.uniform(0, 0.02)]))
    assert job.poll() is None, job.communicate()
    job.kill()
    job.wait()


def loads(path):
    try:
        return bool(torch.load(path, weights_only=True))
    except Exception:  # torch.load raises many kinds for half a file
        return False


def killed_run(data, out_dir, kills, seed):
    """Starts a run, kills it so many times, lets it end and compares it with one that nobody killed. Returns its steps
    and what the kills met: how many fell into the writing of which file, and how many came when the new checkpoint was
    written and only its renaming was left."""
    chance, met, newest, before = random.Random(seed), Counter(), 0, 0
    printed = out_dir.with_name(out_dir.name + ".txt")
    flags = words(**SMALL | dict(data_dir=data, n_layer=4, n_embd=192, batch_size=2, eval_interval=7, seed=seed,
                                 max_steps=10**6, save_interval=1 + seed % 2))
    job = spawn(ROOT / "train.py", *flags, f"--out_dir={out_dir}", stdout=open(printed, "w"))
    wait_for((out_dir / "ckpt.pt").exists, job)
    resume = [ROOT / "train.py", "--resume", f"--out_dir={out_dir}"]
    for number in range(kills):
        if number:
            job = spawn(*resume, stdout=open(printed, "w"))
        kill_one(job, out_dir, chance, before)
        before = os.stat(out_dir / "ckpt.pt").st_mtime_ns
        state, found = checkpoint(out_dir), leftovers(out_dir)
        shown = [int(step.replace(",", "")) for step in re.findall(r"^step ([\d,]+)/", printed.read_text(), re.M)]
        proven = max([*steps(out_dir), *shown], default=0)
        assert state["step"] >= max(newest, proven - state["config"]["save_interval"])
        newest = state["step"]
        assert len(found) <= 1, "what a killed run was writing is removed when it goes on"
        if (out_dir / "best" / "model.safetensors").exists():
            assert GPT.from_pretrained(out_dir / "best").config.n_head == 2
            assert (out_dir / "best" / "prompt.json").exists()
        if found and f".{job.pid}." in found[0].name:
            met[found[0].name.split(f".{job.pid}.")[0]] += 1
            met["renaming"] += found[0].name.startswith("ckpt.pt") and loads(found[0])
    job = spawn(*resume, f"--max_steps={newest + 9}", "--save_interval=0")
    straight = out_dir.with_name(out_dir.name + "-straight")
    other = spawn(ROOT / "train.py", *flags, f"--out_dir={straight}", f"--max_steps={newest + 9}", "--save_interval=0")
    for process in (job, other):
        _, err = process.communicate(timeout=600)
        assert (process.returncode, err) == (0, "")
    equal(out_dir, straight)
    assert not leftovers(out_dir)
    return newest + 9, met


@pytest.mark.slow
def test_a_run_killed_anywhere_again_and_again_equals_one_that_nobody_killed(data, tmp_path):
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(killed_run, data, tmp_path / f"run{i}", KILLS // 2, i) for i in range(2)]
        counts, met = zip(*(run.result() for run in runs), strict=True)
    met = sum(met, Counter())
    renaming, seconds = met.pop("renaming", 0), time.monotonic() - started
    print(f"\n{KILLS // 2 * 2} kills in {sum(counts)} steps and {seconds:.0f} seconds; {met.total()} within a save "
          f"({dict(met)}), {renaming} of these with nothing but the new checkpoint's renaming left")
    assert met["ckpt.pt"] >= KILLS // 5


# ---- signals, and readers that leave --------------------------------------------------------------------------------

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
                         ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_after_its_step_with_the_way_to_go_on(number, code, data, tmp_path):
    flags = SMALL | dict(data_dir=data, max_steps=10**6, eval_interval=0, save_interval=0, log_interval=10**5)
    job = spawn(ROOT / "train.py", *words(**flags), f"--out_dir={tmp_path / 'out'}")
    wait_for(lambda: (tmp_path / "out" / "log.csv").exists() and len(rows(tmp_path / "out")) >= 10, job)
    job.send_signal(number)
    out, err = job.communicate(timeout=30)
    step = checkpoint(tmp_path / "out")["step"]
    assert (job.returncode, err) == (code, "")
    assert out.splitlines()[-1] == (f"stopped after step {step:,} and saved; go on with: python train.py --resume "
                                    f"--out_dir={tmp_path / 'out'}")
    assert steps(tmp_path / "out") == list(range(1, step + 1))  # the last few were not read when the signal came


def test_a_closed_terminal_ends_the_run_saved_though_its_hangup_comes_twice_and_its_output_is_gone(data, tmp_path):
    flags, out_dir = SMALL | dict(data_dir=data, max_steps=10**6, eval_interval=0), tmp_path / "out"
    terminal, inside = os.openpty()
    job = subprocess.Popen([sys.executable, ROOT / "train.py", *words(**flags), f"--out_dir={out_dir}"], stdin=inside,
                           stdout=inside, stderr=inside)
    os.close(inside)
    wait_for(lambda: (out_dir / "log.csv").exists() and len(rows(out_dir)) >= 5, job)
    os.close(terminal)  # whoever writes there now gets EIO
    for _ in range(2):
        job.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    assert job.wait(timeout=30) == 129
    assert steps(out_dir) == list(range(1, checkpoint(out_dir)["step"] + 1)) and (out_dir / "last").is_dir()


def test_a_reader_that_leaves_ends_nothing(data, tmp_path):
    command = " ".join([sys.executable, "train.py", *words(**SMALL | dict(data_dir=data, max_steps=30, log_interval=1)),
                        f"--out_dir={tmp_path / 'out'} | head -n 1; exit ${{PIPESTATUS[0]}}"])
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and checkpoint(tmp_path / "out")["step"] == 30
    assert done.stderr == "warning: nobody takes the output any more (Broken pipe); the work goes on\n"


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.Interrupt():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, before)


SLOW = {"step": "train.update = lambda *args, update=train.update: exists() and time.sleep(60) or update(*args)",
        "save": "os.fsync = lambda file: os.readlink(f'/proc/self/fd/{file}').endswith('.tmp') and exists() "
                "and time.sleep(60)"}


@pytest.mark.parametrize("what", SLOW)
def test_a_second_ctrl_c_leaves_at_once_and_the_last_checkpoint_is_whole(what, data, tmp_path):
    saved = str(tmp_path / "out" / "ckpt.pt")
    code = (f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); import config, console, train\n"
            f"exists = lambda: os.path.exists({saved!r}) and not print('slow', flush=True)\n"
            f"{SLOW[what]}\nconsole.run(train.main, config.parse_config, train.TrainConfig)")
    flags = SMALL | dict(data_dir=data, out_dir=tmp_path / "out", max_steps=5, eval_interval=0)
    job = spawn("-c", code, *words(**flags))
    assert any(line == "slow\n" for line in job.stdout)
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None  # the first one waits for the step's end
    started = time.monotonic()
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=30)
    assert time.monotonic() - started < 2 and (job.returncode, err) == (-signal.SIGINT, "")
    assert checkpoint(tmp_path / "out")["step"] == 2 and len(leftovers(tmp_path / "out")) == (what == "save")
    train.main(TrainConfig(resume=True, out_dir=str(tmp_path / "out")))
    assert checkpoint(tmp_path / "out")["step"] == 5 and not leftovers(tmp_path / "out")


# ---- disks and files ------------------------------------------------------------------------------------------------

@pytest.fixture
def command(data, monkeypatch, capsys):
    """command(**flags) -> (exit code, lines on stderr) of train.py's command line, in this process."""
    def run(**flags):
        given = flags if "resume" in flags else SMALL | dict(data_dir=data, max_steps=6) | flags
        monkeypatch.setattr(sys, "argv", ["train.py", *words(**given)])
        capsys.readouterr()
        try:
            console.run(train.main, parse_config, TrainConfig)
        except SystemExit as left:
            return left.code, capsys.readouterr().err.splitlines()
        return 0, capsys.readouterr().err.splitlines()
    return run


def mount(path, *options):
    done = os.geteuid() == 0 and shutil.which("mount") and subprocess.run(
        ["mount", *options, str(path)], capture_output=True).returncode == 0
    if not done:
        pytest.skip("mounting is not permitted here")


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount(path, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path, room):
    """Fills a file system but for `room` bytes."""
    with open(path / "filler", "wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - room))


# what does not fit any more: (flags, room that is left after the first checkpoint, the file that the message names)
FULL = {"checkpoint": (dict(eval_interval=0), 100_000, r"ckpt\.pt"),
        "best": (dict(), 50_000, r"best/model\.safetensors"),
        "log": (dict(eval_interval=0, save_interval=100), 0, r"log\.csv")}


def goes_on(command, out_dir, first, before, code, err, name):
    """After a failed write: one line that names the file, the old checkpoint, nothing half-written; then more steps."""
    assert code == 1 and len(err) == 1 and re.search(name, err[0]) and "No space left" in err[0], err
    assert (out_dir / "ckpt.pt").read_bytes() == before and not leftovers(out_dir)
    assert command(resume=True, out_dir=out_dir, max_steps=first + 5) == (0, [])
    assert steps(out_dir) == list(range(1, first + 6)) and checkpoint(out_dir)["step"] == first + 5
    assert GPT.from_pretrained(out_dir / "best").config.n_embd == 32


def after_first_save(monkeypatch, action):
    """Calls `action` when the first checkpoint is written; returns a list that will hold its bytes and its step."""
    saved, real = [], train.save_checkpoint

    def save(path, **state):
        real(path, **state)
        if not saved:
            saved.extend([path.read_bytes(), state["step"]])
            action()
    monkeypatch.setattr(train, "save_checkpoint", save)
    return saved


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(what, disk, command, monkeypatch):
    flags, room, name = FULL[what]
    saved = after_first_save(monkeypatch, lambda: fill(disk, room))
    code, err = command(out_dir=disk / "out", **{"max_steps": 300, **flags})
    (disk / "filler").unlink()
    goes_on(command, disk / "out", saved[1], saved[0], code, err, name)


@pytest.mark.parametrize("what", FULL)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_write_that_fails_ends_the_run_in_one_line_and_keeps_the_checkpoint(what, tmp_path, command, monkeypatch):
    """The same without a file system of its own: the file's bytes go where there is no space left."""
    flags, _, name = FULL[what]

    def full(path, *args, **options):
        bad = saved and re.search(name, str(path)) and not (args or ["r"])[0].startswith("r")
        return open("/dev/full" if bad else path, *args, **options)
    saved = after_first_save(monkeypatch, lambda: None)
    with monkeypatch.context() as patch:
        for module in (weights_module, train):
            patch.setattr(module, "open", full, raising=False)
        code, err = command(out_dir=tmp_path / "out", **{"max_steps": 300, **flags})
    goes_on(command, tmp_path / "out", saved[1], saved[0], code, err, name)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_that_cannot_be_written_anew_stays_as_it_was(tmp_path, command, monkeypatch):
    command(out_dir=tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "open", lambda path, *args, **options: open(
            "/dev/full" if "log.csv" in str(path) else path, *args, **options), raising=False)
        code, err = command(out_dir=tmp_path / "out", resume=True, max_steps=9)
    assert code == 1 and len(err) == 1 and "log.csv" in err[0] and snapshot(tmp_path / "out") == before


def test_a_checkpoints_steps_all_stand_in_the_log_though_no_line_was_due(tmp_path, command, monkeypatch):
    def die():
        raise ZeroDivisionError
    after_first_save(monkeypatch, die)
    with pytest.raises(ZeroDivisionError):
        command(out_dir=tmp_path / "out", save_interval=7, eval_interval=0, log_interval=100, max_steps=50)
    assert checkpoint(tmp_path / "out")["step"] == 7 and steps(tmp_path / "out") == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("flags", [dict(), dict(lora_rank=4)], ids=["full", "lora"])
def test_where_there_are_weights_all_that_they_need_is_there(flags, tmp_path, command, monkeypatch):
    """What makes a directory a model is renamed into it last: a run killed before leaves none, not a wrong one."""
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    done, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(str(new)) or replace(old, new))
    command(out_dir=tmp_path / "out", init_from=tmp_path / "base", forget_text="none", **flags)
    best = [os.path.basename(path) for path in done if "/best/" in path]
    size = len({*best})
    assert size == 3 and {*best[size - 1::size]} == {"adapter_config.json" if flags else "model.safetensors"}


def test_a_directory_that_cannot_be_written_gets_one_line(tmp_path, command, disk):
    command(out_dir=disk / "out")
    before = snapshot(disk)
    mount(disk, "-o", "remount,ro")
    for flags in (dict(out_dir=disk / "new"), dict(out_dir=disk / "out", resume=True, max_steps=9),
                  dict(out_dir=disk / "out", overwrite=True)):
        code, err = command(**flags)
        assert code == 1 and len(err) == 1 and "Read-only file system" in err[0] and str(disk) in err[0], err
    assert snapshot(disk) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_gets_one_line(tmp_path, command):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, err = command(out_dir=tmp_path / "locked" / "out")
    assert code == 1 and len(err) == 1 and "Permission denied" in err[0]


def test_a_directory_that_cannot_be_made_gets_one_line(tmp_path, command):
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "out"):
        code, err = command(out_dir=out_dir)
        assert code == 1 and len(err) == 1 and str(tmp_path / "file") in err[0], err
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("name", ["train_00000.npy", "val_00000.npy", "meta.json"])
@pytest.mark.parametrize("how", ["gone", "half", "empty"])
def test_data_that_vanished_or_shrank_gets_one_line_and_leaves_the_run(name, how, data, tmp_path, command):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    command(data_dir=own, out_dir=tmp_path / "out", max_steps=2)
    before, path = snapshot(tmp_path / "out"), own / name
    whole = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(whole[:len(whole) // 2 if how == "half" else 0])
    for flags in (dict(out_dir=tmp_path / "out", resume=True, max_steps=4),
                  dict(data_dir=own, out_dir=tmp_path / "new"),
                  dict(data_dir=own, out_dir=tmp_path / "out", overwrite=True)):
        code, err = command(**flags)
        assert code == 1 and len(err) == 1 and str(own) in err[0], err
    assert snapshot(tmp_path / "out") == before and not (tmp_path / "new").exists()
    path.write_bytes(whole)
    assert command(out_dir=tmp_path / "out", resume=True, max_steps=4) == (0, [])


# ---- nothing is overwritten by accident -----------------------------------------------------------------------------

@pytest.mark.parametrize("kept", ["best", "last", "log.csv", "ckpt.pt", "loss.png"])
def test_what_is_left_of_a_run_is_not_overwritten(kept, tmp_path, command):
    if kept in ("best", "last"):
        tiny().save_pretrained(tmp_path / "out" / kept)
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / kept).write_bytes(b"precious")
    before = snapshot(tmp_path / "out")
    code, err = command(out_dir=tmp_path / "out")
    assert code == 1 and len(err) == 1 and "holds a run already" in err[0] and "--overwrite" in err[0]
    assert ("--resume" in err[0]) == (kept == "ckpt.pt") and snapshot(tmp_path / "out") == before
    assert command(out_dir=tmp_path / "out", overwrite=True) == (0, [])
    assert checkpoint(tmp_path / "out")["step"] == 6 and steps(tmp_path / "out") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("flags", [
    dict(init_from="nowhere"), dict(init_from="gpt2"), dict(data_dir="nowhere"), dict(micro_batch_tokens=1),
    dict(n_embd=33), dict(device="tpu9"), dict(forget_text="nowhere.txt"), dict(lora_rank=4)], ids=str)
def test_a_run_that_fails_before_its_first_step_leaves_the_old_one(flags, tmp_path, command):
    command(out_dir=tmp_path / "out", max_steps=2)
    before = snapshot(tmp_path / "out")
    code, err = command(out_dir=tmp_path / "out", overwrite=True, **flags)
    assert code == 1 and len(err) == 1, err
    assert snapshot(tmp_path / "out") == before


def test_an_overwritten_run_leaves_nothing_behind(tmp_path, command):
    (tmp_path / "text.txt").write_text("An ordinary text. " * 20)
    flags = dict(out_dir=tmp_path / "out", forget_text=tmp_path / "text.txt", overwrite=True)
    command(**flags, max_steps=9)
    (tmp_path / "out" / "ckpt.pt.123.tmp").write_bytes(b"half a checkpoint")
    (tmp_path / "out" / "best" / "model.safetensors.123.tmp").write_bytes(b"half a model")
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    command(**flags, max_steps=3)
    assert steps(tmp_path / "out") == [1, 2, 3] and not leftovers(tmp_path / "out")
    assert [row["step"] for row in watch.read_rows(tmp_path / "out" / "forget.csv")] == [0, 3]
    assert (tmp_path / "out" / "notes.txt").exists()


# ---- resume, from any step ------------------------------------------------------------------------------------------

KINDS = {"float32": dict(), "bfloat16": dict(dtype="bfloat16"), "low_memory": dict(dtype="bfloat16", low_memory=True),
         "float16": dict(dtype="float16"), "lora": dict(lora_rank=4, lora_dropout=0.2),
         "lora bfloat16": dict(lora_rank=4, lora_dropout=0.2, dtype="bfloat16")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_broken_off_at_every_step_equals_the_straight_one(kind, data, tmp_path):
    """Before, at and after evaluations (3, 6, 9) and saves (2, 4 ...), by Ctrl-C, which saves, and by a crash, which
    does not; with dropout and several micro-batches a step."""
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    flags = SMALL | dict(data_dir=str(data), init_from=str(tmp_path / "base"), micro_batch_tokens=120, max_steps=9,
                         lr_schedule="cosine", learning_rate=1e-3, log_interval=4, forget_text="none") | KINDS[kind]
    train.main(TrainConfig(**flags, out_dir=str(tmp_path / "straight")))
    real, reached = train.update, [0]

    def broken(optimizer, *args):
        norm = real(optimizer, *args)
        state = next(iter(optimizer.state.values()))
        if reached[0] and int(state["step"]) == reached[0]:  # warm-up's counts as none
            if reached[0] % 2 or how == "Ctrl-C":
                os.kill(os.getpid(), signal.SIGINT)
            else:
                raise MemoryError
            reached[0] = 0
        return norm

    for how in ("Ctrl-C", "crash"):
        out_dir, begun = tmp_path / how, {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "update", broken)
            for stop in range(1, 9):
                reached[0] = stop
                with pytest.raises((SystemExit, MemoryError)):
                    train.main(TrainConfig(**(begun or flags), out_dir=str(out_dir)))
                assert checkpoint(out_dir)["step"] == (stop if how == "Ctrl-C" or stop % 2 else stop - 1)
                begun = dict(resume=True)
        train.main(TrainConfig(resume=True, out_dir=str(out_dir)))
        equal(tmp_path / "straight", out_dir)


# ---- memory ---------------------------------------------------------------------------------------------------------

MEMORY = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import config, console, train
calls, real = 0, train.update
def counted(*args):
    global calls
    calls += 1
    if calls in (501, 2001):  # the first one is the warm-up's
        print("resident", int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"), flush=True)
    return real(*args)
train.update = counted
console.run(train.main, config.parse_config, train.TrainConfig)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_memory_stays_flat_over_two_thousand_micro_batches(data, tmp_path):
    """Of unequal lengths, with evaluations and saves between them."""
    flags = SMALL | dict(data_dir=data, max_steps=2000, eval_interval=250, save_interval=100, log_interval=1000)
    jobs = {dtype: spawn("-c", MEMORY, ROOT, *words(**flags | dict(dtype=dtype)), f"--out_dir={tmp_path / dtype}")
            for dtype in ("float32", "bfloat16")}
    for dtype, job in jobs.items():
        out, err = job.communicate(timeout=300)
        early, late = map(int, re.findall(r"^resident (\d+)$", out, re.M))
        print(f"\n{dtype}: {early / 1e6:.1f} MB after 500 micro-batches, {late / 1e6:.1f} MB after 2,000")
        assert err == "" and late - early < 0.05 * early + 8e6, dtype
