"""nanosft/optimizer.py against torch's AdamW; what it skips, keeps and restores; and that it waits for no device."""
import io
import re

import pytest
import torch
from conftest import ROOT, tiny
from torch.utils._pytree import tree_leaves

import train
from nanosft.optimizer import AdamW

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def small(dtype, seed=0, **options):
    """An optimizer of four parameters; the matrix is longer than a slice."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(700, 400), torch.nn.LayerNorm(400))
    return AdamW(model.double() if dtype == torch.float64 else model, dtype, **options)


def give_gradients(optimizer, seed, size=0.01):
    """Random gradients of the scaled loss. Returns the unscaled ones, as the masters see them."""
    generator, seen = torch.Generator().manual_seed(seed), {}
    optimizer.zero_grad()
    for name, parameter in optimizer.parameters.items():
        random = torch.randn(parameter.shape, generator=generator) * size * optimizer.loss_scale
        parameter.grad = random.to(parameter.dtype)
        seen[name] = parameter.grad.to(optimizer.masters[name].dtype) / optimizer.loss_scale
    return seen


def take_steps(optimizer, seeds):
    for seed in seeds:
        give_gradients(optimizer, seed)
        optimizer.step(1e-3, torch.ones(()), 1.0)
    return optimizer


def contents(optimizer, but=()):
    """A copy of all that a step may change, in one list."""
    state = {kind: tensors for kind, tensors in optimizer.state_dict().items() if kind not in but}
    return [tensor.detach().clone() for tensor in tree_leaves((state, optimizer.parameters))]


def same(tensors, others):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_follow_torchs_adamw_and_parameters_are_the_rounded_masters(dtype):
    """torch has the same gradients in the masters' dtype. Every second step is clipped; matrices alone decay."""
    ours, exact = small(dtype, weight_decay=0.1), dtype == torch.float64
    theirs = {name: torch.nn.Parameter(master.clone()) for name, master in ours.masters.items()}
    reference = torch.optim.AdamW([{"params": [p], "weight_decay": 0.1 if p.dim() == 2 else 0.0}
                                   for p in theirs.values()], betas=(0.9, 0.99), fused=True)
    for step in range(6):
        for name, gradient in give_gradients(ours, step, size=0.01 if step % 2 else 1e-4).items():
            theirs[name].grad = gradient
        expected = torch.cat([p.grad.double().flatten() for p in theirs.values()]).norm()  # theirs is 1e-5 off
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        assert (expected > 1) == step % 2
        norm = ours.step(1e-2 / (step + 1), torch.ones(()), 1.0)
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        reference.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-12 if exact else 1e-5)
        for name, master in ours.masters.items():
            assert torch.allclose(master, theirs[name], rtol=0, atol=1e-12 if exact else 2.5e-7)  # 2 ulps of 1.0
            assert ours.parameters[name].dtype == dtype and torch.equal(ours.parameters[name], master.to(dtype))
    is_own = {ours.parameters[name].data_ptr() == master.data_ptr() for name, master in ours.masters.items()}
    assert is_own == {dtype.itemsize >= 4}


def test_low_memory_keeps_both_moments_in_bfloat16_and_follows_within_two_percent():
    start = small(torch.bfloat16).masters
    full, low = (take_steps(small(torch.bfloat16, low_memory=wanted), range(30)) for wanted in (False, True))
    assert {moment.dtype for moment in (*low.means.values(), *low.squares.values())} == {torch.bfloat16}
    for name, master in full.masters.items():
        assert 0 < (low.masters[name] - master).norm() < 0.02 * (master - start[name]).norm()


@pytest.mark.parametrize("dtype, low_memory", [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True)])
def test_a_loss_gradient_or_norm_that_is_not_finite_changes_nothing(dtype, low_memory):
    optimizer, scales = take_steps(small(dtype, low_memory=low_memory), range(2)), ("loss_scale", "good_steps")
    before = contents(optimizer, but=scales)
    too_large = torch.inf if dtype == torch.float16 else torch.finfo(dtype).max  # float32 holds float16's squares
    for loss, value in (torch.nan, 0.0), (torch.inf, 0.0), (1.0, torch.nan), (1.0, -torch.inf), (1.0, too_large):
        give_gradients(optimizer, 7)
        optimizer.parameters["1.bias"].grad[3] = value
        assert not (optimizer.step(1e-3, torch.tensor(loss), 1.0) + loss).isfinite()
        assert same(contents(optimizer, but=scales), before)
    assert take_steps(optimizer, [2]).steps == 3 and not same(contents(optimizer, but=scales), before)


