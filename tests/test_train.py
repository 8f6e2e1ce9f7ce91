"""train.py: its numbers against transformers and torch, its steps, its clock, its checkpoints and its messages."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, checkpoint, colour_records, column, equal, masters, randomise, rows, tiny, write_lines
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import prepare_data
import sample
import train
from model import GPT, IGNORE_INDEX
from nanosft import flags as flags_module
from nanosft import pictures, report
from nanosft.console import UserError
from nanosft.device import pick_dtype
from nanosft.files import crc32_of_json
from nanosft.flags import ELSEWHERE, parse_config
from nanosft.optimizer import AdamW
from nanosft.shards import Shards, examples_of_step, load_meta, micro_batches, write_meta
from nanosft.templates import copy_tokenizer, get_encoding
from train import TrainConfig, learning_rate_at

BASE = dict(n_layer=2, n_head=2, n_embd=32, device="cpu", dtype="float32", compile="off", max_steps=6, eval_interval=3,
            batch_size=4)


@pytest.fixture
def fit(data, tmp_path, monkeypatch):
    """fit(out, **flags) -> the RunState that train.main returns. No loss.png, which takes as long as all the rest;
    fit.plot would draw it."""
    def run(out="out", **flags):
        common = BASE if "resume" not in flags else {}
        return train.main(TrainConfig(**{**common, "data_dir": str(data), "out_dir": str(tmp_path / out), **flags}))
    run.plot = pictures.plot_losses
    monkeypatch.setattr(pictures, "plot_losses", lambda *_: None)
    return run


def same_weights(out_dir, other):
    return equal(masters(out_dir), masters(other))


def weights(directory):
    return dict(GPT.from_pretrained(directory).named_parameters())


# ---- the step -------------------------------------------------------------------------------------------------------

def gradients_of(dtype, shards, groups):
    """(loss, gradients) of the step that consists of these groups of examples."""
    model = tiny(block_size=128).to(torch.promote_types(dtype, torch.float32))
    batches = [shards.batch(group) for group in groups]
    supervised = sum(int((targets != IGNORE_INDEX).sum()) for _, targets, _ in batches)
    loss = train.accumulate(model, AdamW(model, dtype), batches, supervised)
    return loss.item(), [p.grad for p in model.parameters()]


def test_accumulation_does_not_matter(data):
    """The same 8 examples of unequal answer lengths as 1 x 8, 4 x 2, 8 x 1 and by length; 16 bits add up in float32."""
    shards = Shards(data, load_meta(data), "train")
    indices = examples_of_step(0, shards, 8, 0)
    assert len({shards.supervised([i]) for i in indices}) >= 3
    (loss, grads), *others = (gradients_of(torch.float64, shards, groups) for groups in (
        [indices], indices.reshape(4, 2), indices.reshape(8, 1), micro_batches(indices, shards.lengths, 128)))
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for one, other in zip(grads, other_grads, strict=True):
            assert (one - other).norm() <= 1e-11 * one.norm()
    for groups, dtype in ((indices.reshape(8, 1), torch.float32), ([indices], torch.bfloat16)):
        assert {grad.dtype for grad in gradients_of(torch.bfloat16, shards, groups)[1]} == {dtype}


def test_the_curve_does_not_depend_on_the_size_of_the_micro_batches(fit, tmp_path):
    curves = []
    for size in (90, 200, 2000):
        fit(str(size), micro_batch_tokens=size, max_steps=9, batch_size=8)
        names = "train_loss", "val_loss", "grad_norm", "tokens", "supervised_tokens"
        curves.append([number for name in names for number in column(tmp_path / str(size), name)])
    assert curves[1] == pytest.approx(curves[0], rel=2e-5) and curves[2] == pytest.approx(curves[0], rel=2e-5)


def plain_loop(model, shards, steps, batch_size, seed, schedule, weight_decay, clip):
    """The same training in the plainest way: transformers' model, padding, one mean over the step, torch's AdamW."""
    decay = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        examples = [shards[i] for i in examples_of_step(step, shards, batch_size, seed)]
        # padded on the right, which causal attention never sees
        ids, flags = (pad_sequence([torch.from_numpy(tokens[field].astype(np.int64)) for tokens in examples], True)
                      for field in ("id", "flags"))
        labels = ids.masked_fill(flags & 1 == 0, -100)
        logits = model(ids).logits
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


def test_an_epochs_last_step_takes_what_is_left_and_is_normalised_by_its_own_tokens(fit, tmp_path, data):
    seven = Shards(data, load_meta(data), "train", 7)
    steps = [examples_of_step(step, seven, 4, seed=3).tolist() for step in range(4)]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(7)) and len(steps[0]) == 4
    fit(max_examples=7, max_steps=0, epochs=1, batch_size=4, eval_interval=0)
    shards, out_dir = Shards(data, load_meta(data), "train", 7), tmp_path / "out"
    assert column(out_dir, "step") == [1, 2] and column(out_dir, "epoch")[1] == 1
    assert sum(column(out_dir, "tokens")) == shards.lengths.sum()
    assert sum(column(out_dir, "supervised_tokens")) == shards.supervised(range(7))
    assert column(out_dir, "train_loss")[1] == pytest.approx(math.log(257), rel=0.05)  # a mean, whatever the count


def test_evaluation_depends_on_no_batch_size(data):
    shards, model, keeps_graph = Shards(data, load_meta(data), "train"), tiny(block_size=128), []
    hook = model.ln_f.register_forward_hook(lambda *_: keeps_graph.append(torch.is_grad_enabled()))
    losses = [train.evaluate(model, shards, max_tokens) for max_tokens in (90, 270, 5000)]
    hook.remove()
    assert keeps_graph and not any(keeps_graph)
    batches = [shards.batch([i]) for i in range(len(shards))]
    total = sum(model(*batch).item() for batch in batches)
    assert losses == pytest.approx([total / shards.supervised(range(len(shards)))] * 3, rel=1e-6) and model.training


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


# ---- precision, compiling, memory -----------------------------------------------------------------------------------

@pytest.mark.parametrize("low_memory, dtype", [(False, "bfloat16"), (False, "float16"), (True, "bfloat16")])
def test_half_precision_follows_float32_and_leaves_its_masters(low_memory, dtype, fit, tmp_path):
    exact, half = fit("exact", max_steps=12), fit("half", max_steps=12, dtype=dtype, low_memory=low_memory)
    assert half.train_loss == pytest.approx(exact.train_loss, rel=0.02) and half.train_loss < 5.4
    assert column(tmp_path / "half", "grad_norm") == pytest.approx(column(tmp_path / "exact", "grad_norm"), rel=0.1)
    theirs, ours = masters(tmp_path / "exact"), masters(tmp_path / "half")
    assert (ours["wte.weight"] - theirs["wte.weight"]).norm() < 0.02 * theirs["wte.weight"].norm()
    assert any(not torch.equal(weight, weight.to(getattr(torch, dtype)).float()) for weight in ours.values())
    stored = load_file(tmp_path / "half" / "last" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert equal(weights(tmp_path / "half" / "last"), ours) and equal(weights(tmp_path / "half" / "best"), ours)


def test_a_step_that_is_not_finite_changes_nothing_and_ten_in_a_row_stop(fit, tmp_path, monkeypatch):
    fit(max_steps=2, dtype="float16", eval_interval=0)
    before, real = checkpoint(tmp_path / "out")["tensors"], train.accumulate
    monkeypatch.setattr(train, "accumulate", lambda *args: real(*args) * math.nan)
    with pytest.raises(UserError, match="ten steps in a row.*--learning_rate"):
        fit(max_steps=12, resume=True)
    after = checkpoint(tmp_path / "out")["tensors"]
    assert all(equal(before[kind], after[kind]) for kind in ("masters", "means", "squares"))
    assert (before["steps"], after["steps"], after["good_steps"], after["loss_scale"]) == (2, 2, 0, 2.0**6)
    assert column(tmp_path / "out", "step") == list(range(1, 13))  # they count for the schedule, not for AdamW


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_compiling_the_blocks_changes_nothing(dtype, tolerance, fit, tmp_path, capsys):
    for name, mode in (("eager", "off"), ("compiled", "on")):
        fit(name, dtype=dtype, eval_interval=2, learning_rate=5e-3, lr_schedule="constant", compile=mode)
    eager, compiled = (column(tmp_path / name, "train_loss") + column(tmp_path / name, "val_loss")
                       for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=tolerance) and len(set(eager)) > 6
    assert "does not work" not in capsys.readouterr().out


def test_only_training_runs_compiled_and_where_that_fails_all_runs_eager(fit, monkeypatch, capsys):
    """Evaluation and generation run eager anyway: their shapes change."""
    calls, real, eager = [], torch.nn.Module.compile, fit("eager")

    def backend(graph, inputs):
        return lambda *args: calls.append(torch.is_grad_enabled()) or graph(*args)

    def broken(self, **options):
        self._compiled_call_impl = lambda *args: [][0]  # no compiler on this platform
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: real(self, backend=backend, **options))
    assert fit("compiled", compile="on").val_loss == pytest.approx(eager.val_loss, rel=1e-5)
    assert len(calls) >= 2 * 6 and all(calls)  # layers x steps
    eager = fit("dropout", dropout=0.1)  # which an attempt that failed does not change
    for name, compiler in (("first call", broken), ("no compiler", lambda self, **options: [][0])):
        monkeypatch.setattr(torch.nn.Module, "compile", compiler)
        assert fit(name, compile="on", dropout=0.1).val_loss == eager.val_loss
        assert "torch.compile does not work here (IndexError); going on without it" in capsys.readouterr().out


@pytest.mark.parametrize("feature, expected", [
    ("avx512_bf16", torch.bfloat16), ("amx_bf16", torch.bfloat16), ("sve_bf16", torch.bfloat16),
    ("avx512_f", torch.float32)])
def test_a_cpu_computes_in_bfloat16_where_it_has_the_instructions(feature, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, feature: True})
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    is_slow = "no instructions for bfloat16" in capsys.readouterr().out
    assert is_slow == (expected == torch.float32)


@pytest.mark.parametrize("flags, varlen, expected", [
    (dict(max_steps=500), True, True), (dict(max_steps=499), True, False), (dict(max_steps=500), False, False),
    (dict(max_steps=500, dropout=0.1), True, False), (dict(max_steps=500, max_minutes=4.9), True, False),
    (dict(max_steps=500, max_minutes=5), True, True), (dict(max_steps=1, compile="on"), False, True),
    (dict(max_steps=500, compile="off"), True, False)])
def test_long_runs_are_compiled_where_one_graph_takes_all_shapes(flags, varlen, expected, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "has_varlen_attention", lambda *_: varlen)
    config = TrainConfig(data_dir=str(data), out_dir=str(tmp_path / "out"), device="cpu", **flags)
    assert train.set_up(config, torch.device("cpu")).compiles == expected


def test_on_a_cpu_nothing_imports_the_compiler(data, tmp_path):
    """It takes longer than torch itself."""
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    flags = dict(data_dir=str(data), init_from=str(tmp_path / "base"), out_dir=str(tmp_path / "out"), device="cpu")
    code = (f"import sys, train; train.main(train.TrainConfig(**{flags}, max_steps=1)); "
            "print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "False"


def test_what_does_not_fit_into_memory_is_halved_until_it_does(data, fit, tmp_path, monkeypatch, capsys):
    """Nothing is left of the attempt: the run equals one that began with half the tokens. A later step may be halved,
    too; and where the first one never fits, a run that was there stays."""
    flags, real, calls = dict(batch_size=8, eval_interval=0), train.accumulate, []
    fit("straight", micro_batch_tokens=400, **flags)

    def hungry(model, optimizer, batches, supervised):
        calls.append([p.grad is None for p in model.parameters()])
        loss = real(model, optimizer, batches, supervised)
        if len(calls) in failing:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return loss
    monkeypatch.setattr(train, "accumulate", hungry)
    for failing in ([1], [1, 5]):
        calls.clear()
        fit(micro_batch_tokens=400 * 2 ** len(failing), overwrite=True, **flags)
        assert all(calls[0]) and len(calls) == 6 + len(failing)
        assert same_weights(tmp_path / "straight", tmp_path / "out") == (failing == [1])
        assert capsys.readouterr().out.count("out of memory: going on with --micro_batch_tokens=400") == 1
    failing, longest = [1], int(Shards(data, load_meta(data), "train").lengths.max())
    calls.clear()
    fit(micro_batch_tokens=longest * 3 // 2, overwrite=True, **flags)  # that one example fits is still unknown
    failing = range(1000)
    with pytest.raises(UserError, match="one example of .* does not fit .* try --gradient_checkpointing"):
        fit("straight", overwrite=True)
    assert same_weights(tmp_path / "straight", tmp_path / "straight") and (tmp_path / "straight/log.csv").exists()


# ---- the clock ------------------------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """clock(step, evaluation, noise) -> the only clock that train.py sees, as `now`: it moves by these seconds alone, a
    step's more or less by a share of up to `noise`."""
    def start(step, evaluation=0.0, noise=0.0):
        ours, uneven, real = SimpleNamespace(now=1000.0), random.Random(3), (train.accumulate, train.evaluate)

        def accumulate(*args):
            ours.now += step * uneven.uniform(1 - noise, 1 + noise)
            return real[0](*args)

        def evaluate(*args):
            ours.now += evaluation
            return real[1](*args)
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: ours.now))
        monkeypatch.setattr(train, "accumulate", accumulate)
        monkeypatch.setattr(train, "evaluate", evaluate)
        return ours
    return start


