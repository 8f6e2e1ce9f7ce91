"""What a run survives: SIGKILL at any moment, Ctrl-C, a full disk, missing files; and that its memory is flat.

KILLS=200 pytest tests/test_kill.py -k killed -m slow -n 0 -s  # kills 200 times; by default eight
"""
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, colour_records, equal, prepared, rows, tiny

import train
from model import GPT
from nanosft import files, flags, shards
from nanosft.optimizer import AdamW
from train import TrainConfig

# train.py without its pictures of the loss, which would take most of the time, and with what a test puts in
RUN = """
import os, sys, time
sys.path.insert(0, {root!r})
import train
from nanosft import flags
train.pictures.plot_losses = lambda *_: None
{more}
flags.run(train.main, train.TrainConfig)
"""
# one place is slow, once there is a checkpoint
SLOW = """
def slow(*args, real={target}):
    if os.path.exists({saved!r}):
        print("slow", flush=True)
        time.sleep(60)
    return real(*args)
{target} = slow
"""
KILLS = int(os.environ.get("KILLS", 8))
SMALL = dict(n_layer=2, n_head=2, n_embd=32, dropout=0.1, device="cpu", dtype="float32", batch_size=4,
             lr_schedule="constant", warmup_steps=2, eval_interval=3, save_interval=2, log_interval=1)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Only on as many threads are two runs equal to the bit. Pictures of the loss would take most of the time."""
    monkeypatch.setattr(train.pictures, "plot_losses", lambda *_: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def words(**settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def wait_for(condition, job, seconds=60):
    """Waits until `condition` is true, or the job has ended."""
    end = time.monotonic() + seconds
    while job.poll() is None and not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.0005)


def step_of(path):
    return checkpoint(path)["values"]["state"]["step"]


def steps(path):
    return [int(row["step"]) for row in rows(path)]


def leftovers(path):
    return sorted(path.rglob("*.tmp"))


def snapshot(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_same_runs(one, other):
    """Their checkpoints, weights and logs are the same to the bit."""
    (a, tensors), (b, others) = ((run["values"]["state"], run["tensors"]) for run in map(checkpoint, (one, other)))
    assert {**a, "elapsed": 0} == {**b, "elapsed": 0} and steps(one) == list(range(1, a["step"] + 1))
    assert [{**row, "seconds": ""} for row in rows(one)] == [{**row, "seconds": ""} for row in rows(other)]
    for kind in ("masters", "means", "squares"):
        assert equal(tensors.pop(kind), others.pop(kind)), kind
    assert equal(tensors, others)
    for part in ("best", "last"):
        assert snapshot(one / part) == snapshot(other / part)


# ---- SIGKILL --------------------------------------------------------------------------------------------------------

def kill_one(job, out_dir, chance, before):
    """Kills a run at a random moment: while it starts, between its saves, or within one."""
    kind = chance.random()
    if kind < 0.1:
        time.sleep(chance.uniform(0, 3))
    else:
        wait_for(lambda: os.stat(out_dir / "ckpt.pt").st_mtime_ns != before, job)
        time.sleep(chance.uniform(0, 0.4))
        if kind > 0.4:
            file = "ckpt.pt" if kind > 0.6 else "*"
            wait_for(lambda: any(out_dir.rglob(f"{file}.*.tmp")), job)
            time.sleep(chance.choice([0, chance.uniform(0, 0.02)]))
    assert job.poll() is None, job.communicate()
    job.kill()
    job.wait()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_anywhere_again_and_again_equals_one_that_nobody_killed(seed, data, tmp_path, spawn):
    chance, met, newest, before = random.Random(seed), Counter(), 0, 0
    out_dir, straight, printed = tmp_path / "out", tmp_path / "straight", tmp_path / "printed.txt"
    settings = words(**SMALL | dict(data_dir=data, n_layer=4, n_embd=192, batch_size=2, eval_interval=7, seed=seed,
                                    save_interval=1 + seed))
    program = ["-c", RUN.format(root=str(ROOT), more="")]
    resume = [*program, "--resume", f"--out_dir={out_dir}"]
    for number in range(KILLS // 2):
        start = resume if number else [*program, *settings, "--max_steps=1000000", f"--out_dir={out_dir}"]
        with open(printed, "w") as output:
            job = spawn(*start, stdout=output)
        wait_for((out_dir / "ckpt.pt").exists, job)
        kill_one(job, out_dir, chance, before)
        before, found = os.stat(out_dir / "ckpt.pt").st_mtime_ns, leftovers(out_dir)
        # no more is lost than what came after the last save
        shown = [int(step.replace(",", "")) for step in re.findall(r"^step ([\d,]+)/", printed.read_text(), re.M)]
        assert step_of(out_dir) >= max(newest, max([*steps(out_dir), *shown], default=0) - 1 - seed)
        newest = step_of(out_dir)
        assert len(found) <= 1, "what a killed run was writing is removed when it goes on"
        met.update(re.sub(r"\.\d+\.tmp", "", path.name) for path in found)
        if (out_dir / "best" / "model.safetensors").exists():
            assert GPT.from_pretrained(out_dir / "best").config.n_head == 2 and (out_dir / "best/prompt.json").exists()
    last = [f"--max_steps={newest + 9}", "--save_interval=0"]
    for job in (spawn(*resume, *last), spawn(*program, *settings, *last, f"--out_dir={straight}")):
        _, err = job.communicate(timeout=600)
        assert (job.returncode, err) == (0, "")
    assert_same_runs(out_dir, straight)
    assert not leftovers(out_dir)
    print(f"\n{KILLS // 2} kills in {newest + 9} steps, {met.total()} within a save: {dict(met)}")
    assert met.total() and met["ckpt.pt"] >= KILLS // 10


# ---- signals, and readers that leave --------------------------------------------------------------------------------

@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
                         ids=["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_run_after_its_step_with_the_way_to_go_on(number, code, data, tmp_path, spawn):
    settings = SMALL | dict(data_dir=data, max_steps=10**6, eval_interval=0, save_interval=0, log_interval=10**5)
    job = spawn(ROOT / "train.py", *words(**settings), f"--out_dir={tmp_path / 'out'}")
    wait_for(lambda: len(rows(tmp_path / "out")) >= 10, job)
    job.send_signal(number)
    out, err = job.communicate(timeout=30)
    step = step_of(tmp_path / "out")
    assert (job.returncode, err) == (code, "")
    assert out.splitlines()[-1] == (f"stopped after step {step:,} and saved; go on with: python train.py --resume "
                                    f"--out_dir={tmp_path / 'out'}")
    assert steps(tmp_path / "out") == list(range(1, step + 1))


def test_a_closed_terminal_ends_the_run_saved_though_its_hangup_comes_twice(data, tmp_path, spawn):
    out_dir, (terminal, inside) = tmp_path / "out", os.openpty()
    settings = SMALL | dict(data_dir=data, out_dir=out_dir, max_steps=10**6, eval_interval=0, save_interval=0)
    job = spawn(ROOT / "train.py", *words(**settings), stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    wait_for(lambda: len(rows(out_dir)) >= 5, job)
    os.close(terminal)  # whoever writes there now gets EIO
    for _ in range(2):
        job.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    assert job.wait(timeout=30) == 129
    assert steps(out_dir) == list(range(1, step_of(out_dir) + 1)) and (out_dir / "last").is_dir()


def test_a_reader_that_leaves_ends_nothing(data, tmp_path):
    settings = SMALL | dict(data_dir=data, out_dir=tmp_path / "out", max_steps=30, eval_interval=0, save_interval=0)
    command = f"{sys.executable} train.py {' '.join(words(**settings))} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and step_of(tmp_path / "out") == 30
    assert done.stderr == ""


def test_a_preparation_that_is_ended_leaves_nothing(tmp_path, spawn):
    (tmp_path / "many.jsonl").write_text("".join(f'{{"prompt": "q{i}", "completion": "a"}}\n' for i in range(300_000)))
    job = spawn(ROOT / "prepare_data.py", f"--input={tmp_path / 'many.jsonl'}", "--encoding=bytes",
                f"--out_dir={tmp_path / 'data'}")
    wait_for(lambda: any(tmp_path.glob(".data.*.tmp")), job)
    job.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=30)
    assert (job.returncode, err) == (143, "") and [path.name for path in tmp_path.iterdir()] == ["many.jsonl"]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with train.interrupts():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGHUP, before)


def slow_run(spawn, data, out_dir, target, **changes):
    """A run that has reached the slow place, with a checkpoint in its out_dir."""
    code = RUN.format(root=str(ROOT), more=SLOW.format(saved=str(out_dir / "ckpt.pt"), target=target))
    settings = SMALL | dict(data_dir=data, out_dir=out_dir, max_steps=5, eval_interval=0) | changes
    job = spawn("-c", code, *words(**settings))
    assert any(line == "slow\n" for line in job.stdout), job.communicate()
    return job


@pytest.mark.parametrize("target", ["train.AdamW.step", "os.replace"])
def test_a_second_ctrl_c_leaves_at_once_and_the_last_checkpoint_is_whole(target, data, tmp_path, spawn):
    job = slow_run(spawn, data, tmp_path / "out", target)
    job.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert job.poll() is None  # the first one waits for the step's end
    started = time.monotonic()
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=30)
    assert time.monotonic() - started < 2 and (job.returncode, err) == (-signal.SIGINT, "")
    assert step_of(tmp_path / "out") == 2 and len(leftovers(tmp_path / "out")) == (target == "os.replace")
    train.main(TrainConfig(resume=True, out_dir=str(tmp_path / "out")))
    assert step_of(tmp_path / "out") == 5 and not leftovers(tmp_path / "out")


# ---- disks and files ------------------------------------------------------------------------------------------------

@pytest.fixture
def command(data, monkeypatch, capsys):
    """command(**flags) -> the one line on stderr with which train.py's command line fails, in this process, or ""."""
    def run(**settings):
        given = settings if "resume" in settings else SMALL | dict(data_dir=data, max_steps=6) | settings
        monkeypatch.setattr(sys, "argv", ["train.py", *words(**given)])
        monkeypatch.setattr(flags, "protect_output", lambda: None)  # pytest's own stays
        capsys.readouterr()
        code = 0
        try:
            flags.run(train.main, TrainConfig)
        except SystemExit as left:
            code = left.code
        lines = capsys.readouterr().err.splitlines()
        assert (code, len(lines)) in ((0, 0), (1, 1)), lines
        return "".join(lines)
    return run