def test_float16s_loss_scale_halves_after_an_overflow_and_doubles_after_2000_good_steps_in_a_row():
    optimizer, scales = small(torch.float16), []
    cases = (0, 1.0), (0, torch.inf), (999, 1.0), (1998, 1.0), (1999, 1.0), (2000, 1.0), (1999, torch.nan)
    for good_steps, loss in cases:
        optimizer.good_steps.fill_(good_steps)
        give_gradients(optimizer, 0)
        optimizer.step(1e-3, torch.tensor(loss), 1.0)
        scales.append((int(torch.log2(optimizer.loss_scale)), int(optimizer.good_steps)))
    assert scales == [(16, 1), (15, 0), (15, 1000), (15, 1999), (16, 2000), (16, 2001), (15, 0)]
    assert take_steps(small(torch.bfloat16), [0]).loss_scale == 1


def test_gradients_of_several_backward_passes_are_summed_in_float32_when_asked():
    """The second gradient is lost beside the first in bfloat16."""
    model = torch.nn.Linear(4, 4)
    optimizer = AdamW(model, torch.bfloat16)
    for in_float32 in (False, True, False):
        optimizer.zero_grad(in_float32)
        for size in (1.0, 2.0**-10):
            (model.weight * size).sum().backward()
        assert model.weight.grad.dtype == (torch.float32 if in_float32 else torch.bfloat16)
        assert (model.weight.grad == (1 + 2.0**-10 if in_float32 else 1.0)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_right_however_many_gradients_there_are(dtype):
    """torch's sum of all squares in one go is 0.13 % short here, on a CPU."""
    optimizer = AdamW(torch.nn.Linear(20_000, 1200, bias=False), dtype)
    optimizer.zero_grad()
    gradient = torch.randn(1200, 20_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer.parameters["weight"].grad = gradient
    exact = sum(row.double().square().sum() for row in gradient).sqrt().item()
    assert optimizer.step(1e-3, torch.ones(()), 1.0).item() == pytest.approx(exact, rel=2e-5)


@pytest.mark.parametrize("dtype, low_memory", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_a_state_that_was_saved_goes_on_bit_for_bit(dtype, low_memory):
    straight, file = take_steps(small(dtype, low_memory=low_memory), range(3)), io.BytesIO()
    straight.loss_scale.fill_(8.0 if dtype == torch.float16 else 1.0)
    torch.save(straight.state_dict(), file)
    resumed = small(dtype, seed=1, low_memory=low_memory)
    resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert same(contents(resumed), contents(straight))
    assert same(contents(take_steps(resumed, range(3, 6))), contents(take_steps(straight, range(3, 6))))


@pytest.mark.parametrize("kind, name, tensor", [("means", "x", torch.ones(3)), ("squares", "0.bias", torch.ones(401)),
                                                ("masters", "0.bias", torch.ones(400).half())])
def test_a_state_of_other_names_shapes_or_dtypes_is_refused(kind, name, tensor):
    state = small(torch.bfloat16).state_dict()
    state[kind][name] = tensor
    with pytest.raises(AssertionError, match=kind):
        small(torch.bfloat16).load_state_dict(state)


@pytest.mark.parametrize("dtype, low_memory", [(torch.float32, False), (torch.float16, False), (torch.bfloat16, True)])
def test_a_step_waits_for_no_device_and_only_the_slice_size_depends_on_it(dtype, low_memory):
    """On torch's meta device, which computes no values, every attempt to look at one fails."""
    model = tiny().to("meta")
    optimizer = AdamW(model, dtype, low_memory=low_memory)
    batch = *torch.zeros(2, 12, dtype=torch.int64), [9, 3]
    loss = train.accumulate(model, optimizer, [batch, batch], 24)
    assert optimizer.step(1e-3, loss, 1.0).device.type == "meta"
    lines = (ROOT / "nanosft" / "optimizer.py").read_text().splitlines()
    assert [line.split()[0] for line in lines if re.search('"(cpu|cuda)', line)] == ["self.slice_size"]


def test_without_a_limit_gradients_are_not_clipped():
    one, other = small(torch.float32), small(torch.float32)
    for optimizer, clip in ((one, 0), (other, 1e9)):
        give_gradients(optimizer, 3)
        optimizer.step(1e-2, torch.ones(()), clip)
    assert same(contents(one), contents(other))