@pytest.mark.parametrize("evaluation", [0.1, 20])
def test_time_ends_a_run_with_the_learning_rate_at_its_end(evaluation, fit, tmp_path, clock):
    """As in a run that was planned for so many steps. The first evaluation tells what one costs."""
    ours, out_dir = clock(1.5, evaluation, noise=0.25), tmp_path / "out"
    state = fit(max_steps=0, epochs=10_000, learning_rate=1e-3, max_minutes=5, eval_interval=-1)
    assert 0.95 * 300 <= ours.now - 1000 <= 1.05 * 300
    rates, evaluations = column(out_dir, "learning_rate"), len(column(out_dir, "val_loss"))
    assert len(rates) == state.step < 210 and max(rates) > 0.97e-3
    planned = learning_rate_at(state.step - 1, state.step, 1e-3, 0, "cosine", round(0.05 * state.step))
    assert planned / 4 <= rates[-1] <= 4 * planned < 5e-5
    assert rows(out_dir)[-1]["val_loss"] and 2 <= evaluations <= 12 and (evaluations - 2) * evaluation <= 0.1 * 300


def test_no_evaluation_comes_in_the_time_that_is_kept_for_the_last(fit, clock, tmp_path):
    """After the one at step 2 the next would be due ten evaluations later, three steps before the end."""
    ours = clock(1.0, evaluation=10.0)
    fit(max_steps=0, epochs=99, max_minutes=128 / 60, eval_interval=1)
    assert 120 <= ours.now - 1000 <= 128 and len(column(tmp_path / "out", "val_loss")) == 2