# what does not fit any more: (flags, the file that the message names)
FULL = {"checkpoint": (dict(eval_interval=0), r"ckpt\.pt"), "best": (dict(), r"best/model\.safetensors"),
        "log": (dict(eval_interval=0, save_interval=100), r"log\.csv")}


def first_checkpoint(monkeypatch):
    """A list that will hold the bytes of the first checkpoint that is written."""
    saved, real = [], train.save_checkpoint

    def save(path, *content):
        real(path, *content)
        saved[:] = saved or [path.read_bytes()]
    monkeypatch.setattr(train, "save_checkpoint", save)
    return saved


def no_space_for(monkeypatch, name, when):
    """What is written to files of this name goes where there is no space left, while `when` is true."""
    def full(path, mode, **options):
        return open("/dev/full" if when and re.search(name, str(path)) and mode[0] != "r" else path, mode, **options)
    monkeypatch.setattr(files, "open", full, raising=False)


@pytest.mark.parametrize("what", FULL)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint(what, tmp_path, command, monkeypatch):
    settings, name = FULL[what]
    out_dir = tmp_path / "out"
    with monkeypatch.context() as patch:
        saved = first_checkpoint(patch)
        no_space_for(patch, name, saved)
        error = command(out_dir=out_dir, **{"max_steps": 300, **settings})
    assert re.search(name, error) and "No space left" in error
    assert (out_dir / "ckpt.pt").read_bytes() == saved[0] and not leftovers(out_dir)
    last = step_of(out_dir) + 5
    assert command(resume=True, out_dir=out_dir, max_steps=last) == ""
    assert steps(out_dir) == list(range(1, last + 1)) and step_of(out_dir) == last
    assert GPT.from_pretrained(out_dir / "best").config.n_embd == 32
    # a log that cannot be written anew stays as it was
    before = snapshot(out_dir)
    with monkeypatch.context() as patch:
        no_space_for(patch, "log.csv", True)
        assert "log.csv" in command(out_dir=out_dir, resume=True, max_steps=400)
    assert snapshot(out_dir) == before


