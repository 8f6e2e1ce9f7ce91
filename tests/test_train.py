"""train.py: its numbers against transformers and torch, its steps, checkpoints and messages."""
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, colour_records, randomise, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data
import sample
import train
import watch
from config import ELSEWHERE, parse_config
from console import UserError
from cpu import SlicedAdamW
from dataset import Shards, examples_of_step, load_meta, micro_batches
from model import GPT, IGNORE, optimizer_groups
from prepare_data import get_encoding
from train import TrainConfig, gradients, learning_rate_at

BASE = dict(n_layer=2, n_head=2, n_embd=32, device="cpu", dtype="float32", compile="off", max_steps=6, eval_interval=3,
            batch_size=4, hardest=0)
NO_SCALER = torch.amp.GradScaler(enabled=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in colour_records(80)))
    prepare_data.main(prepare_data.PrepareConfig(input=str(path / "records.jsonl"), out_dir=str(path / "prepared"),
                                                 encoding="bytes", template="chat", block_size=128, show=0))
    return path / "prepared"


@pytest.fixture
def fit(data, tmp_path):
    """fit(**flags) -> what train.main returns, in a fresh out_dir or the one named."""
    def run(out="out", **flags):
        settings = {**(BASE if "resume" not in flags else {}), "data_dir": str(data), "out_dir": str(tmp_path / out)}
        return train.main(TrainConfig(**{**settings, **flags}))
    return run


def checkpoint(path):
    return torch.load(path / "ckpt.pt", weights_only=True)


def rows(path):
    with open(path / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def same_weights(a, b):
    a, b = checkpoint(a)["model"], checkpoint(b)["model"]
    return all(torch.equal(a[name], b[name]) for name in a)


# ---- the step -------------------------------------------------------------------------------------------------------

def gradients_of(model, shards, groups):
    model.zero_grad()
    batches = [shards.batch(group) for group in groups]
    supervised = sum(int((targets != IGNORE).sum()) for _, targets, _ in batches)
    loss = gradients(model, NO_SCALER, batches, supervised)
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def test_accumulation_does_not_matter(data):
    """The same 8 examples of unequal answer lengths as 1 x 8, 4 x 2, 8 x 1 and by length."""
    shards, model = Shards(data, load_meta(data), "train"), tiny(block_size=128).double()
    indices = examples_of_step(0, len(shards), 8, 0)
    counts = [int(shards.batch([i])[1].ne(IGNORE).sum()) for i in indices]
    assert len(set(counts)) >= 3
    (loss, grads), *others = (gradients_of(model, shards, groups) for groups in (
        [indices], indices.reshape(4, 2), indices.reshape(8, 1), micro_batches(indices, shards.lengths, 128)))
    for other_loss, other_grads in others:
        assert other_loss == pytest.approx(loss, rel=1e-12)
        for one, other in zip(grads, other_grads, strict=True):
            assert (one - other).norm() <= 1e-11 * one.norm()


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
    result = fit(init_from=str(tmp_path / "start"), dtype=dtype, max_steps=20, learning_rate=1e-3, weight_decay=0.1,
                 grad_clip=0.5, batch_size=8, micro_batch_tokens=300, warmup_steps=3, lr_schedule="linear", seed=5,
                 epochs=10)
    theirs = theirs.train().to(getattr(torch, dtype))
    losses = plain_loop(theirs, Shards(data, load_meta(data), "train"), 20, 8, 5,
                        lambda step: learning_rate_at(step, step / 20, 1e-3, 0, "linear", 3, 20), 0.1, 0.5)
    ours = [float(row["train_loss"]) for row in rows(tmp_path / "out")]
    assert result["step"] == 20 and ours == pytest.approx(losses, rel=2e-7 if dtype == "float64" else 1e-5)
    if dtype == "float64":
        weights, state = checkpoint(tmp_path / "out")["model"], theirs.transformer.state_dict()
        for name, weight in weights.items():
            transposed = any(part in name for part in ("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            expected = state[name].t() if transposed else state[name]
            assert (weight - expected).abs().max() < 1e-9, name


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60), st.integers(90, 400))
def test_packing_ends_and_places_every_example_once_within_the_budget(lengths, budget):
    groups = micro_batches(range(len(lengths)), lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) * max(lengths[i] for i in group) <= budget for group in groups)
    assert max(lengths) == lengths[groups[0][0]]  # the longest goes first