def test_a_limit_of_time_counts_earlier_parts_and_lengthens_no_run(fit, clock, tmp_path, capsys):
    ours = clock(1.0)
    assert fit(max_minutes=60).step == 6 and ours.now - 1000 < 20
    assert "fit into" not in capsys.readouterr().out
    assert fit("short", max_steps=0, epochs=99, max_minutes=0.5, eval_interval=0).step in range(26, 31)
    assert re.search(r"^about \d+ of the 1,683 steps fit into --max_minutes=0.5$", capsys.readouterr().out, re.M)
    before = fit("short", resume=True).step  # no time is left
    done = fit("short", resume=True, max_minutes=1).step
    rates = column(tmp_path / "short", "learning_rate")
    assert before in range(26, 31) and done == len(rates) in range(50, 61)
    for step in range(before, 50):  # the schedule of the whole limit from the first step on
        assert rates[step] == pytest.approx(learning_rate_at(step, done, 2e-3, 0, "cosine", 3), rel=0.2)


@pytest.mark.parametrize("compiles, first", [("off", 20.0), ("on", 40.0)])
def test_a_slow_first_step_ends_no_run_with_a_limit_of_time(compiles, first, fit, clock, monkeypatch, capsys):
    """It makes kernels or compiles, and tells next to nothing about the others, nor about an evaluation."""
    ours, accumulate, waited = clock(1.0, evaluation=2.0), train.accumulate, [first]

    def slow_at_first(*args):
        ours.now += waited.pop() if waited else 0
        return accumulate(*args)
    monkeypatch.setattr(train, "accumulate", slow_at_first)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: None)
    state = fit(max_steps=0, epochs=99, max_minutes=1, eval_interval=0, compile=compiles)
    assert state.step in range(int(54 - first), int(60 - first)) and ours.now - 1000 <= 62
    assert "one evaluation" not in capsys.readouterr().out


def test_time_for_what_is_saved_last_is_reserved(fit, clock, monkeypatch):
    ours, save_state, save_weights = clock(1.5), train.save_state, train.save_weights

    def slow(run, name=""):
        ours.now += {"last": 8, "best": 0, "": 24}[name]
        return save_weights(run, name) if name else save_state(run)
    monkeypatch.setattr(train, "save_state", slow)
    monkeypatch.setattr(train, "save_weights", slow)
    fit(max_steps=0, epochs=10_000, max_minutes=5, eval_interval=-1)
    assert 0.95 * 300 <= ours.now - 1000 <= 1.02 * 300


def test_a_warm_up_that_never_ends_is_said(fit, capsys):
    for steps, said in ((6, False), (7, True)):  # of 6
        fit(str(steps), warmup_steps=steps - 1, learning_rate=1e-3, max_steps=6)
        warning = f"warning: --warmup_steps={steps - 1} is the whole run: no step has the full learning rate\n"
        assert (warning in capsys.readouterr().out) == said


@pytest.mark.parametrize("eval_interval, seconds, expected", [
    (0, 0, [20, 40, 50]), (3, 0, [*range(3, 50, 3), 50]),
    (3, 9, [3, 9, 15, 21, 27, 33, 39, 45, 50]), (3, 90, [3, *range(20, 50, 17), 50])])
def test_a_run_is_saved_with_evaluations_for_a_twentieth_of_its_time_and_every_ten_minutes(
        eval_interval, seconds, expected, fit, clock, monkeypatch):
    saved, real, ours = [], train.save_state, clock(30.0)

    def save_state(run):
        saved.append(run.state.step)
        ours.now += seconds
        real(run)
    monkeypatch.setattr(train, "save_state", save_state)
    fit(max_steps=50, eval_interval=eval_interval)
    assert saved == expected


def test_the_progress_line_tells_all_tokens_a_second_and_the_time_left(fit, tmp_path, clock, capsys):
    clock(2.0)
    fit(log_interval=1, eval_interval=1)  # the first evaluation tells what one costs: nothing
    lines = re.findall(r"^step (\d)/6 +(\d+) s left  loss .*  ([\d,]+) tok/s$", capsys.readouterr().out, re.M)
    speeds = [f"{tokens / 2:,.0f}" for tokens in column(tmp_path / "out", "tokens")]
    assert len(lines) == 6 and lines[0][0] == "1" and int(lines[0][1]) >= 10 and lines[0][2] == speeds[0]
    assert lines[1:] == [(str(step), str(12 - 2 * step), speeds[step - 1]) for step in range(2, 7)]