@pytest.mark.parametrize("settings", [dict(), dict(lora_rank=4)], ids=["full", "lora"])
def test_where_there_are_weights_all_that_they_need_is_there(settings, tmp_path, command, monkeypatch):
    """What makes a directory a model is renamed into it last: a run killed before leaves none, not a wrong one."""
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    done, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(str(new)) or replace(old, new))
    command(out_dir=tmp_path / "out", init_from=tmp_path / "base", **settings)
    best = [os.path.basename(path) for path in done if "/best/" in path]
    assert len(set(best)) == 3 and set(best[2::3]) == {"adapter_config.json" if settings else "model.safetensors"}


@pytest.fixture
def locked(tmp_path, command):
    """A finished run in a directory where nothing can be written: as root, that takes a file system of its own."""
    path = tmp_path / "locked"
    path.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run("mount -t tmpfs tmpfs .", shell=True, cwd=path, capture_output=True).returncode == 0
        if not mounted:
            pytest.skip("root may write anywhere, and cannot mount here")
    command(out_dir=path / "out")
    root = os.geteuid() == 0
    subprocess.run(["mount", "-o", "remount,ro", path] if root else ["chmod", "-R", "a-w", path], check=True)
    yield path
    subprocess.run(["umount", "-l", path] if root else ["chmod", "-R", "u+w", path], check=True)


