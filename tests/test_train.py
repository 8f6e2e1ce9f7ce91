"""train.py: its numbers against transformers and torch, its steps, its clock, its checkpoints and its messages."""
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, colour_records, randomise, tiny, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import prepare_data
import sample
import train
from model import GPT, IGNORE_INDEX
from nanosft import report
from nanosft.console import UserError
from nanosft.flags import ELSEWHERE, parse_config
from nanosft.optimizer import AdamW
from nanosft.shards import Shards, examples_of_step, load_meta, micro_batches, write_meta
from nanosft.templates import get_encoding
from train import TrainConfig, learning_rate_at

BASE = dict(n_layer=2, n_head=2, n_embd=32, device="cpu", dtype="float32", compile="off", max_steps=6, eval_interval=3,
            batch_size=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    prepare_data.main(prepare_data.PrepareConfig(
        input=str(write_lines(path / "records.jsonl", colour_records(80))), out_dir=str(path / "prepared"),
        encoding="bytes", template="chat", block_size=128, show=0))
    return path / "prepared"


@pytest.fixture
def fit(data, tmp_path):
    """fit(**flags) -> the RunState that train.main returns, in a fresh out_dir or the one named."""
    def run(out="out", **flags):
        common = BASE if "resume" not in flags else {}
        return train.main(TrainConfig(**{**common, "data_dir": str(data), "out_dir": str(tmp_path / out), **flags}))
    return run


def checkpoint(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def masters(out_dir):
    return checkpoint(out_dir)["tensors"]["masters"]


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def same_weights(out_dir, other):
    return equal(masters(out_dir), masters(other))


def weights(directory):
    return dict(GPT.from_pretrained(directory).named_parameters())


def rows(out_dir, *left_out):
    """The rows of log.csv, without the columns named."""
    with open(out_dir / "log.csv", newline="") as file:
        return [{name: value for name, value in row.items() if name not in left_out} for row in csv.DictReader(file)]


def column(out_dir, name):
    return [float(row[name]) for row in rows(out_dir) if row[name]]


def numbers(state):
    """What two equal runs must agree upon."""
    return {name: value for name, value in vars(state).items() if name not in ("elapsed", "optimizer")}


# ---- the step -------------------------------------------------------------------------------------------------------

def gradients_of(dtype, shards, groups):
    """(loss, gradients) of the step that consists of these groups of examples."""
    model = tiny(block_size=128)
    optimizer = AdamW(model, dtype)
    batches = [shards.batch(group) for group in groups]
    supervised = sum(int((targets != IGNORE_INDEX).sum()) for _, targets, _ in batches)
    loss = train.accumulate(model, optimizer, batches, supervised)
    return loss.item(), [p.grad for p in model.parameters()]


def test_accumulation_does_not_matter(data):
    """The same 8 examples of unequal answer lengths as 1 x 8, 4 x 2, 8 x 1 and by length."""
    shards = Shards(data, load_meta(data), "train")
    indices = examples_of_step(0, len(shards), 8, 0)
    assert len({shards.supervised([i]) for i in indices}) >= 3
    (loss, grads), *others = (gradients_of(torch.float64, shards, groups) for groups in (
        [indices], indices.reshape(4, 2), indices.reshape(8, 1), micro_batches(indices, shards.lengths, 128)))
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        for one, other in zip(grads, other_grads, strict=True):
            assert (one - other).norm() <= 1e-11 * one.norm()


def test_micro_batches_of_16_bits_are_summed_in_float32(data):
    """Eight gradients of one example each add up as they do in float32; one batch alone needs no float32."""
    shards = Shards(data, load_meta(data), "train")
    indices = examples_of_step(0, len(shards), 8, 0)
    _, grads = gradients_of(torch.bfloat16, shards, indices.reshape(8, 1))
    model = tiny(block_size=128).bfloat16()
    expected = [torch.zeros(p.shape) for p in model.parameters()]
    for batch in (shards.batch([i]) for i in indices):
        model.zero_grad()
        (model(*batch) / shards.supervised(indices)).backward()
        for total, p in zip(expected, model.parameters(), strict=True):
            total += p.grad.float()
    for total, grad in zip(expected, grads, strict=True):
        assert grad.dtype == torch.float32 and (grad - total).norm() <= 1e-6 * total.norm()
    assert {grad.dtype for grad in gradients_of(torch.bfloat16, shards, [indices])[1]} == {torch.bfloat16}


def test_the_curve_does_not_depend_on_the_size_of_the_micro_batches(fit, tmp_path):
    curves = []
    for size in (90, 200, 2000):
        fit(str(size), micro_batch_tokens=size, max_steps=12, batch_size=8)
        curves.append([column(tmp_path / str(size), name) for name in ("train_loss", "val_loss", "grad_norm")])
        assert column(tmp_path / str(size), "tokens") == column(tmp_path / "90", "tokens")
    for curve in curves[1:]:
        for ours, expected in zip(curve, curves[0], strict=True):
            assert ours == pytest.approx(expected, rel=2e-5)


def plain_loop(model, shards, steps, batch_size, seed, schedule, weight_decay, clip):
    """The same training in the plainest way: transformers' model, padding, one mean over the step, torch's AdamW."""
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        examples = [shards[i] for i in examples_of_step(step, len(shards), batch_size, seed)]
        longest = max(map(len, examples))
        ids, labels, mask = (torch.full((len(examples), longest), value) for value in (0, -100, 0))
        for row, tokens in enumerate(examples):
            own = torch.from_numpy(tokens["id"].astype(np.int64))
            ids[row, :len(own)], mask[row, :len(own)] = own, 1
            labels[row, :len(own)] = torch.where(torch.from_numpy(tokens["flags"] & 1).bool(), own, -100)
        logits = model(ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*decay, *others], clip)
        assert norm > clip  # or the clipping would not be tested
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_twenty_steps_equal_a_plain_transformers_loop(dtype, data, fit, tmp_path):
    config = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=257, n_positions=128, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager", bos_token_id=256,
                                     eos_token_id=256)
    theirs = randomise(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path / "start")
    state = fit(init_from=str(tmp_path / "start"), dtype=dtype, max_steps=20, learning_rate=1e-3, weight_decay=0.1,
                grad_clip=0.5, batch_size=8, micro_batch_tokens=300, warmup_steps=3, lr_schedule="linear", seed=5,
                epochs=10)
    theirs = theirs.train().to(getattr(torch, dtype))
    losses = plain_loop(theirs, Shards(data, load_meta(data), "train"), 20, 8, 5,
                        lambda step: learning_rate_at(step, 20, 1e-3, 0, "linear", 3), 0.1, 0.5)
    assert state.step == 20
    assert column(tmp_path / "out", "train_loss") == pytest.approx(losses, rel=2e-7 if dtype == "float64" else 1e-5)
    if dtype == "float64":
        expected = theirs.transformer.state_dict()
        for name, weight in masters(tmp_path / "out").items():
            transposed = re.search(r"(c_attn|c_proj|c_fc)\.weight$", name)
            assert (weight - (expected[name].t() if transposed else expected[name])).abs().max() < 1e-9, name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(90, 400))