def test_the_time_left_counts_the_evaluations_to_come(fit, clock, capsys):
    clock(1.0, evaluation=5.0)
    fit(max_steps=50, eval_interval=5, log_interval=1)
    lines = re.findall(r"^step +(\d+)/50 +([\d.]+ \w+) left", capsys.readouterr().out, re.M)
    assert [int(step) for step, _ in lines] == list(range(1, 51))
    for step in range(6, 51):  # the first evaluation tells what one costs
        assert lines[step - 1][1] == report.duration(50 - step + 5 * (10 - (step - 1) // 5)), step


@pytest.mark.parametrize("scored, longest, expected", [(0, 8, 1 + 0.5 * 8 / 16), (64, 32, 1 + 0.5 * (32 + 192) / 16),
                                                       (33, 160, 1 + 0.5 * (64 + 960) / 16)])
def test_what_an_evaluation_takes_is_expected_from_its_tokens_and_answers(scored, longest, expected):
    samples = SimpleNamespace(scored=scored, answers=[[0], [0] * longest])
    pace = train.Pace(9, 0, False, 300, report.Samples.expected_seconds(samples, 0.5), now=7.0)
    pace.step_done(now=12.0, tokens=50)  # makes kernels, too
    assert pace.seconds_left(1, 2, 2) == pytest.approx(5 + 10 + expected - 1)  # 300 tokens at a third of 0.1 s
    pace.step_done(now=13.0, tokens=100)
    pace.step_done(now=13.9, tokens=30)
    assert pace.seconds_left(3, 5, 5) == pytest.approx(2 * 0.95 + expected)
    pace.evaluation_done(now=20.9)
    assert pace.seconds_left(3, 5, 5) == pytest.approx(2 * 0.95 + 7)


def test_answers_are_expected_for_as_many_records_as_there_are(data):
    val = Shards(data, load_meta(data), "val")
    for by, asked, count in (("exact", 10_000, len(val)), ("exact", 2, 2), ("", 0, 0)):
        assert report.Samples(val, get_encoding("bytes"), 256, by=by, scored=asked).scored == count


def test_a_limit_of_time_says_if_an_evaluation_alone_is_longer(fit, clock, capsys):
    clock(4.0)
    for limit in (0, 0.001):
        assert fit(str(limit), max_steps=2, max_minutes=limit).step == (1 if limit else 2)
        said = re.search(r"^warning: one evaluation, with which a run ends, takes \d+ s: longer than --max_min",
                         capsys.readouterr().out, re.M)
        assert bool(said) == bool(limit)


@pytest.mark.parametrize("seconds, shown", [(0.4, "0 s"), (99, "99 s"), (100, "1.7 min"), (5999, "100.0 min"),
                                            (6000, "1.7 h"), (360_000, "100.0 h")])
def test_a_time_is_told_in_the_unit_that_suits_it(seconds, shown):
    assert report.duration(seconds) == shown


# ---- what is left of a run ------------------------------------------------------------------------------------------

@contextmanager
def stop_after(steps):
    """SIGINT while step `steps` runs."""
    real, before = train.examples_of_step, signal.getsignal(signal.SIGINT)

    def counted(step, *rest):
        if step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, *rest)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored: in the background, under nohup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "examples_of_step", counted)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def test_best_is_the_lowest_validation_loss_never_nan_and_the_last_without_one(fit, prepare, tmp_path, monkeypatch):
    flags = dict(lr_schedule="constant", warmup_ratio=0, eval_interval=1)
    fit("two", max_steps=2, data_dir=str(prepare(colour_records(80), val_fraction=0, test_fraction=0.04)), **flags)
    assert equal(weights(tmp_path / "two" / "best"), weights(tmp_path / "two" / "last"))
    fit("two", max_steps=2, overwrite=True, **flags)
    losses = iter([math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    fit("nan", max_steps=1, best_by="exact", **flags)
    assert not (tmp_path / "nan" / "best").exists()
    losses = iter([3.0, 2.0, 4.0, math.nan])
    state = fit("four", max_steps=4, **flags)
    assert state.best_val_loss == 2.0 and math.isnan(state.val_loss)
    assert [row["val_loss"] for row in rows(tmp_path / "four")] == ["3", "2", "4", "nan"]
    assert equal(weights(tmp_path / "four" / "best"), weights(tmp_path / "two" / "last"))


def test_patience_ends_a_run_and_a_resumed_one_does_not_forget_the_count(fit, prepare, monkeypatch, capsys):
    losses = [3.0, 2.0, 4.0, 2.0, math.nan, 1.0, 1.0, 1.0, 1.0]
    monkeypatch.setattr(train, "evaluate", lambda *_: losses.pop(0))
    flags = dict(eval_interval=1, save_interval=1, patience=3)
    assert fit("whole", max_steps=9, **flags).step == 5 and losses[0] == 1.0
    assert "no better evaluation in 3: this is the end (--patience=3)" in capsys.readouterr().out
    losses[:] = [3.0, 2.0, 4.0, 2.0, 5.0]
    assert fit("cut", max_steps=4, **flags).waited == 2
    assert fit("cut", resume=True, max_steps=9).step == 5 and not losses
    assert fit("cut", resume=True, max_steps=9).step == 5  # nothing is left to do
    assert "raise what ended the run" in capsys.readouterr().out.splitlines()[-1]
    losses[:] = [1.0, 2.0, 2.0, 2.0]
    assert fit("cut", resume=True, max_steps=9, patience=5).step == 9
    with pytest.raises(UserError, match="needs validation records: prepare with --val_fraction"):
        fit("none", data_dir=str(prepare(colour_records(20), val_fraction=0)), patience=1)


@pytest.mark.parametrize("by", ["exact", "likelihood"])
def test_best_follows_the_answers_where_that_is_asked_for(by, fit, prepare, tmp_path, monkeypatch, capsys):
    records = [{"prompt": f"{i} is ", "completion": ("even", "odd")[i % 2]} for i in range(60)]
    data = str(prepare(records, val_fraction=0.3, test_fraction=0, template=""))
    scores, losses = iter([3, 5, 5, 4]), iter([1.0, 4.0, 3.0, 0.5])
    monkeypatch.setattr(report.Samples, "right", lambda *_: next(scores))
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses, 9.0))
    state = fit(data_dir=data, max_steps=4, eval_interval=1, lr_schedule="constant", warmup_ratio=0, best_by=by,
                best_examples=10)
    assert (state.best_val_score, state.best_val_loss, state.waited) == (0.5, 3.0, 1)
    assert [row["val_score"] for row in rows(tmp_path / "out")] == ["0.3", "0.5", "0.5", "0.4"]
    out = capsys.readouterr().out
    assert f"step 3, validation loss 3.0000, {by} 5 of 10, the best so far" in out
    assert f"best by {by} 50.0%, at validation loss 3.0000; next:" in out
    monkeypatch.setattr(report.Samples, "right", lambda *_: 10)
    fit("three", data_dir=data, max_steps=3, eval_interval=0, lr_schedule="constant", warmup_ratio=0, best_examples=10)
    assert rows(tmp_path / "three")[2]["val_score"] == "1"  # a small model's answers are counted unasked, for the eye
    assert equal(weights(tmp_path / "out" / "best"), weights(tmp_path / "three" / "last"))
    fit.plot(tmp_path / "out")
    with pytest.raises(UserError, match="--best_by=likelihood needs 2 to 50 different answers, not 1; take exact"):
        fit("one", data_dir=str(prepare([{**record, "completion": "a"} for record in records], template="",
                                        val_fraction=0.3)), best_by="likelihood")
    for several in ([{"text": f"la {i}"} for i in range(60)], {}), (records, dict(train_on_prompt=True, template="")):
        learned = str(prepare(several[0], val_fraction=0.3, **several[1]))
        with pytest.raises(UserError, match=f"--best_by={by} needs validation records of which answers alone are lea"):
            fit("text", data_dir=learned, best_by=by, overwrite=True)
        fit("text", data_dir=learned, max_steps=1, overwrite=True)
        assert rows(tmp_path / "text")[0]["val_score"] == ""