def test_a_directory_that_cannot_be_written_gets_one_line(locked, command):
    before = snapshot(locked)
    for settings in (dict(out_dir=locked / "new"), dict(out_dir=locked / "out", resume=True, max_steps=9),
                     dict(out_dir=locked / "out", overwrite=True)):
        assert re.search(f"(Read-only|Permission denied).*{locked}", command(**settings))
    assert snapshot(locked) == before


def test_a_directory_that_cannot_be_made_gets_one_line(tmp_path, command):
    (tmp_path / "file").write_text("")
    for out_dir in (tmp_path / "file", tmp_path / "file" / "out"):
        assert f"--out_dir={out_dir} is or lies below a file, not a directory; name another" in command(out_dir=out_dir)
    assert (tmp_path / "file").read_text() == ""


# ---- the data of a run ----------------------------------------------------------------------------------------------

def tamper(own, records, with_checksums):
    """One id of the training examples is another; perhaps by somebody who knows the checksums."""
    tokens, meta = np.load(own / "train_00000.npy"), shards.load_meta(own)
    tokens["id"][10] ^= 1
    np.save(own / "train_00000.npy", tokens)
    if with_checksums:
        meta["train"]["shards"]["train_00000.npy"] = shards.crc32_of(own / "train_00000.npy")
        shards.write_meta(own, meta)


@pytest.mark.parametrize("change, message", [
    (lambda own, records: tamper(own, records, False), "train_00000.npy is damaged"),
    (lambda own, records: tamper(own, records, True), "is not the data that this run began with"),
    (lambda own, records: prepared([*records[:-1], {**records[-1], "output": "none"}], own),
     "is not the data that this run began with")], ids=["tampered", "tampered with its checksums", "prepared anew"])
def test_a_run_does_not_go_on_with_other_data(change, message, tmp_path, command):
    records = colour_records(40)
    own = prepared(records, tmp_path / "own")
    command(data_dir=own, out_dir=tmp_path / "out", max_steps=2)
    before = snapshot(tmp_path / "out")
    change(own, records)
    assert re.search(f"{own}.*{message}", command(out_dir=tmp_path / "out", resume=True, max_steps=4))
    assert snapshot(tmp_path / "out") == before
    prepared(records, own)  # as before: the same bytes
    assert command(out_dir=tmp_path / "out", resume=True, max_steps=4) == ""


# ---- nothing is overwritten by accident -----------------------------------------------------------------------------

@pytest.mark.parametrize("kept", ["best", "last", "log.csv", "ckpt.pt", "loss.png"])
def test_what_is_left_of_a_run_is_not_overwritten(kept, tmp_path, command):
    if kept in ("best", "last"):
        tiny().save_pretrained(tmp_path / "out" / kept)
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / kept).write_bytes(b"precious")
    before = snapshot(tmp_path / "out")
    error = command(out_dir=tmp_path / "out")
    assert "holds a run: " in error and "--overwrite" in error and ("--resume" in error) == (kept == "ckpt.pt")
    assert snapshot(tmp_path / "out") == before
    assert command(out_dir=tmp_path / "out", overwrite=True) == ""
    assert step_of(tmp_path / "out") == 6 and steps(tmp_path / "out") == [1, 2, 3, 4, 5, 6]