def test_every_epoch_holds_every_example_once_and_the_last_step_what_is_left():
    steps = [examples_of_step(step, 7, 4, seed=3).tolist() for step in range(4)]
    assert [len(step) for step in steps] == [4, 3, 4, 3]
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(7))
    assert steps[0] + steps[1] != steps[2] + steps[3]


def test_a_partial_last_step_is_normalised_by_its_own_tokens(fit, tmp_path, data):
    fit(max_examples=7, max_steps=0, epochs=1, batch_size=4, eval_interval=0)
    log = rows(tmp_path / "out")
    shards = Shards(data, load_meta(data), "train", 7)
    assert [int(row["step"]) for row in log] == [1, 2]
    assert sum(int(row["tokens"]) for row in log) == shards.lengths.sum()
    assert sum(int(row["supervised_tokens"]) for row in log) == sum(
        int(shards.batch([i])[1].ne(IGNORE).sum()) for i in range(7))
    assert log[1]["epoch"] == "1.0000"
    assert float(log[1]["train_loss"]) == pytest.approx(math.log(257), rel=0.05)  # a mean, whatever the count


def test_evaluation_does_not_depend_on_the_batch_size(data):
    shards, model = Shards(data, load_meta(data), "train"), tiny(block_size=128)
    alone = [train.evaluate(model, shards, budget) for budget in (90, 270, 5000)]
    total = count = 0
    with torch.no_grad():
        for i in range(len(shards)):
            idx, targets, _ = shards.batch([i])
            total += torch.nn.functional.cross_entropy(model(idx[None])[0], targets, ignore_index=IGNORE,
                                                       reduction="sum").item()
            count += int((targets != IGNORE).sum())
    assert alone == pytest.approx([total / count] * 3, rel=1e-6) and model.training


def test_learning_rates_are_the_textbooks():
    def rates(schedule, warmup=4, total=20):
        return [learning_rate_at(step, step / total, 1.0, 0.1, schedule, warmup, total) for step in range(total + 1)]
    for schedule in ("cosine", "linear", "constant"):
        assert rates(schedule)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates("cosine")[12] == pytest.approx(0.55) and rates("cosine")[20] == pytest.approx(0.1)
    assert rates("cosine")[8] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert rates("linear")[12] == pytest.approx(0.55) and rates("linear")[20] == pytest.approx(0.1)
    assert rates("constant")[4:] == [1.0] * 17
    assert learning_rate_at(0, 0, 1.0, 0, "cosine", 0, 1) == 1.0


def test_matrices_decay_and_biases_and_norms_do_not():
    model = tiny()
    decayed, free = (set(map(id, group["params"])) for group in optimizer_groups(model, 0.1))
    for name, parameter in model.named_parameters():
        matrix = name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_proj.weight", "c_fc.weight"))
        assert (id(parameter) in decayed, id(parameter) in free) == (matrix, not matrix)


# ---- precision and compile ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(dtype, fit, tmp_path):
    exact, half = fit("exact", max_steps=20), fit("half", max_steps=20, dtype=dtype)
    assert half["train_loss"] == pytest.approx(exact["train_loss"], rel=0.02) and half["train_loss"] < 5.2
    assert all(p.dtype == torch.float32 for p in checkpoint(tmp_path / "half")["model"].values())


def test_an_overflow_lowers_the_scale_and_leaves_the_weights(fit, tmp_path, monkeypatch):
    fit("start", max_steps=1, dtype="float16", lr_schedule="constant", eval_interval=0)
    real = train.gradients

    def overflowing(model, scaler, batches, supervised):
        loss = real(model, scaler, batches, supervised)
        if scaler.is_enabled() and next(model.parameters()).grad is not None:
            calls.append(1)
            if len(calls) == 2:
                next(model.parameters()).grad[0, 0] = math.inf
        return loss
    calls = []
    monkeypatch.setattr(train, "gradients", overflowing)
    fit("start", max_steps=2, resume=True, device="cpu")
    calls = [1]  # the next step overflows
    before = checkpoint(tmp_path / "start")
    fit("start", max_steps=3, resume=True)
    log = rows(tmp_path / "start")
    assert log[-1]["grad_norm"] in ("inf", "nan") and [row["step"] for row in log] == ["1", "2", "3"]
    last = GPT.from_pretrained(tmp_path / "start" / "last").state_dict()
    assert all(torch.equal(last[name], weight) for name, weight in before["model"].items())
    assert checkpoint(tmp_path / "start")["step"] == 3  # the last step counts, skipped or not