def test_right_answers_are_those_that_sample_py_counts(data):
    """A model that has learned its examples by heart answers them exactly; a fresh one none."""
    shards, encoding = Shards(data, load_meta(data), "train", 6), get_encoding("bytes")
    samples, labels = (report.Samples(shards, encoding, 256, by=by, scored=6) for by in ("exact", "likelihood"))
    model = tiny(block_size=256).eval()
    assert samples.right(model) == 0 and 0 <= labels.right(model) <= 6
    expected = torch.tensor([[float(own == answer) for own in sorted({*map(tuple, samples.answers)})]
                             for answer in map(tuple, samples.answers)])
    model.log_likelihood = lambda prompts, labels: expected[:len(prompts)]
    model.generate = lambda prompts, *_, **__: zip(*[answer + [None] * 99 for answer in samples.answers], strict=False)
    assert samples.right(model) == labels.right(model) == 6


def test_best_by_picks_the_star_of_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "train_loss": 1.0, "learning_rate": 1.0, "tokens": 9, "val_loss": loss, "val_score": score}
            for step, loss, score in ((1, 0.5, 0.1), (2, 0.7, 0.9), (3, 0.6, 0.9))]
    for row in rows:
        report.append_row(tmp_path / "log.csv", row, sync=False)
    labels = []
    monkeypatch.setattr(pictures, "write", lambda drawn, _: labels.extend(drawn.axes[0].get_legend_handles_labels()[1]))
    pictures.plot_losses(tmp_path)
    pictures.plot_losses(tmp_path, "exact")
    assert [label for label in labels if "best" in label] == ["best: 0.5000 at step 1", "best: 0.6000 at step 3"]


@pytest.mark.parametrize("vocab_size", [257, 300])  # 300: padded
def test_results_load_in_transformers_and_carry_their_ids_and_wording(vocab_size, fit, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "plot_losses", fit.plot)
    tiny(block_size=128, vocab_size=vocab_size, eos_token_id=vocab_size - 1).save_pretrained(tmp_path / "start")
    with stop_after(2), pytest.raises(SystemExit):
        fit(init_from=str(tmp_path / "start"), max_steps=3)
    out_dir, idx = tmp_path / "out", torch.arange(40)[None]
    assert equal(weights(out_dir), masters(out_dir))  # an interrupted run leaves some, too
    state = fit(resume=True)
    assert fit(resume=True, epochs=50).step == 3
    assert "nothing to do: raise what ended the run" in capsys.readouterr().out
    assert {path.name for path in out_dir.iterdir()} == {"ckpt.pt", "log.csv", "best", "last", "loss.png"}
    for directory in (out_dir / "best", out_dir / "last"):
        assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors", "prompt.json"}
        theirs, ours = transformers.GPT2LMHeadModel.from_pretrained(directory).eval(), GPT.from_pretrained(directory)
        assert torch.allclose(ours.eval()(idx), theirs(idx).logits, atol=1e-5)
        config = theirs.config
        assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (vocab_size, 256, 256)
        assert json.loads((directory / "prompt.json").read_text())["template"] == "chat"
    log = rows(out_dir)
    assert ",".join(log[0]) == ("step,epoch,train_loss,val_loss,learning_rate,grad_norm,tokens,supervised_tokens,"
                                "seconds,val_score")
    assert [bool(row["val_loss"]) for row in log] == [False, False, True]
    assert column(out_dir, "train_loss")[2] == pytest.approx(state.train_loss, rel=1e-7)  # eight digits
    assert column(out_dir, "val_loss") == pytest.approx([state.val_loss], rel=1e-7)


def test_a_log_or_picture_that_somebody_spoils_ends_no_run(fit, tmp_path, monkeypatch, capsys):
    out_dir, real = tmp_path / "out", train.evaluate

    def spoil(*args):
        (out_dir / "log.csv").unlink(missing_ok=True)
        (out_dir / "loss.png").mkdir(exist_ok=True)
        return real(*args)
    monkeypatch.setattr(pictures, "plot_losses", fit.plot)
    monkeypatch.setattr(train, "evaluate", spoil)
    assert fit(max_steps=4).step == 4 and "warning: no loss.png (" in capsys.readouterr().out
    assert [row["step"] for row in report.read_rows(out_dir / "log.csv")] == [4]
    assert fit(resume=True, max_steps=5).step == 5


# ---- scripts, flags, errors -----------------------------------------------------------------------------------------

def test_eight_examples_come_out_word_for_word(fit, tmp_path, data, capsys):
    """prepare, train and sample end to end: overfitted answers are exact, and the model stops by itself."""
    assert fit(max_examples=8, max_steps=150, batch_size=8, learning_rate=5e-3, n_embd=64).train_loss < 0.01
    shards, encoding = Shards(data, load_meta(data), "train", 8), get_encoding("bytes")
    asked = [encoding.decode(tokens["id"].tolist()).split("\n")[1].split("<|")[0] for tokens in shards]
    file = write_lines(tmp_path / "eight.jsonl", [one for one in colour_records(80) if one["instruction"] in asked])
    score = sample.main(sample.SampleConfig(model=str(tmp_path / "out" / "last"), file=str(file), batch_size=3,
                                            output=str(tmp_path / "answers.jsonl"), device="cpu", dtype="float32"))
    assert score == {"records": 8, "scored": 8, "exact": 8}
    assert capsys.readouterr().out.endswith("exact match 8/8 (100.0 %)\n")
    answered = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert all(record["response"] == record["output"] for record in answered)