def test_packing_ends_and_places_every_example_once_within_the_budget(lengths, max_tokens):
    groups = micro_batches(range(len(lengths)), lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= max_tokens for group in groups)
    assert max(lengths) == lengths[groups[0][0]]  # the longest goes first


def test_every_epoch_holds_every_example_once_and_the_last_step_what_is_left():
    steps = [examples_of_step(step, 7, 4, seed=3).tolist() for step in range(4)]
    assert [len(step) for step in steps] == [4, 3, 4, 3]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(7))
    assert steps[0] + steps[1] != steps[2] + steps[3]


def test_a_partial_last_step_is_normalised_by_its_own_tokens(fit, tmp_path, data):
    fit(max_examples=7, max_steps=0, epochs=1, batch_size=4, eval_interval=0)
    shards, out_dir = Shards(data, load_meta(data), "train", 7), tmp_path / "out"
    assert column(out_dir, "step") == [1, 2] and column(out_dir, "epoch")[1] == 1
    assert sum(column(out_dir, "tokens")) == shards.lengths.sum()
    assert sum(column(out_dir, "supervised_tokens")) == shards.supervised(range(7))
    assert column(out_dir, "train_loss")[1] == pytest.approx(math.log(257), rel=0.05)  # a mean, whatever the count


def test_evaluation_does_not_depend_on_the_batch_size(data):
    shards, model = Shards(data, load_meta(data), "train"), tiny(block_size=128)
    alone = [train.evaluate(model, shards, max_tokens) for max_tokens in (90, 270, 5000)]
    total = 0
    with torch.no_grad():
        for idx, targets, _ in (shards.batch([i]) for i in range(len(shards))):
            total += torch.nn.functional.cross_entropy(model(idx[None])[0], targets, reduction="sum").item()
    assert alone == pytest.approx([total / shards.supervised(range(len(shards)))] * 3, rel=1e-6) and model.training


def test_evaluation_makes_no_float64_on_the_device(fit, monkeypatch):
    """A Mac has none there. Here the device is the CPU, so a loss on "the CPU" is a copy, which alone may be widened."""
    class Loss(torch.Tensor):
        on_cpu = False

        def cpu(self):
            copy = self.as_subclass(torch.Tensor).as_subclass(Loss)
            copy.on_cpu = True
            return copy

        def double(self):
            assert self.on_cpu, "float64 on the device"
            return self.as_subclass(torch.Tensor).double()
    real = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, reduction="sum", **options: (
        real(self, *args, reduction, **options) if reduction == "sum" else real(self, *args, reduction).as_subclass(Loss)))
    assert math.isfinite(fit(max_steps=1).val_loss)


def test_learning_rates_are_the_textbooks():
    def rates(schedule):
        return [learning_rate_at(step, 20, 1.0, 0.1, schedule, 4) for step in range(21)]
    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates("cosine")[12] == pytest.approx(0.55) and rates("cosine")[20] == pytest.approx(0.1)
    assert rates("cosine")[8] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates("linear")[12] == pytest.approx(0.55) and rates("linear")[20] == pytest.approx(0.1)
    assert rates("constant")[4:] == [1.0] * 17
    assert learning_rate_at(0, 1, 1.0, 0, "cosine", 0) == 1.0