def test_a_loss_that_is_not_finite_skips_the_step_and_ten_in_a_row_stop(fit, tmp_path, monkeypatch):
    fit("start", max_steps=2, eval_interval=1)
    before = checkpoint(tmp_path / "start")["model"]
    monkeypatch.setattr(train, "gradients", lambda model, *_: model.wte.weight.mul(math.nan).sum().backward()
                        or torch.tensor(math.nan))
    with pytest.raises(UserError, match="ten steps in a row.*--learning_rate"):
        fit("start", max_steps=50, resume=True, eval_interval=0)
    assert len(rows(tmp_path / "start")) == 12
    after = checkpoint(tmp_path / "start")["model"]
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 5e-3)])
def test_compiling_the_blocks_changes_nothing(dtype, tolerance, fit, tmp_path, capsys):
    for name, flags in (("eager", {}), ("compiled", {"compile": "on"})):
        fit(name, dtype=dtype, eval_interval=2, learning_rate=2e-2, lr_schedule="constant", **flags)
    eager, compiled = ([float(row[column]) for row in rows(tmp_path / name) for column in ("train_loss", "val_loss")
                        if row[column]] for name in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, rel=tolerance) and len(set(eager)) > 6
    assert "does not work" not in capsys.readouterr().out


def test_where_compiling_fails_the_run_goes_on_in_eager(fit, monkeypatch, capsys):
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    eager = fit("eager")

    def broken(self, *args, **options):
        def call(*_, **__):
            raise RuntimeError("no compiler on this platform")
        self._compiled_call_impl = call
    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    assert fit("broken", compile="on")["train_loss"] == eager["train_loss"]
    assert "torch.compile does not work here (RuntimeError); going on without it" in capsys.readouterr().out


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@contextmanager
def stop_after(steps):
    """SIGINT while step `steps` runs."""
    real = train.examples_of_step

    def counted(step, *rest):
        if step + 1 == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(step, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "examples_of_step", counted)
        yield


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(stop, fit, tmp_path):
    flags = dict(dropout=0.1, epochs=3, max_steps=0, max_examples=9, save_interval=1)
    straight = fit("straight", **flags)
    with stop_after(stop), pytest.raises(SystemExit) as left:
        fit("parts", **flags)
    assert left.value.code == 130
    assert checkpoint(tmp_path / "parts")["step"] == stop
    resumed = fit("parts", resume=True)
    assert {**resumed, "seconds": 0} == {**straight, "seconds": 0}
    assert same_weights(tmp_path / "straight", tmp_path / "parts")
    one, other = ([{**row, "seconds": ""} for row in rows(tmp_path / name)] for name in ("straight", "parts"))
    assert one == other and len(one) == straight["step"] == 9