def test_a_copy_of_train_py_trains_from_any_directory_and_with_closed_streams(data, tmp_path):
    shutil.copytree(ROOT / "nanosft", tmp_path / "fork" / "nanosft")
    for name, copy in (("model.py", "model.py"), ("train.py", "my_train.py")):
        shutil.copy(ROOT / name, tmp_path / "fork" / copy)
    command = f"{sys.executable} fork/my_train.py --data_dir={data} --n_layer=1 --max_steps=2 --device=cpu <&- >&-"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert len(rows(tmp_path / "out")) == 2 and (tmp_path / "out" / "best" / "model.safetensors").exists()


@pytest.mark.parametrize("words, code, message", [
    ("--learning-rat=1", 2, "unknown flag '--learning_rat': did you mean --learning_rate?"),
    ("--epochs=many", 2, "--epochs: invalid float value: 'many'"),
    ("config.py", 2, "unknown argument 'config.py': did you mean --data_dir=config.py?"),
    ("--max-iters=5", 2, "unknown flag '--max_iters': did you mean --max_steps?"),
    ("--block-size=64", 2, "unknown flag '--block_size': prepare_data.py has --block_size"),
    ("--max_seq_length=64", 2, "unknown flag '--max_seq_length': prepare_data.py has --block_size"),
    ("--temp=1", 2, "unknown flag '--temp': --help lists the flags"),
    ("--out_dir -x", 2, "--out_dir: expected one argument; write --name=value"),
    ("--dropout=1.5 --lr_schedule=step", 2, "--dropout: 1.5 is not in [0, 1); --lr_schedule: 'step' is none of"),
    ("--n_embd=2000000000 --n_head=1", 1, "error: there is not enough memory")])
def test_wrong_flags_end_in_one_line_and_an_exit_code(words, code, message, data, tmp_path, monkeypatch, capsys):
    flags = ["--device=cpu", f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}"] if code == 1 else []
    monkeypatch.setattr("sys.argv", ["train.py", *words.split(), *flags])
    monkeypatch.setattr(flags_module, "protect_output", lambda: None)
    with pytest.raises(SystemExit) as left:
        flags_module.run(train.main, TrainConfig)
    out, err = capsys.readouterr()
    assert left.value.code == code and out == "" and len(err.splitlines()) == 1 and message in err


def test_flags_are_read_in_every_spelling_and_others_names_are_known():
    config = parse_config(TrainConfig, ["--max-steps", "5", "--resume", "--dropout=0", "--overwrite=False"])
    assert (config.max_steps, config.resume, config.dropout, config.overwrite) == (5, True, 0.0, False)
    assert config.given == {"max_steps", "resume", "dropout", "overwrite"}
    assert parse_config(TrainConfig, ["--out_dir=~/x"]).out_dir == os.path.expanduser("~/x")
    kinds = TrainConfig, prepare_data.PrepareConfig, sample.SampleConfig
    for name, ours in ELSEWHERE.items():
        assert any(ours in kind.__dataclass_fields__ and name not in kind.__dataclass_fields__ for kind in kinds), name


def test_values_from_python_take_their_fields_types_or_are_refused(fit, data, tmp_path):
    fit(out_dir=tmp_path / "out", data_dir=data, max_steps=6e0, batch_size=np.int64(4), learning_rate=np.float64(1e-3),
        dropout=np.float32(0.125))
    assert train.main(TrainConfig(resume=True, out_dir=tmp_path / "out", max_steps=8)).step == 8
    for values in dict(max_steps=2.5), dict(max_minutes=None), dict(lora_targets=["c_attn"]), dict(resume="yes"):
        with pytest.raises(UserError, match=f"--{next(iter(values))}: .* is no (int|float|str|bool)$"):
            TrainConfig(**values)
    with pytest.raises(UserError, match="--epochs: nan is no number below 2.31; --seed: -1 is below 0; --overwrite"):
        TrainConfig(epochs=math.nan, seed=-1, overwrite=True, resume=True)


def test_wrong_use_gets_one_line_with_the_remedy(fit, data, tmp_path):
    fit("done", max_steps=2)
    done, long, meta = str(tmp_path / "done"), str(tmp_path / "long"), load_meta(data)
    for name, numbers in (("other", dict(vocab_size=999)), ("short", dict(block_size=16)), ("middle", {}),
                          ("whole", dict(block_size=128))):
        tiny(**numbers).save_pretrained(tmp_path / name)
    tiny(block_size=128).add_lora(4, 8.0, 0.0, []).save_adapter(tmp_path / "adapter", str(tmp_path / "whole"))
    shutil.copytree(data, long)  # its longest validation example is longer than any for training
    write_meta(long, {**meta, "train": {**meta["train"], "longest": 40}, "val": {**meta["val"], "longest": 90}})
    own = shutil.copytree(data, str(tmp_path / "own"))
    write_meta(own, {**meta, "model": "m"})
    based = shutil.copytree(data, str(tmp_path / "based"))  # prepared for what the run would clear
    write_meta(based, {**meta, "model": f"{done}/best"})
    before = sorted(tmp_path.rglob("*"))
    for message, out, flags in (
            ("best, from which the run starts: name another", "done", dict(init_from=f"{done}/best", overwrite=True)),
            ("from which the run starts: name another$", "done", dict(init_from=done, overwrite=True)),
            ("best, from which the run starts: name another", "done", dict(data_dir=based, overwrite=True)),
            ("--out_dir=.*whole holds .*whole, from which the run", "whole", dict(init_from=str(tmp_path / "whole"))),
            ("--out_dir=.*based holds prepared data: name another directory", "based", {}),
            ("--init_from=gpt2 needs GPT-2's encoding", "done", dict(init_from="gpt2", overwrite=True)),
            ("no model 'nowhere'", "done", dict(init_from="nowhere", overwrite=True)),
            ("data in nowhere; run python prepare_data.py first$", "done", dict(data_dir="nowhere", overwrite=True)),
            (f"prepare_data.py first, or name {based}, {long}, {own}$", "new", dict(data_dir=f"{own}er")),
            ("=gpt2 needs .*: leave it out to start from m, which", "new", dict(init_from="gpt2", data_dir=own)),
            ("has 999 token ids", "new", dict(init_from=str(tmp_path / "other"))),
            ("a context of 16 tokens, the longest example", "new", dict(init_from=str(tmp_path / "short"))),
            ("64 tokens, the longest example 90", "new", dict(init_from=str(tmp_path / "middle"), data_dir=long)),
            ("n_embd=33 is no multiple of n_head=2", "done", dict(n_embd=33, overwrite=True)),
            ("--device=tpu9: .*; try --device=cpu", "done", dict(device="tpu9", overwrite=True)),
            ("--lora_rank needs weights to adapt: name them with --i", "done", dict(lora_rank=4, overwrite=True)),
            ("is itself a LoRA adapter: make it plain weights first with .*--export=DIRECTORY", "new",
             dict(init_from=str(tmp_path / "adapter"), lora_rank=4)),
            ("--lora_targets: 'q_proj' names no layer; this model's are c_attn, c_fc, c_proj", "new",
             dict(init_from=str(tmp_path / "whole"), lora_rank=4, lora_targets="q_proj")),
            ("data are not in gone; say with --data_dir", "done", dict(resume=True, data_dir="gone")),
            (r"drop --dtype=bfloat16 \(it ran with float32\)", "done", dict(resume=True, dtype="bfloat16")),
            (r"drop --batch_size=5 \(it ran with 4\)", "done", dict(resume=True, batch_size=5))):
        with pytest.raises((UserError, OSError), match=message) as caught:
            fit(out, **flags)
        assert "\n" not in str(caught.value) and sorted(tmp_path.rglob("*")) == before, message  # nothing comes or goes