def test_an_overwritten_run_leaves_nothing_behind(tmp_path, command):
    """But what is the user's own, or another run's."""
    out_dir = tmp_path / "out"
    command(out_dir=out_dir, max_steps=9)
    (out_dir / "other").mkdir()
    for name in ("ckpt.pt.123.tmp", "best/model.safetensors.123.tmp", "other/ckpt.pt.9.tmp", "notes.txt"):
        (out_dir / name).write_bytes(b"half")
    command(out_dir=out_dir, overwrite=True, max_steps=3)
    assert steps(out_dir) == [1, 2, 3] and (out_dir / "notes.txt").exists()
    assert leftovers(out_dir) == [out_dir / "other" / "ckpt.pt.9.tmp"]


def test_of_two_runs_that_start_in_one_directory_the_later_is_refused(data, tmp_path, command, spawn):
    """Though the earlier has not even begun to clear away what an older run has left there."""
    out_dir = tmp_path / "out"
    command(out_dir=out_dir)
    job, before = slow_run(spawn, data, out_dir, "train.set_up", overwrite=True), snapshot(out_dir)
    for settings in (dict(), dict(overwrite=True), dict(resume=True)):
        assert "another run writes there; name another, or wait for it" in command(out_dir=out_dir, **settings)
    assert snapshot(out_dir) == before
    job.kill()  # nothing is left locked
    job.wait()
    assert command(out_dir=out_dir, resume=True, max_steps=8) == ""


# ---- resume, from any step ------------------------------------------------------------------------------------------

KINDS = {"float32": dict(), "bfloat16": dict(dtype="bfloat16"), "low_memory": dict(dtype="bfloat16", low_memory=True),
         "float16": dict(dtype="float16"), "lora": dict(lora_rank=4, lora_dropout=0.2),
         "lora bfloat16": dict(lora_rank=4, lora_dropout=0.2, dtype="bfloat16")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_broken_off_at_every_step_equals_the_straight_one(kind, data, tmp_path, monkeypatch, spawn):
    """Before, at and after evaluations (3, 6, 9) and saves (2, 4 ...), by Ctrl-C, which saves, and by a crash, which
    does not; with dropout and several micro-batches a step. (`spawn` is asked for so that SIGINT is heard here.)"""
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    settings = SMALL | dict(data_dir=str(data), init_from=str(tmp_path / "base"), micro_batch_tokens=120, max_steps=9,
                            lr_schedule="cosine", learning_rate=1e-3, log_interval=4) | KINDS[kind]
    train.main(TrainConfig(**settings, out_dir=str(tmp_path / "straight")))
    real = AdamW.step

    def broken(optimizer, *args):
        norm = real(optimizer, *args)
        done.append(norm)
        if len(done) == length and (how == "Ctrl-C" or stop % 2):
            os.kill(os.getpid(), signal.SIGINT)
        elif len(done) == length:
            raise MemoryError
        return norm

    monkeypatch.setattr(AdamW, "step", broken)
    for how in ("Ctrl-C", "crash"):
        out_dir, given, reached = tmp_path / how, settings, 0
        for stop in range(1, 9):
            done, length = [], stop - reached
            with pytest.raises((SystemExit, MemoryError)):
                train.main(TrainConfig(**given, out_dir=str(out_dir)))
            reached = stop if how == "Ctrl-C" or stop % 2 else stop - 1
            assert step_of(out_dir) == reached
            given = dict(resume=True)
        length = 0
        train.main(TrainConfig(resume=True, out_dir=str(out_dir)))
        assert_same_runs(tmp_path / "straight", out_dir)


# ---- memory ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_memory_stays_flat_over_two_thousand_micro_batches(dtype, tmp_path, command, monkeypatch):
    """Of unequal lengths, with evaluations and saves between them."""
    resident, real = [], AdamW.step

    def measured(*args):
        with open("/proc/self/statm") as file:
            resident.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return real(*args)
    monkeypatch.setattr(AdamW, "step", measured)
    command(out_dir=tmp_path / "out", max_steps=2000, eval_interval=250, save_interval=100, dtype=dtype)
    early, late = resident[500], resident[-1]
    print(f"\n{dtype}: {early / 1e6:.1f} MB after 500 micro-batches, {late / 1e6:.1f} MB after 2,000")
    assert len(resident) == 2000 and late - early < 0.05 * early + 8e6