def test_best_is_the_lowest_validation_loss_and_never_nan(fit, tmp_path, monkeypatch):
    flags = dict(lr_schedule="constant", warmup_ratio=0, eval_interval=1, max_steps=4)
    fit("two", **{**flags, "max_steps": 2})
    losses = iter([3.0, 2.0, 4.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    result = fit("four", **flags)
    assert result["best_val_loss"] == 2.0 and math.isnan(result["val_loss"])
    assert [row["val_loss"] for row in rows(tmp_path / "four")] == ["3", "2", "4", "nan"]
    best = GPT.from_pretrained(tmp_path / "four" / "best").state_dict()
    expected = GPT.from_pretrained(tmp_path / "two" / "last").state_dict()
    assert all(torch.equal(best[name], expected[name]) for name in best)


def test_results_load_in_transformers_and_carry_the_prompts_wording(fit, tmp_path, data):
    fit()
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"ckpt.pt", "log.csv", "best", "last", "loss.png"}
    for name in ("best", "last"):
        assert {path.name for path in (tmp_path / "out" / name).iterdir()} == {"config.json", "model.safetensors",
                                                                              "prompt.json"}
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out" / name).eval()
        ours = GPT.from_pretrained(tmp_path / "out" / name).eval()
        idx = torch.arange(40)[None]
        assert torch.allclose(ours(idx), theirs(idx).logits, atol=1e-5)
    assert json.loads((tmp_path / "out" / "best" / "prompt.json").read_text())["template"] == "chat"
    assert list(rows(tmp_path / "out")[0]) == watch.COLUMNS


def test_without_validation_data_best_is_last(fit, prepare, tmp_path):
    bare = prepare(colour_records(20), val_fraction=0)
    fit(data_dir=str(bare))
    best, last = (GPT.from_pretrained(tmp_path / "out" / name).state_dict() for name in ("best", "last"))
    assert all(torch.equal(best[name], last[name]) for name in best)


def test_time_ends_a_run_with_the_learning_rate_at_its_end(fit, tmp_path, monkeypatch):
    real = train.gradients
    monkeypatch.setattr(train, "gradients", lambda *args: time.sleep(0.05) or real(*args))
    result = fit(max_steps=0, epochs=10_000, max_minutes=1 / 60, eval_interval=0)
    log = rows(tmp_path / "out")
    assert 5 <= result["step"] <= 20 and len(log) == result["step"]
    assert float(log[-1]["learning_rate"]) < 0.1 * 1e-3 and log[-1]["val_loss"]


# ---- the three scripts ----------------------------------------------------------------------------------------------

def test_eight_examples_come_out_word_for_word(fit, tmp_path, data, capsys):
    """prepare, train and sample end to end: overfitted answers are exact, and the model stops by itself."""
    result = fit(max_examples=8, max_steps=150, batch_size=8, learning_rate=5e-3, n_embd=64, eval_interval=0)
    assert result["train_loss"] < 0.01
    shards, encoding = Shards(data, load_meta(data), "train", 8), get_encoding("bytes")
    records = {record["instruction"]: record for record in colour_records(80)}
    learned = [records[encoding.decode(tokens["id"].tolist()).split("\n")[1].split("<|")[0]] for tokens in shards]
    (tmp_path / "eight.jsonl").write_text("".join(json.dumps(record) + "\n" for record in learned))
    score = sample.main(sample.SampleConfig(model=str(tmp_path / "out" / "last"), file=str(tmp_path / "eight.jsonl"),
                                            output=str(tmp_path / "answers.jsonl"), batch_size=3, device="cpu"))
    assert score == {"records": 8, "scored": 8, "exact": 8}
    assert capsys.readouterr().out.endswith("exact match 8/8 (100.0 %)\n")
    answered = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["response"] for record in answered] == [record["output"] for record in learned]


# ---- errors ---------------------------------------------------------------------------------------------------------

def test_wrong_use_gets_one_line_with_the_remedy(fit, data, tmp_path):
    fit("done")
    cases = [
        (dict(out="done"), "holds a run already: go on with --resume, replace it with --overwrite"),
        (dict(data_dir=str(tmp_path / "nowhere")), "--data_dir: no prepared data in .*prepare_data.py"),
        (dict(init_from="gpt2"), "--init_from=gpt2 needs GPT-2's encoding"),
        (dict(init_from="nowhere"), "no model 'nowhere'"),
        (dict(micro_batch_tokens=10), "--micro_batch_tokens=10 is below the longest example"),
        (dict(n_embd=33), "n_embd=33 is no multiple of n_head=2"),
        (dict(device="tpu9"), "--device=tpu9"),
        (dict(out="none", resume=True), "--resume: .*ckpt.pt is not there"),
        (dict(out="done", resume=True, batch_size=5), r"drop --batch_size=5 \(it ran with 4\)"),
    ]
    tiny(vocab_size=999, n_embd=64, n_head=1).save_pretrained(tmp_path / "other")
    cases.append((dict(init_from=str(tmp_path / "other")), "has 999 token ids"))
    tiny(block_size=16).save_pretrained(tmp_path / "short")
    cases.append((dict(init_from=str(tmp_path / "short")), "a context of 16 tokens, the longest example"))
    for flags, message in cases:
        with pytest.raises((UserError, OSError), match=message) as caught:
            fit(**flags)
        assert "\n" not in str(caught.value)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert before == ["done", "other", "short"]  # none of the refused runs left anything


def test_a_resume_that_does_not_find_its_data_says_so(fit, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent)
    fit(data_dir=data.name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"--resume: the run's data are not in {data.name}, .*say with --data_dir"):
        train.main(TrainConfig(resume=True, out_dir="out", max_steps=8))
    assert train.main(TrainConfig(resume=True, out_dir="out", data_dir=data, max_steps=8))["step"] == 8


def test_a_resume_with_other_data_is_refused_by_name(fit, prepare):
    fit("out")
    with pytest.raises(UserError, match=r"not the data that this run began with \(source_sha256, .*train"):
        fit("out", data_dir=str(prepare(colour_records(70))), resume=True)