def test_what_another_script_wrote_is_called_that_and_the_dtype_that_was_found_may_be_named(fit, tmp_path):
    fit(max_steps=2, dtype="auto")
    content = checkpoint(tmp_path / "out")
    assert fit(resume=True, max_steps=3, dtype=content["values"]["dtype"]).step == 3
    content["values"]["config"]["warp"] = 9
    torch.save({**content, "checksum": crc32_of_json(content["values"])}, tmp_path / "out" / "ckpt.pt")
    with pytest.raises(UserError, match="by this script .it has the settings warp.; go on with the one that wrote"):
        fit(resume=True)


@pytest.mark.parametrize("file", ["tokenizer.json", "vocab.json"])
def test_a_gpt2_with_a_vocabulary_of_its_own_is_not_taken_for_openais(file, fit, prepare, tmp_path, gpt2_encoding):
    base, data = tmp_path / "base", str(prepare(colour_records(30), encoding="gpt2"))
    tiny(vocab_size=50257, block_size=256).save_pretrained(base)
    for vocabulary, is_ours in (({"\u0120the": 262}, True), ({"\u0120the": 263}, False), ({"a": 262}, False)):
        values = vocabulary if file == "vocab.json" else {"model": {"vocab": vocabulary}}
        (base / file).write_text(json.dumps(values))
        flags = dict(data_dir=data, init_from=str(base), max_steps=1, overwrite=True)
        if is_ours:
            fit(**flags)
        else:
            with pytest.raises(UserError, match="a vocabulary of its own, .*: prepare the data with --model="):
                fit(**flags)
            if file == "vocab.json":
                with pytest.raises(UserError, match="a vocabulary of its own, .*: ask it alone, with its tokenizer"):
                    sample.main(sample.SampleConfig(model=str(base), device="cpu", prompt="x"))
    if file == "vocab.json":
        with pytest.raises(UserError, match="has no tokenizer.json; put the model's beside its weights"):
            prepare(colour_records(30), model=str(base), encoding="")


def test_a_log_that_somebody_has_edited_loses_no_row(fit, tmp_path):
    fit(max_steps=4)
    log = tmp_path / "out" / "log.csv"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], "", *lines[3:]]))  # a blank line, and no end of the last one
    fit(resume=True, max_steps=6)
    assert column(tmp_path / "out", "step") == [1, 2, 3, 4, 5, 6]


def test_rows_stand_under_the_names_of_the_log_whoever_began_it(fit, tmp_path):
    fit(max_steps=2)
    log = tmp_path / "out" / "log.csv"
    names, *lines = log.read_text().splitlines()
    log.write_text("\n".join([f"noise,{names}", *(f"{line.split(',')[0]},{line}" for line in lines)]) + "\n")
    fit(resume=True, max_steps=4)  # by a script that has no such column
    steps = rows(tmp_path / "out")
    assert [row["step"] for row in steps] == ["1", "2", "3", "4"] and steps[3]["noise"] == "" != steps[1]["noise"]
    assert float(steps[3]["learning_rate"]) < 1 and steps[3].keys() == {"noise", *names.split(",")}