# ---- precision and compile ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_half_precision_follows_float32(dtype, low_memory, fit, tmp_path):
    """Losses, gradient norms and AdamW's moments are those of float32 but for rounding: no loss scale is left in them."""
    exact = fit("exact", max_steps=20)
    half = fit("half", max_steps=20, dtype=dtype, low_memory=low_memory)
    assert half.train_loss == pytest.approx(exact.train_loss, rel=0.02) and half.train_loss < 5.2
    assert column(tmp_path / "half", "grad_norm") == pytest.approx(column(tmp_path / "exact", "grad_norm"), rel=0.1)
    expected, tensors = (checkpoint(tmp_path / name)["tensors"] for name in ("exact", "half"))
    for kind, tolerance in (("masters", 0.02), ("means", 0.2), ("squares", 0.2)):
        moment_dtype = torch.bfloat16 if low_memory and kind != "masters" else torch.float32
        assert {tensor.dtype for tensor in tensors[kind].values()} == {moment_dtype}
        ours, theirs = tensors[kind]["wte.weight"].float(), expected[kind]["wte.weight"]
        assert (ours - theirs).norm() < tolerance * theirs.norm(), kind


def test_what_is_saved_is_the_masters_in_float32(fit, tmp_path):
    fit(dtype="bfloat16", eval_interval=0)
    expected = masters(tmp_path / "out")
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in expected.values())
    for name in ("best", "last"):
        stored = load_file(tmp_path / "out" / name / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        assert equal(weights(tmp_path / "out" / name), expected)


def test_an_overflow_lowers_the_scale_leaves_the_weights_and_is_no_step_of_adam(fit, tmp_path, monkeypatch):
    fit(max_steps=2, dtype="float16", lr_schedule="constant", eval_interval=0)
    before, real = checkpoint(tmp_path / "out")["tensors"], train.accumulate

    def overflowing(model, optimizer, batches, supervised):
        loss = real(model, optimizer, batches, supervised)
        next(model.parameters()).grad[0, 0] = math.inf
        return loss
    monkeypatch.setattr(train, "accumulate", overflowing)
    assert fit(max_steps=3, resume=True).step == 3  # the step counts for the schedule, not for AdamW
    after, log = checkpoint(tmp_path / "out")["tensors"], rows(tmp_path / "out")
    assert log[-1]["grad_norm"] in ("inf", "nan") and [row["step"] for row in log] == ["1", "2", "3"]
    for kind in ("masters", "means", "squares"):
        assert equal(before[kind], after[kind])
    assert (before["steps"], after["steps"]) == (2, 2) and (before["good_steps"], after["good_steps"]) == (2, 0)
    assert after["loss_scale"] == before["loss_scale"] / 2 == 2**15
    assert equal(weights(tmp_path / "out" / "last"), before["masters"])


def test_a_loss_that_is_not_finite_skips_the_step_and_ten_in_a_row_stop(fit, tmp_path, monkeypatch):
    fit(max_steps=2, eval_interval=1)
    before, real = masters(tmp_path / "out"), train.accumulate
    monkeypatch.setattr(train, "accumulate", lambda *args: real(*args) * math.nan)
    with pytest.raises(UserError, match="ten steps in a row.*--learning_rate"):
        fit(max_steps=50, resume=True, eval_interval=0)
    assert len(rows(tmp_path / "out")) == 12 and equal(masters(tmp_path / "out"), before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_compiling_the_blocks_changes_nothing(dtype, tolerance, fit, tmp_path, capsys):
    for name, mode in (("eager", "off"), ("compiled", "on")):
        fit(name, dtype=dtype, eval_interval=2, learning_rate=2e-2, lr_schedule="constant", compile=mode)
    eager, compiled = (column(tmp_path / name, "train_loss") + column(tmp_path / name, "val_loss")
                       for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=tolerance) and len(set(eager)) > 6
    assert "does not work" not in capsys.readouterr().out


def test_only_training_runs_compiled(fit, tmp_path, monkeypatch):
    """Evaluation and generation, whose shapes change, run eager."""
    calls, real = [], torch.nn.Module.compile

    def backend(graph, inputs):
        return lambda *args: calls.append(torch.is_grad_enabled()) or graph(*args)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    fit("compiled", compile="on", eval_interval=1)
    assert len(calls) >= 2 * (2 + 6) and all(calls)  # layers x (warm-up + steps)
    fit("eager", eval_interval=1)
    assert column(tmp_path / "compiled", "val_loss") == pytest.approx(column(tmp_path / "eager", "val_loss"), rel=1e-5)


def test_where_compiling_fails_the_run_goes_on_in_eager(fit, monkeypatch, capsys):
    eager = fit("eager")

    def broken(self, *args, **options):
        def call(*_, **__):
            raise RuntimeError("no compiler on this platform")
        self._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    assert fit("broken", compile="on").train_loss == eager.train_loss
    assert "torch.compile does not work here (RuntimeError); going on without it" in capsys.readouterr().out


def test_what_does_not_fit_into_memory_is_halved_before_the_first_step(fit, tmp_path, monkeypatch, capsys):
    """Nothing of the attempt is left: the run equals one with that budget from the beginning."""
    straight, real, calls = fit("straight", batch_size=8, micro_batch_tokens=400), train.accumulate, []

    def hungry(model, optimizer, batches, supervised):
        clean = all(p.grad is None for p in model.parameters()) and not any(map(torch.any, optimizer.means.values()))
        calls.append((sum(len(idx) for idx, _, _ in batches), clean))
        loss = real(model, optimizer, batches, supervised)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss
    monkeypatch.setattr(train, "accumulate", hungry)
    failing = [1]
    assert numbers(fit(batch_size=8, micro_batch_tokens=800)) == numbers(straight)
    assert "out of memory: going on with --micro_batch_tokens=400" in capsys.readouterr().out
    assert same_weights(tmp_path / "straight", tmp_path / "out")
    assert calls[0][0] > calls[1][0] and [clean for _, clean in calls[:3]] == [True] * 3
    failing = range(100)
    with pytest.raises(UserError, match="one example of .* does not fit .* try --gradient_checkpointing"):
        fit("never")


# ---- the clock ------------------------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """clock(step, evaluation): from now on train.py's clock stands still but for these seconds, steps' give or take a
    quarter. Returns what has its time as `now`."""
    def start(step, evaluation=0.0, noise=0.25):
        ours, uneven = SimpleNamespace(now=1000.0), random.Random(3)
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: ours.now))
        for name, seconds, spread in (("accumulate", step, noise), ("evaluate", evaluation, 0.0)):
            def slowed(*args, real=getattr(train, name), seconds=seconds, spread=spread):
                ours.now += seconds * uneven.uniform(1 - spread, 1 + spread)
                return real(*args)
            monkeypatch.setattr(train, name, slowed)
        return ours
    return start


def ends_with_its_schedule(out_dir, peak):
    """The last learning rate is that of a run planned for as many steps, and the warm-up was completed."""
    rates = column(out_dir, "learning_rate")
    planned = learning_rate_at(len(rates) - 1, len(rates), peak, 0, "cosine", round(0.05 * len(rates)))
    assert rates[-1] <= max(4 * planned, 0.005 * peak) and rates[-1] < 0.05 * peak
    assert max(rates) > 0.97 * peak


@pytest.mark.parametrize("evaluation", [0.1, 10, 20])
def test_time_ends_a_run_with_the_learning_rate_at_its_end(evaluation, fit, tmp_path, clock):
    ours = clock(1.5, evaluation)
    state = fit(max_steps=0, epochs=10_000, max_minutes=5, eval_interval=-1, learning_rate=1e-3)
    assert 0.95 * 300 <= ours.now - 1000 <= 1.05 * 300
    assert state.step == len(rows(tmp_path / "out")) < 210
    ends_with_its_schedule(tmp_path / "out", 1e-3)
    evaluations = column(tmp_path / "out", "val_loss")
    assert rows(tmp_path / "out")[-1]["val_loss"] and len(evaluations) >= 2
    assert (len(evaluations) - 2) * evaluation <= 0.1 * 300  # but for the first, which tells what it costs, and the last


def test_a_short_limit_of_true_time_is_kept(fit, tmp_path, monkeypatch):
    for name, seconds in (("accumulate", 0.05), ("evaluate", 0.4)):
        monkeypatch.setattr(train, name, lambda *args, real=getattr(train, name), seconds=seconds: (
            time.sleep(seconds), real(*args))[1])
    started = time.perf_counter()
    fit(max_steps=0, epochs=10_000, max_minutes=4 / 60, eval_interval=-1, learning_rate=1e-3)
    assert time.perf_counter() - started < 4 + 3
    ends_with_its_schedule(tmp_path / "out", 1e-3)


def test_a_limit_of_time_counts_earlier_parts_and_never_lengthens_a_run(fit, clock):
    ours = clock(1.0, noise=0)
    assert fit(max_minutes=60).step == 6 and ours.now - 1000 < 20
    assert fit("short", max_steps=0, epochs=100, max_minutes=0.5, eval_interval=0).step in range(20, 31)
    ours.now += 1000
    assert fit("short", resume=True).step in range(20, 34)  # it had no time left
    assert fit("short", resume=True, max_minutes=1).step in range(45, 62)


@pytest.mark.parametrize("eval_interval, expected", [(0, [20, 40, 50]), (3, [6, 12, 18, 24, 30, 36, 42, 48, 50])])
def test_a_run_is_saved_with_evaluations_after_two_minutes_and_every_ten(eval_interval, expected, fit, clock,
                                                                         monkeypatch):
    saved, real = [], train.save_state
    monkeypatch.setattr(train, "save_state", lambda run: (saved.append(run.state.step), real(run)))
    clock(30.0, noise=0)
    fit(max_steps=50, eval_interval=eval_interval)
    assert saved == expected


def test_the_progress_line_tells_all_tokens_a_second_and_the_time_left(fit, tmp_path, clock, capsys):
    clock(2.0, noise=0)
    fit(log_interval=1, eval_interval=0)
    lines = re.findall(r"^step (\d)/6  (\d:\d\d) left  loss .*  ([\d,]+) tokens/s$", capsys.readouterr().out, re.M)
    speeds = [f"{tokens / 2:,.0f}" for tokens in column(tmp_path / "out", "tokens")]
    assert lines == [(str(step), f"0:{12 - 2 * step:02}", speeds[step - 1]) for step in range(1, 7)]


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@contextmanager
def stop_after(steps):
    """SIGINT while step `steps` runs."""
    real = train.examples_of_step

    def counted(step, *rest):
        if step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, *rest)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored: in the background, by nohup
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "examples_of_step", counted)
            yield
    finally:
        signal.signal(signal.SIGINT, before)


SMALL_BATCHES = {"micro_batch_tokens": 100, "batch_size": 8}


@pytest.mark.parametrize("stop, flags", [
    *((stop, {}) for stop in (1, 3, 4, 5)), (4, {"dtype": "bfloat16"}), (4, {"dtype": "float16"}),
    (5, {"dtype": "bfloat16", "low_memory": True}), (3, {"low_memory": True}), (4, {"dtype": "bfloat16", **SMALL_BATCHES}),
    (4, {"lora_rank": 4, "lora_dropout": 0.1}), (3, {"lora_rank": 4, "dtype": "bfloat16", "low_memory": True})],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value))
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(stop, flags, fit, tmp_path):
    if "lora_rank" in flags:
        tiny(block_size=128).save_pretrained(tmp_path / "base")
        flags = {**flags, "init_from": str(tmp_path / "base")}
    flags = {**dict(dropout=0.1, epochs=3, max_steps=0, max_examples=9, save_interval=1), **flags}
    straight = fit("straight", **flags)
    with stop_after(stop), pytest.raises(SystemExit) as left:
        fit("parts", **flags)
    assert left.value.code == 130 and checkpoint(tmp_path / "parts")["values"]["state"]["step"] == stop
    assert numbers(fit("parts", resume=True)) == numbers(straight)
    one, other = checkpoint(tmp_path / "straight")["tensors"], checkpoint(tmp_path / "parts")["tensors"]
    assert all(equal(one[kind], other[kind]) for kind in ("masters", "means", "squares"))
    assert all(one[name] == other[name] for name in ("steps", "loss_scale", "good_steps"))
    log = rows(tmp_path / "straight", "seconds")
    assert log == rows(tmp_path / "parts", "seconds") and len(log) == straight.step


def test_best_is_the_lowest_validation_loss_and_never_nan(fit, tmp_path, monkeypatch):
    flags = dict(lr_schedule="constant", warmup_ratio=0, eval_interval=1)
    fit("two", max_steps=2, **flags)
    losses = iter([3.0, 2.0, 4.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    state = fit("four", max_steps=4, **flags)
    assert state.best_val_loss == 2.0 and math.isnan(state.val_loss)
    assert [row["val_loss"] for row in rows(tmp_path / "four")] == ["3", "2", "4", "nan"]
    assert equal(weights(tmp_path / "four" / "best"), weights(tmp_path / "two" / "last"))


def test_results_load_in_transformers_and_carry_the_prompts_wording(fit, tmp_path):
    fit()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"ckpt.pt", "log.csv", "best", "last", "loss.png"}
    for directory in (tmp_path / "out" / "best", tmp_path / "out" / "last"):
        assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", "prompt.json"}
        theirs, ours = transformers.GPT2LMHeadModel.from_pretrained(directory).eval(), GPT.from_pretrained(directory)
        idx = torch.arange(40)[None]
        assert torch.allclose(ours.eval()(idx), theirs(idx).logits, atol=1e-5)
    assert json.loads((tmp_path / "out" / "best" / "prompt.json").read_text())["template"] == "chat"


def test_the_log_has_its_columns_and_losses_of_six_digits(fit, tmp_path):
    state = fit()
    log = rows(tmp_path / "out")
    assert ",".join(log[0]) == "step,epoch,train_loss,val_loss,learning_rate,grad_norm,tokens,supervised_tokens,seconds"
    assert [bool(row["val_loss"]) for row in log] == [False, False, True] * 2
    assert max(len(row["train_loss"].replace(".", "")) for row in log) >= 7
    assert float(log[-1]["train_loss"]) == pytest.approx(state.train_loss, rel=1e-6)
    assert float(log[-1]["val_loss"]) == pytest.approx(state.val_loss, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_the_ids_in_config_json_are_the_encodings_own(vocab_size, fit, tmp_path):
    tiny(block_size=128, vocab_size=vocab_size, eos_token_id=vocab_size - 1).save_pretrained(tmp_path / "start")
    fit(init_from=str(tmp_path / "start"), max_steps=1)
    fit(resume=True, max_steps=2)
    for name in ("best", "last"):
        config = json.loads((tmp_path / "out" / name / "config.json").read_text())
        assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (vocab_size, 256, 256)


def test_without_validation_data_best_is_last(fit, prepare, tmp_path):
    fit(data_dir=str(prepare(colour_records(20), val_fraction=0)))
    assert equal(weights(tmp_path / "out" / "best"), weights(tmp_path / "out" / "last"))


# ---- the scripts ----------------------------------------------------------------------------------------------------

def test_eight_examples_come_out_word_for_word(fit, tmp_path, data, capsys):
    """prepare, train and sample end to end: overfitted answers are exact, and the model stops by itself."""
    state = fit(max_examples=8, max_steps=150, batch_size=8, learning_rate=5e-3, n_embd=64, eval_interval=0)
    assert state.train_loss < 0.01
    shards, encoding = Shards(data, load_meta(data), "train", 8), get_encoding("bytes")
    records = {record["instruction"]: record for record in colour_records(80)}
    learned = [records[encoding.decode(tokens["id"].tolist()).split("\n")[1].split("<|")[0]] for tokens in shards]
    file = write_lines(tmp_path / "eight.jsonl", learned)
    score = sample.main(sample.SampleConfig(model=str(tmp_path / "out" / "last"), file=str(file), batch_size=3,
                                            output=str(tmp_path / "answers.jsonl"), device="cpu", dtype="float32"))
    assert score == {"records": 8, "scored": 8, "exact": 8}
    assert capsys.readouterr().out.endswith("exact match 8/8 (100.0 %)\n")
    answered = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["response"] for record in answered] == [record["output"] for record in learned]


def script(path, *words, cwd=ROOT):
    return subprocess.run([sys.executable, path, *words], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_copy_of_train_py_trains_from_any_directory(data, tmp_path):
    fork, elsewhere = tmp_path / "fork", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(ROOT / "nanosft", fork / "nanosft")
    shutil.copy(ROOT / "model.py", fork)
    shutil.copy(ROOT / "train.py", fork / "my_train.py")
    done = script(fork / "my_train.py", f"--data_dir={data}", "--n_layer=1", "--max_steps=2", "--device=cpu", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert len(rows(elsewhere / "out")) == 2 and (elsewhere / "out" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("words, message", [
    (["--learning-rat=1"], "unknown flag '--learning_rat': did you mean --learning_rate?"),
    (["--epochs=many"], "--epochs: invalid float value: 'many'"),
    (["--resume=maybe"], "'maybe' is neither true nor false"),
    (["config.py"], "unknown argument 'config.py': did you mean --data_dir=config.py?"),
    (["--dropout=1.5", "--lr_schedule=step"], "--dropout: 1.5 is not in [0, 1); --lr_schedule: 'step' is none of")])
def test_misused_flags_end_in_one_line_and_exit_code_2(words, message):
    done = script(ROOT / "train.py", *words)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


@pytest.mark.parametrize("what", ["--n_layer=1 --n_embd=2000000000 --n_head=1", "<&- >&-"])
def test_too_little_memory_and_closed_streams_end_without_a_traceback(what, data, tmp_path):
    command = f"{sys.executable} train.py --data_dir={data} --out_dir={tmp_path / 'out'} --n_layer=1 --n_embd=8 --n_head=1"
    done = subprocess.run(f"{command} --max_steps=1 --device=cpu {what}", shell=True, cwd=ROOT, capture_output=True,
                          text=True)
    if "n_embd" in what:
        assert done.returncode == 1 and done.stderr.startswith("error: there is not enough memory")
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0 and done.stderr == "" and (tmp_path / "out" / "last").exists()


def test_a_bug_of_ours_still_shows_its_traceback():
    code = ("import sys; sys.path.insert(0, sys.argv.pop()); import train; from nanosft import flags\n"
            "def main(config): config.no_such_name\nflags.run(main, train.TrainConfig)")
    done = script("-c", code, str(ROOT))
    assert done.returncode == 1 and "Traceback" in done.stderr and "no_such_name" in done.stderr


# ---- flags and errors -----------------------------------------------------------------------------------------------

def test_flags_are_read_in_every_spelling():
    words = ["--max-steps", "5", "--resume", "--dropout=0", "--overwrite=False", "--out_dir", "x"]
    config = parse_config(TrainConfig, words)
    assert (config.max_steps, config.resume, config.dropout, config.overwrite, config.out_dir) == (
        5, True, 0.0, False, "x")
    assert config.given == {"max_steps", "resume", "dropout", "overwrite", "out_dir"}
    assert parse_config(TrainConfig, ["--out_dir=~/out"]).out_dir == os.path.expanduser("~/out")


def test_what_others_call_a_flag_is_a_flag_of_ours():
    kinds = TrainConfig, prepare_data.PrepareConfig, sample.SampleConfig
    for name, ours in ELSEWHERE.items():
        assert any(ours in kind.__dataclass_fields__ and name not in kind.__dataclass_fields__ for kind in kinds), name
    for kind, word, message in ((TrainConfig, "--max-iters=5", "'--max_iters': did you mean --max_steps"),
                                (TrainConfig, "--lr", "'--lr': did you mean --learning_rate"),
                                (TrainConfig, "--start=x", "'--start': --help lists the flags"),
                                (sample.SampleConfig, "--out_dir=x", "'--out_dir': did you mean --model")):
        with pytest.raises(UserError, match=message):
            parse_config(kind, [word])


def test_values_from_python_take_their_fields_types_or_are_refused(fit, data, tmp_path):
    fit(out_dir=tmp_path / "out", data_dir=data, max_steps=6e0, batch_size=np.int64(4), learning_rate=np.float64(1e-3),
        dropout=np.float32(0.125))
    assert train.main(TrainConfig(resume=True, out_dir=tmp_path / "out", max_steps=8)).step == 8
    for values in dict(max_steps=2.5), dict(max_minutes=None), dict(lora_targets=["c_attn"]), dict(resume="yes"):
        with pytest.raises(UserError, match=f"--{next(iter(values))}: .* is no (int|float|str|bool)$"):
            TrainConfig(**values)
    with pytest.raises(UserError, match="--epochs: nan is no number below 2.31; --learning_rate: inf is no"):
        TrainConfig(epochs=math.nan, learning_rate=math.inf)
    with pytest.raises(UserError, match="--seed: -1 is below 0; --overwrite"):
        TrainConfig(seed=-1, overwrite=True, resume=True)
    assert sample.SampleConfig(model=Path("out")).model == "out"


def test_wrong_use_gets_one_line_with_the_remedy(fit, tmp_path):
    fit("done")
    cases = [
        (dict(out="done"), "holds a run already: go on with --resume, replace it with --overwrite"),
        (dict(out="done", init_from=str(tmp_path / "done" / "best"), overwrite=True),
         "lies in --out_dir=.*which --overwrite clears: name another --out_dir"),
        (dict(out="done", init_from=str(tmp_path / "done"), overwrite=True), "which --overwrite clears"),
        (dict(data_dir=str(tmp_path / "nowhere")), "--data_dir: no prepared data in .*prepare_data.py"),
        (dict(init_from="gpt2"), "--init_from=gpt2 needs GPT-2's encoding"),
        (dict(init_from="nowhere"), "no model 'nowhere'"),
        (dict(micro_batch_tokens=10), "--micro_batch_tokens=10 is below the longest example"),
        (dict(n_embd=33), "n_embd=33 is no multiple of n_head=2"),
        (dict(device="tpu9"), "--device=tpu9"),
        (dict(out="none", resume=True), "--resume: .*ckpt.pt is not there"),
        (dict(out="done", resume=True, batch_size=5), r"drop --batch_size=5 \(it ran with 4\)"),
        (dict(out="done", resume=True, dtype="bfloat16"), r"drop --dtype=bfloat16 \(it ran with float32\)"),
    ]
    tiny(vocab_size=999, n_embd=64, n_head=1).save_pretrained(tmp_path / "other")
    cases.append((dict(init_from=str(tmp_path / "other")), "has 999 token ids"))
    tiny(block_size=16).save_pretrained(tmp_path / "short")
    cases.append((dict(init_from=str(tmp_path / "short")), "a context of 16 tokens, the longest example"))
    for flags, message in cases:
        with pytest.raises((UserError, OSError), match=message) as caught:
            fit(**flags)
        assert "\n" not in str(caught.value)
    left = {path.name for path in tmp_path.iterdir() if path.is_file() or any(path.iterdir())}
    assert left == {"done", "other", "short"}  # none of the refused runs left anything
    assert (tmp_path / "done" / "best" / "model.safetensors").exists()


def test_a_validation_example_too_long_for_the_model_is_refused_before_training(fit, prepare, tmp_path):
    data = prepare(colour_records(60), val_fraction=0.3)
    meta = load_meta(data)
    meta["train"]["longest"], meta["val"]["longest"] = 40, 90
    write_meta(data, meta)
    tiny(block_size=64).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="a context of 64 tokens, the longest example 90"):
        fit(data_dir=str(data), init_from=str(tmp_path / "short"))


def test_a_resume_finds_its_data_and_no_other(fit, data, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    fit(data_dir=data.name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--resume: the run's data are not in {data.name}, .*say with --data_dir"):
        train.main(TrainConfig(resume=True, out_dir="out", max_steps=8))
    other, tampered = prepare(colour_records(70)), tmp_path / "tampered"
    shutil.copytree(data, tampered)  # one id more or less, with every checksum as it should be: other data all the same
    tokens = np.load(tampered / "train_00000.npy")
    tokens["id"][len(tokens) // 2] ^= 1
    np.save(tampered / "train_00000.npy", tokens)
    for data_dir, message in ((other, "not the data that this run began with"), (tampered, "is damaged")):
        with pytest.raises(UserError, match=message):
            train.main(TrainConfig(resume=True, out_dir="out", data_dir=data_dir, max_steps=8))
    assert train.main(TrainConfig(resume=True, out_dir="out", data_dir=data, max_steps=8)).step == 8


def test_damaged_files_are_refused(fit, tmp_path, prepare):
    fit("out")
    path = tmp_path / "out" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="ckpt.pt cannot be read.*--overwrite"):
        fit("out", resume=True)
    for change in (lambda content: content[:500], lambda content: b"nonsense",
                   lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
        own = prepare(colour_records(30))
        for name in ("train_00000.npy", "meta.json"):
            content = (own / name).read_bytes()
            (own / name).write_bytes(change(content))
            with pytest.raises(UserError, match=f"{name} is damaged .*run prepare_data.py again"):
                fit("new", data_dir=str(own))
            (own / name).write_bytes(content)
    write_meta(own, {**load_meta(own), "format_version": 99})
    with pytest.raises(UserError, match="has format 99, this program reads 2; run prepare_data.py again"):
        fit("new", data_dir=str(own))


def test_a_log_or_picture_that_somebody_spoils_ends_no_run(fit, tmp_path, monkeypatch, capsys):
    out_dir, real = tmp_path / "out", train.evaluate

    def spoil(*args):
        (out_dir / "log.csv").unlink(missing_ok=True)
        (out_dir / "loss.png").unlink(missing_ok=True)
        (out_dir / "loss.png").mkdir()
        monkeypatch.setattr(train, "evaluate", real)
        return real(*args)
    monkeypatch.setattr(train, "evaluate", spoil)
    assert fit().step == 6 and "warning: no loss.png (" in capsys.readouterr().out
    assert fit(resume=True, max_steps=8).step == 8
    assert [row["step"] for row in report.read_rows(out_dir / "log.csv")] == [3, 4, 5, 6, 7, 8]  # 1 and 2 were removed


def test_an_interrupted_run_leaves_weights_and_a_finished_one_says_why_it_ends(fit, tmp_path, capsys):
    with stop_after(2), pytest.raises(SystemExit):
        fit(eval_interval=0)
    assert GPT.from_pretrained(tmp_path / "out").config.n_embd == 32
    assert fit(resume=True).step == 6
    assert fit(resume=True, epochs=50).step == 6
    assert "nothing to do: the run had reached its --epochs" in capsys.readouterr().out


def test_two_runs_never_write_into_one_directory(fit, data, tmp_path, spawn):
    code = ("import sys, train; train.report.plot = lambda out_dir: (print('claimed', flush=True), sys.stdin.read())\n"
            "train.main(train.TrainConfig(data_dir=sys.argv[1], out_dir=sys.argv[2], n_layer=1, n_head=1, n_embd=8, "
            "device='cpu', max_steps=2, eval_interval=1))")
    first = spawn("-c", code, data, tmp_path / "out", cwd=ROOT, stdin=subprocess.PIPE)
    while "claimed" not in first.stdout.readline():
        assert first.poll() is None
    for flags in dict(overwrite=True), dict(resume=True), {}:
        with pytest.raises(UserError, match="another run writes there; name another, or wait for it"):
            fit(**flags)
    first.communicate("")
    assert first.returncode == 0 and len(rows(tmp_path / "out")) == 2


def test_the_unfinished_files_of_another_run_below_are_left_alone(fit, tmp_path):
    other, own = tmp_path / "run" / "other" / "ckpt.pt.123.tmp", tmp_path / "run" / "ckpt.pt.99.tmp"
    other.parent.mkdir(parents=True)
    for path in (other, own):
        path.write_bytes(b"half")
    fit("run", max_steps=1)
    assert other.exists() and not own.exists()


# ---- what a run tells -----------------------------------------------------------------------------------------------

def test_answers_in_training_stop_at_the_context(data, capsys):
    samples = report.Samples(Shards(data, load_meta(data), "train"), get_encoding("bytes"), count=5)
    samples.show(tiny(block_size=max(map(len, samples.prompts))), "here")
    assert capsys.readouterr().out.count("-> ''") == 5


def test_the_lines_that_many_texts_share_are_the_templates():
    texts = [f"Below is a task.\n\n### Do:\nname {i}\n### Say:\n{i}<|endoftext|>" for i in range(20)]
    assert report.without_template(texts)[:2] == ["name 0 0", "name 1 1"]
    assert report.without_template(["one\ntext"]) == ["one text"]


def test_wandb_gets_the_usual_names_and_ends_no_run(fit, tmp_path, monkeypatch, capsys):
    seen, module = [], type(sys)("wandb")
    module.init = lambda **flags: SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)))
    monkeypatch.setitem(sys.modules, "wandb", module)
    fit(wandb=True)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert set(seen[0][1]) == {"train/loss", "lr", "grad_norm", "tokens_per_second"} and "val/loss" in seen[2][1]
    module.init = lambda **flags: SimpleNamespace(log=lambda numbers, step: 1 / 0)
    assert fit("broken", wandb=True).step == 6
    assert "warning: Weights & Biases failed at step 1" in capsys.readouterr().out
    del module.init  # as if nobody were logged in
    log = (tmp_path / "out" / "log.csv").read_text()
    with pytest.raises(UserError, match="--wandb: .*init.*pip install wandb"):
        fit(wandb=True, overwrite=True)
    assert (tmp_path / "out" / "log.csv").read_text() == log