def test_damaged_files_are_refused(fit, data, tmp_path, prepare):
    fit("out")
    (tmp_path / "out" / "ckpt.pt").write_bytes((tmp_path / "out" / "ckpt.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match="ckpt.pt cannot be read.*--overwrite"):
        fit("out", resume=True)
    for change, message in ((lambda path: path.write_bytes(path.read_bytes()[:500]), "is damaged|disagree"),
                            (lambda path: path.write_bytes(b"nonsense"), "is damaged")):
        own = prepare(colour_records(30))
        change(own / "train_00000.npy")
        with pytest.raises(UserError, match=message):
            fit("new", data_dir=str(own))
    own = prepare(colour_records(30))
    (own / "meta.json").write_text(json.dumps({**load_meta(own), "format_version": 99}))
    with pytest.raises(UserError, match="has format 99, this program reads 1; run prepare_data.py again"):
        fit("new", data_dir=str(own))


@pytest.mark.parametrize("words, message", [
    (["--learning-rat=1"], "unknown flag '--learning_rat': did you mean --learning_rate?"),
    (["--epochs=many"], "--epochs: invalid float value: 'many'"),
    (["--resume=maybe"], "'maybe' is neither true nor false"),
    (["config.py"], "unknown argument 'config.py': did you mean --data_dir=config.py?"),
    (["--batch_size=0"], "--batch_size: 0 is below 1"),
    (["--dropout=1.5", "--lr_schedule=step"], "--dropout: 1.5 is not in [0, 1); --lr_schedule: 'step' is none of")])
def test_misused_flags_end_in_one_line_and_exit_code_2(words, message):
    done = subprocess.run([sys.executable, ROOT / "train.py", *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_what_others_call_a_flag_is_a_flag_of_ours():
    scripts = TrainConfig, prepare_data.PrepareConfig, sample.SampleConfig
    fields = [set(kind.__dataclass_fields__) for kind in scripts]
    for name, ours in ELSEWHERE.items():
        assert any(ours in flags and name not in flags for flags in fields), name
    for kind, word, message in ((TrainConfig, "--max-iters=5", "'--max_iters': did you mean --max_steps"),
                                (TrainConfig, "--lr", "'--lr': did you mean --learning_rate"),
                                (TrainConfig, "--start=x", "'--start': --help lists the flags"),
                                (sample.SampleConfig, "--out_dir=x", "'--out_dir': did you mean --model")):
        with pytest.raises(UserError, match=message):
            parse_config(kind, [word])


def test_values_from_python_take_their_fields_types_or_are_refused(fit, data, tmp_path):
    fit(out_dir=tmp_path / "out", data_dir=data, max_steps=6e0, batch_size=np.int64(4), learning_rate=np.float64(1e-3),
        dropout=np.float32(0.125))
    assert train.main(TrainConfig(resume=True, out_dir=tmp_path / "out", max_steps=8))["step"] == 8
    for values in dict(max_steps=2.5), dict(max_minutes=None), dict(lora_targets=["c_attn"]), dict(resume="yes"):
        with pytest.raises(UserError, match=f"--{next(iter(values))}: .* is no (int|float|str|bool)$"):
            TrainConfig(**values)
    assert sample.SampleConfig(model=Path("out")).model == "out"
    assert parse_config(TrainConfig, ["--out_dir=~/out"]).out_dir == os.path.expanduser("~/out")


def test_a_log_or_picture_that_somebody_spoils_ends_no_run(fit, tmp_path, monkeypatch, capsys):
    out_dir, real = tmp_path / "out", train.evaluate

    def spoil(*args):
        (out_dir / "log.csv").unlink(missing_ok=True)
        (out_dir / "loss.png").unlink(missing_ok=True)
        (out_dir / "loss.png").mkdir()
        monkeypatch.setattr(train, "evaluate", real)
        return real(*args)
    monkeypatch.setattr(train, "evaluate", spoil)
    assert fit()["step"] == 6 and "warning: no loss.png (" in capsys.readouterr().out
    assert fit(resume=True, max_steps=8)["step"] == 8
    assert [row["step"] for row in watch.read_rows(out_dir / "log.csv")] == [3, 4, 5, 6, 7, 8]  # 1 and 2 were removed


def test_flags_are_read_in_every_spelling():
    words = ["--max-steps", "5", "--resume", "--dropout=0", "--overwrite=False", "--out_dir", "x"]
    config = parse_config(TrainConfig, words)
    assert (config.max_steps, config.resume, config.dropout, config.overwrite, config.out_dir) == (
        5, True, 0.0, False, "x")
    assert config.given == {"max_steps", "resume", "dropout", "overwrite", "out_dir"}


@pytest.mark.parametrize("what", ["--n_layer=1 --n_embd=2000000000 --n_head=1", "<&- >&-"])
def test_too_little_memory_and_closed_streams_end_without_a_traceback(what, data, tmp_path):
    out_dir = tmp_path / "out"
    command = f"{sys.executable} train.py --data_dir={data} --out_dir={out_dir} --n_layer=1 --n_embd=8 --n_head=1"
    done = subprocess.run(f"{command} --max_steps=1 --device=cpu {what}", shell=True, cwd=ROOT, capture_output=True,
                          text=True)
    expected = "error: there is not enough memory: take a smaller model, --lora_rank or a smaller micro-batch\n"
    assert done.stderr == (expected if "n_embd" in what else "")


def test_a_bug_of_ours_still_shows_its_traceback(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv.pop()); import config, console, train\n"
            "def main(config): config.no_such_name\nconsole.run(main, config.parse_config, train.TrainConfig)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no_such_name" in done.stderr


def test_answers_in_training_stop_at_the_context(fit, data):
    samples = watch.Samples(Shards(data, load_meta(data), "train"), get_encoding("bytes"), "training")
    model = tiny(block_size=int(max(map(len, samples.prompts))))
    assert samples.answer(model, 5) == [[]] * 5


def test_a_validation_example_too_long_for_the_model_is_refused_before_training(fit, prepare, tmp_path):
    data = prepare(colour_records(60), val_fraction=0.3)
    meta = load_meta(data)
    meta["train"]["longest"], meta["val"]["longest"] = 40, 90
    (data / "meta.json").write_text(json.dumps(meta))
    tiny(block_size=64).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="a context of 64 tokens, the longest example 90"):
        fit(data_dir=str(data), init_from=str(tmp_path / "short"))


def test_an_interrupted_run_leaves_weights_and_a_finished_one_says_why_it_ends(fit, tmp_path, capsys):
    with stop_after(2), pytest.raises(SystemExit):
        fit(eval_interval=0)
    assert GPT.from_pretrained(tmp_path / "out").config.n_embd == 32
    assert fit(resume=True)["step"] == 6
    assert fit(resume=True, epochs=50)["step"] == 6
    assert "nothing to do: the run had reached its --epochs" in capsys.readouterr().out


def test_numbers_that_are_none_are_refused():
    with pytest.raises(UserError, match="--epochs: nan is no number below 2.31; --learning_rate: inf is no"):
        TrainConfig(epochs=math.nan, learning_rate=math.inf)
    with pytest.raises(UserError, match="--seed: -1 is below 0; --overwrite"):
        TrainConfig(seed=-1, overwrite=True, resume=True)


# ---- the optimizer, slice by slice ----------------------------------------------------------------------------------

MATRIX = ((1 << 20) + 5) // 3, 3  # longer than a slice


def optimise(kind, gradients_of_step, half=False):
    """The weight after a step for each gradient, with clipping on."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, math.prod(MATRIX)).view(MATRIX))
    optimizer = kind([weight], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99), fused=True)
    optimizer.half = half
    for gradient in gradients_of_step:
        weight.grad_dtype = None
        weight.grad = gradient.clone()
        train.update(optimizer, NO_SCALER, torch.tensor(1.0), grad_clip=1.0)
    return weight.detach()


def test_the_sliced_optimizer_is_torchs_own_where_gradients_rest_in_bfloat16():
    steps = [torch.randn(MATRIX, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(5)]
    expected = optimise(torch.optim.AdamW, [gradient.float() for gradient in steps])
    assert torch.allclose(optimise(SlicedAdamW, steps), expected, atol=1e-6)
    assert torch.equal(optimise(SlicedAdamW, [gradient.float() for gradient in steps]), expected)
    half = optimise(SlicedAdamW, steps, half=True)
    moved, error = expected - torch.linspace(-1, 1, expected.numel()).view(MATRIX), half - expected
    assert 0 < error.norm() < 0.02 * moved.norm()


def test_the_norm_of_a_gradient_in_bfloat16_is_not_rounded_so():
    weight = torch.nn.Parameter(torch.zeros(768, 768))
    optimizer = SlicedAdamW([weight], lr=0.0, fused=True)
    for seed in range(10):
        weight.grad_dtype = None
        weight.grad = gradient = torch.randn(768, 768, generator=torch.Generator().manual_seed(seed)).bfloat16()
        exact = gradient.double().norm().item()
        assert train.update(optimizer, NO_SCALER, torch.tensor(1.0), 1.0).item() == pytest.approx(exact, rel=2e-4)


def test_an_update_clips_as_torch_does_and_skips_what_is_not_finite():
    gradient, weight = torch.tensor([3.0, 4.0]), torch.nn.Parameter(torch.zeros(2))
    optimizer = SlicedAdamW([weight], lr=1.0, weight_decay=0.0, eps=1.0, betas=(0.0, 0.0), fused=True)
    for loss, grad in ((math.nan, gradient), (1.0, gradient * math.inf), (1.0, gradient)):
        weight.grad = grad.clone()
        norm = train.update(optimizer, NO_SCALER, torch.tensor(loss), grad_clip=0.5)
        assert weight.grad is None and (math.isfinite(loss) and grad is gradient) == bool(weight.any())
    clipped = gradient * (0.5 / (5 + 1e-6))  # with eps 1 the step depends on the gradient's size
    assert norm == 5 and torch.allclose(weight.detach(), -clipped / (clipped + 1))
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize("flags", [{}, {"micro_batch_tokens": 100, "dropout": 0.1}, {"lora_rank": 4}],
                         ids=["full", "accumulation", "lora"])
def test_low_memory_follows_the_full_run_and_resumes_bit_for_bit(flags, fit, tmp_path):
    if "lora_rank" in flags:
        fit("base")
        flags = {**flags, "init_from": str(tmp_path / "base"), "forget_text": "none"}
    flags = {**flags, "dtype": "bfloat16", "max_steps": 12, "learning_rate": 2e-3}
    plain, low = fit("plain", **flags), fit("low", low_memory=True, **flags)
    assert low["train_loss"] == pytest.approx(plain["train_loss"], rel=0.01) and low["crc"] == plain["crc"]
    state = checkpoint(tmp_path / "low")["optimizer"]["state"]
    assert {one["exp_avg_sq"].dtype for one in state.values()} == {torch.bfloat16}
    with stop_after(5), pytest.raises(SystemExit):
        fit("parts", low_memory=True, **flags)
    assert {**fit("parts", resume=True), "seconds": 0} == {**low, "seconds": 0}
    assert same_weights(tmp_path / "low", tmp_path / "parts")


# ---- what a run tells -----------------------------------------------------------------------------------------------

def test_the_hardest_examples_are_those_with_wrong_labels(fit, prepare, tmp_path, capsys):
    """Three of 83 answers contradict all others; examples.csv begins with them, and its losses are the model's own."""
    records = [{"instruction": f"{i} {'cat' if i % 2 else 'dog'}?", "output": "meow" if i % 2 else "woof"}
               for i in range(80)]
    records += [{"instruction": f"{i} cat?", "output": "woof"} for i in (81, 83, 85)]
    own = prepare(records, val_fraction=0, test_fraction=0)
    fit(data_dir=str(own), max_steps=200, learning_rate=3e-3, n_embd=64, hardest=3, eval_interval=0)
    with open(tmp_path / "out" / "examples.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 83 and all("cat?" in row["text"] and "woof" in row["text"] for row in found[:3])
    out = capsys.readouterr().out
    assert "the hardest training examples (all 83 by loss in" in out and "81 cat? -> woof\n" in out
    shards, model = Shards(own, load_meta(own), "train"), GPT.from_pretrained(tmp_path / "out" / "last")
    idx, targets, lengths = shards.batch([int(found[0]["example"])])
    with torch.no_grad():
        mean = model(idx, targets, lengths).item() / int((targets != IGNORE).sum())
    assert float(found[0]["loss"]) == pytest.approx(mean, rel=1e-4)


def test_two_runs_never_write_into_one_directory(fit, data, tmp_path, monkeypatch):
    code = ("import sys, train; train.plot = lambda out_dir: (print('planned', flush=True), sys.stdin.read())\n"
            "train.main(train.TrainConfig(data_dir=sys.argv[1], out_dir=sys.argv[2], n_layer=1, n_head=1, n_embd=8, "
            "device='cpu', compile='off', max_steps=2, eval_interval=1, save_interval=1, hardest=0))")
    first = subprocess.Popen([sys.executable, "-c", code, str(data), str(tmp_path / "out")], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    while "planned" not in first.stdout.readline():
        pass
    for flags in dict(overwrite=True), dict(resume=True):
        with pytest.raises(UserError, match="another run writes there; name another, or wait for it"):
            fit(**flags) if "overwrite" in flags else train.main(TrainConfig(
                data_dir=str(data), out_dir=str(tmp_path / "out"), resume=True, device="cpu"))
    first.communicate("")
    assert first.returncode == 0 and len((tmp_path / "out" / "log.csv").read_text().splitlines()) == 3


def test_overwrite_never_clears_the_weights_that_a_run_begins_with(fit, tmp_path):
    fit()
    for init_from in (tmp_path / "out", tmp_path / "out" / "best"):
        with pytest.raises(UserError, match="lies in --out_dir=.*which --overwrite clears: name another --out_dir"):
            fit(init_from=str(init_from), overwrite=True)
    assert (tmp_path / "out" / "best" / "model.safetensors").exists()


def test_a_resumed_run_still_knows_what_came_before(fit, capsys):
    fit()
    before = [line for line in capsys.readouterr().out.splitlines() if line.startswith("      before: ")]
    fit(resume=True, max_steps=8)
    resumed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("      before: ")]
    assert resumed == before and len(before) == 3


def test_the_lines_that_many_texts_share_are_the_templates():
    texts = [f"Below is a task.\n\n### Do:\nname {i}\n### Say:\n{i}<|endoftext|>" for i in range(20)]
    assert watch.without_template(texts)[:2] == ["name 0 0", "name 1 1"]
    assert watch.without_template(["one\ntext"]) == ["one text"]


def test_before_and_after_stand_side_by_side(fit, capsys):
    fit(max_steps=60, learning_rate=5e-3)
    table = capsys.readouterr().out.split("held-out prompts, before and after:\n")[1].splitlines()
    for line, beginning in zip(table, ("    Say ", "      before: ", "      after:  "), strict=False):
        assert line.startswith(beginning)


def test_tensorboard_and_wandb_get_the_usual_names_and_end_no_run(fit, tmp_path, monkeypatch, capsys):
    seen, module = [], type(sys)("wandb")
    module.init = lambda **flags: type("Run", (), {"log": lambda self, numbers, step: seen.append((step, numbers))})()
    module.__spec__ = type(sys.__spec__)("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    fit(wandb=True)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert set(seen[0][1]) == {"train/loss", "lr", "grad_norm", "tokens_per_second"} and "val/loss" in seen[2][1]

    def broken(self, numbers, step):
        seen.append(step)
        raise ConnectionResetError("its server is gone")
    seen.clear()
    module.init = lambda **flags: type("Run", (), {"log": broken})()
    assert fit("broken", wandb=True)["step"] == 6 and len(seen) == 1
    assert "warning: --wandb or --tensorboard failed and is left out from here on (its s" in capsys.readouterr().out
    monkeypatch.delattr(module, "init")  # as if nobody were logged in
    log = (tmp_path / "out" / "log.csv").read_text()
    with pytest.raises(UserError, match="--wandb: .*init"):
        fit(wandb=True, overwrite=True)
    assert (tmp_path / "out" / "log.csv").read_text() == log
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--tensorboard: needs a package: pip install tensorboard"):
        TrainConfig(tensorboard=True)


def test_the_plan_is_told_before_the_first_step_and_a_machine_too_small_is_warned_of(fit, monkeypatch, capsys):
    monkeypatch.setattr(watch, "free_memory", lambda: 1e6)
    fit(max_steps=1)
    out = capsys.readouterr().out
    assert "1 steps of 4 examples, learning rate 0.002; at most about 0.1 GB more memory" in out
    assert "warning: only 0.0 GB are free; try --low_memory, --gradient_checkpointing, a smaller" in out


def test_the_unfinished_files_of_another_run_below_are_left_alone(fit, tmp_path):
    other, own = tmp_path / "run" / "other" / "ckpt.pt.123.tmp", tmp_path / "run" / "ckpt.pt.99.tmp"
    other.parent.mkdir(parents=True)
    for path in (other, own):
        path.write_bytes(b"half")
    fit("run", max_steps=1)
    assert other.exists() and not own.exists()