def test_a_tokenizer_beside_the_weights_is_replaced_wholly_or_not_at_all(tmp_path, monkeypatch):
    for name, text in (("source", "new"), ("target", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(text)

    def fail(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        copy_tokenizer(tmp_path / "source", tmp_path / "target", {"template": "model"})
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "old"
    assert len(list((tmp_path / "target").iterdir())) == 1


def test_a_link_in_the_place_of_best_is_unlinked_by_overwrite(fit, tmp_path):
    fit(max_steps=2)
    (tmp_path / "out" / "best").rename(tmp_path / "kept")
    (tmp_path / "out" / "best").symlink_to(tmp_path / "kept")
    fit(max_steps=2, overwrite=True, seed=7)
    assert (tmp_path / "kept" / "model.safetensors").exists() and not (tmp_path / "out" / "best").is_symlink()


def test_what_goes_on_with_a_fork_is_the_fork(monkeypatch, capsys):
    monkeypatch.setattr(train, "__file__", "/somewhere/my train.py")
    with pytest.raises(SystemExit):
        train.say_what_follows(TrainConfig(), train.RunState(step=3), signal.SIGTERM, False)
    assert capsys.readouterr().out.endswith("go on with: python 'my train.py' --resume\n")


def test_answers_in_training_stop_at_the_context_and_show_no_template(data, capsys):
    samples = report.Samples(Shards(data, load_meta(data), "train"), get_encoding("bytes"), 256, count=5)
    longest = max(map(len, samples.prompts))
    model = tiny(block_size=longest)
    samples.show(model, "here", at_start=True)
    right = get_encoding("bytes").decode(samples.answers[0][:-1])
    shown = capsys.readouterr().out
    assert re.findall(r"right: '(.*)'", shown) == [report.shorten(right, 58)] and shown.count("->") == 1
    samples.show(model, "here")
    assert capsys.readouterr().out.count("->") == 5
    answers = samples.answer(model, samples.prompts, 40)
    assert [len(answer) for answer in answers] == [min(40, longest - len(prompt) + 1) for prompt in samples.prompts]
    texts = [f"Below is a task.\n\n### Do:\nname {i}\n### Say:\n{i}<|endoftext|>" for i in range(20)]
    assert report.without_template(texts)[:2] == ["name 0 0", "name 1 1"]


def test_wandb_gets_the_usual_names_and_ends_no_run(fit, tmp_path, monkeypatch, capsys):
    seen, module = [], SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", module)
    module.init = lambda **flags: SimpleNamespace(log=lambda numbers, step: seen.append((step, set(numbers))))
    fit(wandb=True)
    usual = {"train/loss", "lr", "grad_norm", "tokens_per_second"}
    assert seen[:3] == [(1, usual), (2, usual), (3, usual | {"val/loss", "val/score"})] and len(seen) == 6
    module.init = lambda **flags: SimpleNamespace(log=lambda numbers, step: 1 / 0)
    assert fit("broken", wandb=True).step == 6
    assert "warning: Weights & Biases failed at step 1" in capsys.readouterr().out
    del module.init  # as if nobody were logged in
    with pytest.raises(UserError, match="--wandb: .*init.*pip install wandb"):
        fit(wandb=True, overwrite=True)
    assert len(rows(tmp_path / "out")) == 6  # nothing is cleared


# ---- flags reach what they name -------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [
    dict(beta1=0.5), dict(beta2=0.5), dict(weight_decay=0.0), dict(min_lr=1e-3), dict(dropout=0.5),
    dict(warmup_ratio=0.5), dict(lr_schedule="constant"), dict(grad_clip=0.01)], ids=str)
def test_a_flag_changes_the_weights(flags, fit, tmp_path):
    for name, more in (("plain", {}), ("other", flags)):
        fit(name, eval_interval=0, **more)
    assert not same_weights(tmp_path / "plain", tmp_path / "other")


@pytest.mark.parametrize("flag, common", [
    ("dropout", {}), ("dropout", dict(lora_rank=4, learning_rate=1e-2)),
    ("lora_dropout", dict(lora_rank=4, learning_rate=1e-2))])
def test_dropout_of_weights_that_are_loaded(flag, common, fit, tmp_path):
    tiny(block_size=128).save_pretrained(tmp_path / "base")
    one, other = (fit(overwrite=True, init_from=str(tmp_path / "base"), eval_interval=0, **common, **{flag: share})
                  for share in (0.0, 0.5))
    assert one.train_loss != other.train_loss


def test_defaults_follow_what_training_begins_with():
    rates = [train.peak_of(TrainConfig(lora_rank=rank), {"name": name})
             for rank, name in ((0, "scratch"), (0, "gpt2"), (4, "gpt2"))]
    steps = [train.planned_steps(TrainConfig(batch_size=8), 81, scratch) for scratch in (True, False)]
    assert rates == [2e-3, 5e-5, 2e-4] and steps == [88, 22]


def test_the_seed_decides_weights_order_and_dropout_and_max_examples_the_first(data, fit, tmp_path, monkeypatch):
    shards = Shards(data, load_meta(data), "train")
    assert examples_of_step(1, shards, 8, 1).tolist() != examples_of_step(1, shards, 8, 2).tolist()
    one, two = (train.set_up(TrainConfig(**{**BASE, "data_dir": str(data), "out_dir": str(tmp_path / "x"), "seed": seed,
                                            "max_examples": 2}), torch.device("cpu")) for seed in (1, 2))
    assert not torch.equal(one.model.wte.weight, two.model.wte.weight)
    assert len(one.data) == 2 and all(np.array_equal(one.data[i], shards[i]) for i in range(2))
    assert len(one.val) == load_meta(data)["val"]["examples"] > 2
    real, seeds = train.accumulate, set()
    monkeypatch.setattr(train, "accumulate", lambda *args: seeds.add(torch.initial_seed()) or real(*args))
    fit(eval_interval=0)
    assert len(seeds) == 6  # one a step


def test_what_a_resumed_run_may_change_to_fit_into_memory(fit):
    fit(max_steps=2)
    flags = dict(micro_batch_tokens=100, gradient_checkpointing=True, eval_interval=1, save_interval=1, log_interval=1)
    assert fit(resume=True, max_steps=4, **flags).step == 4


def test_a_context_as_long_as_the_longest_example_will_do(fit, data, tmp_path):
    longest = max(load_meta(data)[split]["longest"] for split in ("train", "val"))
    for size in (longest - 1, longest - 2):  # the last token of an example is a target alone
        tiny(block_size=size).save_pretrained(tmp_path / str(size))
    assert fit("a", init_from=str(tmp_path / str(longest - 1)), max_steps=1).step == 1
    with pytest.raises(UserError, match="a context of"):
        fit("b", init_from=str(tmp_path / str(longest - 2)), max_steps=1)


# ---- steps that fail ------------------------------------------------------------------------------------------------

def test_memory_may_run_out_at_a_later_step(fit, data, monkeypatch):
    longest, calls, real = int(Shards(data, load_meta(data), "train").lengths.max()), [], train.accumulate

    def hungry(model, optimizer, batches, supervised):
        calls.append(max(max(lengths) for _, _, lengths in batches))
        if calls[-1] < longest and sum(length < longest for length in calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, optimizer, batches, supervised)
    monkeypatch.setattr(train, "accumulate", hungry)
    assert fit(micro_batch_tokens=1, eval_interval=0, batch_size=2).step == 6 and len(calls) == 7


def test_skipped_steps_end_a_run_only_in_a_row_and_are_not_saved(fit, tmp_path, monkeypatch):
    real, calls = train.accumulate, itertools.count()
    monkeypatch.setattr(train, "accumulate", lambda *args: real(*args) * (math.nan if next(calls) % 2 else 1))
    assert fit("some", max_steps=24, eval_interval=0).step == 24
    fit(max_steps=1, eval_interval=0, overwrite=True)
    monkeypatch.setattr(train, "accumulate", lambda *args: real(*args) * math.nan)
    with pytest.raises(UserError, match="ten steps in a row"):
        fit(max_steps=20, resume=True, save_interval=1)
    assert checkpoint(tmp_path / "out")["values"]["state"]["step"] == 1


def test_an_evaluation_drops_nothing_and_its_time_counts(data, fit, clock):
    shards = Shards(data, load_meta(data), "train")
    one, other = (train.evaluate(tiny(block_size=128, dropout=share), shards, 900) for share in (0.0, 0.5))
    assert one == other
    ours = clock(1.0, evaluation=10.0)
    assert fit(eval_interval=0).elapsed == ours.now - 1000


def test_the_first_answer_of_a_conversation_is_what_is_counted(prepare):
    said = [dict(role=role, content=text) for role, text in zip(["user", "assistant"] * 2, "qamb", strict=True)]
    data = prepare([{"messages": said}], template="chat", val_fraction=0, test_fraction=0)
    samples = report.Samples(Shards(data, load_meta(data), "train"), get_encoding("bytes"), 256, by="exact", scored=9)
    assert samples.answers == [[*b"a", 256]]
