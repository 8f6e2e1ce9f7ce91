"""model.py against transformers and against itself: logits, packing, the loss, 16 bits, compiling, generation."""
import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import colour_records, randomise, tiny
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_module
import train
from model import GPT, IGNORE_INDEX, GPTConfig
from nanosft.console import UserError
from nanosft.shards import Shards, load_meta
from nanosft.weights import SIZES


def reference(**numbers):
    config = transformers.GPT2Config(**numbers, bos_token_id=0, eos_token_id=0)
    return randomise(transformers.GPT2LMHeadModel(config).eval())


def assert_same_logits(ours, theirs):
    idx = torch.randint(ours.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(idx).logits, ours.eval()(idx)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers_for_the_shape_of_every_size(size, tmp_path):
    _, n_head, n_embd = SIZES[size]
    theirs = reference(n_layer=2, n_head=n_head, n_embd=n_embd, vocab_size=2003)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_full_size_gpt2_as_the_hub_has_it_and_back(tmp_path):
    """The hub's own file: an old-format .bin, names without a prefix, and the causal masks among the weights."""
    theirs = reference()
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.transformer.state_dict().items()}
    for layer in range(12):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 1024, 1024).tril()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    ours = GPT.from_pretrained(tmp_path / "pytorch_model.bin")
    assert_same_logits(ours, theirs)
    assert ours.config.eos_token_id == 50256
    ours.save_pretrained(tmp_path / "back")
    assert_same_logits(ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval())
    saved = load_file(tmp_path / "back" / "model.safetensors")
    assert "lm_head.weight" not in saved and saved["transformer.wte.weight"].shape == (50257, 768)


def test_a_fresh_model_begins_as_gpt2_did():
    model = GPT(GPTConfig(64, 257, n_layer=8, n_head=4, n_embd=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 n_layer) = 4
            assert parameter.mean().abs() < 0.1 * std and parameter.std().item() == pytest.approx(std, rel=0.1), name
        else:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name


# ---- packing and the loss -------------------------------------------------------------------------------------------

LENGTHS = [7, 1, 12, 5]


def packed_batch(lengths=LENGTHS, seed=0):
    """Random ids; about half of the targets are supervised."""
    generator, N = torch.Generator().manual_seed(seed), sum(lengths)
    idx, targets = torch.randint(257, (2, N), generator=generator)
    return idx, torch.where(torch.rand(N, generator=generator) < 0.5, IGNORE_INDEX, targets), lengths


def loss_and_gradients(model, *batches, **options):
    """The sum of the batches' losses, and of their gradients by name."""
    model.zero_grad()
    loss = sum(model(*batch, **options).sum() for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_loss_and_gradients_equal_those_of_the_examples_one_by_one(dtype, tolerance):
    model, (idx, targets, _) = tiny().to(dtype), packed_batch()
    alone = [(one[None], target[None]) for one, target in zip(idx.split(LENGTHS), targets.split(LENGTHS), strict=True)]
    expected = loss_and_gradients(model, *alone)
    assert_same_loss_and_gradients(loss_and_gradients(model, packed_batch()), expected, tolerance)


@pytest.mark.parametrize("changed, untouched", [(slice(0, 7), slice(7, 25)), (24, slice(0, 24)), (10, slice(0, 10))])
def test_no_token_is_influenced_by_another_example_or_by_later_tokens(changed, untouched):
    model, (idx, _, lengths) = tiny().eval(), packed_batch()
    before = model(idx, lengths=lengths)
    idx[changed] = (idx[changed] + 1) % 257
    after = model(idx, lengths=lengths)
    assert torch.allclose(after[untouched], before[untouched], atol=1e-5)
    assert not torch.allclose(after[changed], before[changed], atol=1e-2)


def test_every_supervised_target_has_its_own_loss_in_order():
    model, (idx, targets, lengths) = tiny().double(), packed_batch()
    losses = model(idx, targets, lengths, reduction="none")
    expected = F.cross_entropy(model(idx, lengths=lengths), targets, reduction="none")
    assert torch.allclose(losses, expected[targets != IGNORE_INDEX])
    assert torch.allclose(losses.sum(), model(idx, targets, lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_supervised_targets_adds_nothing(dtype):
    idx, targets, lengths = packed_batch()
    loss, gradients = loss_and_gradients(tiny().to(dtype), (idx, torch.full_like(targets, IGNORE_INDEX), lengths))
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_loss_in_slices_and_gradient_checkpointing_change_nothing(reduction):
    """In four slices of rows; with dropout, which is drawn again in backward."""
    model, results = tiny(block_size=200, dropout=0.1).double(), []
    idx = torch.randint(257, (8, 200), generator=torch.Generator().manual_seed(0))
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, (idx, idx), reduction=reduction))
    torch.manual_seed(0)
    model.zero_grad()
    whole = F.cross_entropy(model(idx).flatten(0, 1), idx.flatten(), reduction="sum")
    whole.backward()
    expected = whole.item(), {name: p.grad for name, p in model.named_parameters()}
    for result in results:
        assert_same_loss_and_gradients(result, expected, 1e-10)


# ---- 16 bits, and what a GPU does -----------------------------------------------------------------------------------

def test_bfloat16_resolves_logits_that_all_lie_far_from_zero():
    """GPT-2's do, around -100, where neighbouring bfloat16 numbers are a half apart."""
    model, batch = tiny(seed=2), packed_batch()
    with torch.no_grad():
        model.wte.weight += 0.3
        model.ln_f.bias -= 10
    model.bfloat16().float()  # weights that bfloat16 holds exactly
    exact, logits = loss_and_gradients(model, batch), model(batch[0], lengths=LENGTHS)
    assert logits.mean().abs() > 60 and logits.std(-1).mean() < 10
    model.bfloat16()
    error = model(batch[0], lengths=LENGTHS).log_softmax(-1) - logits.log_softmax(-1)
    assert error.dtype == torch.float32 and error.square().mean().sqrt() < 0.05
    loss, gradients = loss_and_gradients(model, batch)
    assert loss == pytest.approx(exact[0], rel=3e-3)
    for name in ("wte.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.weight"):
        assert (gradients[name] - exact[1][name]).norm() < 0.05 * exact[1][name].norm(), name


def test_attention_written_out_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 33, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    fused = model_module.attention(q, k, v, None, 0.0)
    written = model_module.attention(q.requires_grad_(), k, v, None, 0.0)
    assert 0 < (fused - written).norm() < 1e-2 * fused.norm()


def one_by_one(q, k, v, cu_seqlens, longest):
    """What varlen_attention promises."""
    ends = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q)
    rows = [[x[start:end].transpose(0, 1) for x in (q, k, v)] for start, end in itertools.pairwise(ends)]
    assert max(row[0].size(1) for row in rows) == longest
    return torch.cat([F.scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1) for row in rows])


@pytest.mark.parametrize("lengths", [LENGTHS, [40], [32, 32]])
def test_attention_without_a_grid_gives_the_same_loss_and_gradients(lengths, monkeypatch):
    model, results = tiny(dropout=0.5).double().eval(), []
    for varlen in (False, True):
        monkeypatch.setattr(model_module, "has_varlen_attention", lambda *_, varlen=varlen: varlen)
        monkeypatch.setattr(model_module, "varlen_attention", one_by_one)
        results.append(loss_and_gradients(model, packed_batch(lengths)))
    assert_same_loss_and_gradients(*results, 1e-10)
    monkeypatch.setattr(model_module, "varlen_attention", None)  # in training, dropout needs the grid
    assert model.train()(*packed_batch(lengths)).isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_on_a_gpu_is_that_of_the_grid(monkeypatch):
    model, results = tiny().cuda().bfloat16(), []
    assert model_module.has_varlen_attention(model.wte.weight, 8)
    for varlen in (True, False):
        monkeypatch.setattr(model_module, "has_varlen_attention", lambda *_, varlen=varlen: varlen)
        results.append(loss_and_gradients(model, packed_batch()))
    assert_same_loss_and_gradients(*results, 3e-2)


def test_compiled_blocks_take_every_shape_in_one_graph(monkeypatch):
    """As on a GPU, by its fake kernels: nothing is compiled again, whatever the number and the lengths of examples, and
    the dtype of the gradients."""
    monkeypatch.setattr(model_module, "has_varlen_attention", lambda *_: True)
    model = tiny(n_head=5, n_embd=40).to("meta").bfloat16()  # the first batch has 25 tokens: no other number is 25
    for block in model.h:
        block.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    stance, weight = "default", model.h[1].attn.c_attn.weight
    for lengths, dtype in itertools.product((LENGTHS, [9, 3], [40]), (torch.bfloat16, torch.float32)):
        for parameter in model.parameters():
            parameter.grad, parameter.grad_dtype = None, dtype
        with torch.compiler.set_stance(stance):
            model(*torch.zeros(2, sum(lengths), dtype=torch.int64), lengths).backward()
        assert weight.grad.shape == (120, 40) and weight.grad.dtype == dtype
        stance = "fail_on_recompile"


def test_evaluation_and_generation_run_eager():
    """They would be compiled anew for every shape."""
    model, compiled = tiny(dropout=0.5), []
    for block in model.h:
        block.compile(backend=lambda graph, inputs: compiled.append(1) or graph.forward)
    with train.evaluating(model):
        losses = [model(*packed_batch()).item() for _ in range(2)]
        assert losses[0] == losses[1] == tiny().eval()(*packed_batch()).item()
        assert collect(model, PROMPTS, 5) == collect(tiny().eval(), PROMPTS, 5)
    assert not compiled and model.training
    model(*packed_batch())
    assert compiled


class NoFloat64(TorchDispatchMode):
    """A device without float64, as a Mac's GPU is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        dtypes = {x.dtype for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        assert torch.float64 not in dtypes, f"{function} makes float64 on the device"
        return found


def test_training_and_evaluation_make_no_float64_on_the_device(prepare, monkeypatch):
    data, model = prepare(colour_records(60)), tiny(block_size=128)
    optimizer, val = train.AdamW(model, torch.float32), Shards(data, load_meta(data), "val")
    batches, expected = val.batches(range(len(val)), 200), train.evaluate(model, val, 200)
    # what has come to the CPU is numpy's from there on
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: SimpleNamespace(double=lambda: x.numpy().astype("float64")))
    with NoFloat64():
        assert train.evaluate(model, val, 200) == pytest.approx(expected)
        optimizer.step(1e-3, train.accumulate(model, optimizer, batches, 100), 1.0)


# ---- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [200, 100]]


@pytest.fixture
def varied():
    """A model whose greedy text is not one token for ever, which would hide cache and position faults."""
    model = tiny(seed=5).eval()
    with torch.no_grad():
        model.wpe.weight *= 3
    return model


def collect(model, prompts, new=45, **options):
    rows = [[] for _ in prompts]
    for ids in model.generate(prompts, new, **options):
        for row, token in zip(rows, ids, strict=True):
            if token is not None:
                row.append(token)
    return rows


def test_greedy_is_the_same_with_cache_without_batched_and_in_transformers(varied, tmp_path):
    varied.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = None  # it would stop there, and never says that it did
    batched = collect(varied, PROMPTS)
    assert all(len(set(row)) >= 20 for row in batched)
    for prompt, row in zip(PROMPTS, batched, strict=True):
        assert collect(varied, [prompt]) == [row]
        ids = list(prompt)
        for _ in row:
            ids.append(int(varied(torch.tensor([ids]))[0, -1].argmax()))
        assert ids == prompt + row
        ids = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=45,
                              do_sample=False, pad_token_id=0)
        assert ids[0].tolist() == prompt + row


def test_rows_stop_at_different_times_and_the_rest_goes_on_unchanged(varied):
    free = collect(varied, PROMPTS)
    for stop in (free[0][3], free[1][10], free[2][20]):
        expected = [row[:row.index(stop) + 1] if stop in row else row for row in free]
        assert collect(varied, PROMPTS, stop=stop) == expected
        assert len({len(row) for row in expected}) > 1


def test_generation_ends_where_the_context_does(varied):
    rows = collect(varied, [[1] * 60, [2] * 64, [3]], new=100)
    assert [len(row) for row in rows] == [5, 1, 64]  # the last position still predicts one token
    with pytest.raises(UserError, match="the prompt has 65 tokens, the context 64"):
        collect(varied, [[1] * 65])


def test_ids_past_the_vocabulary_are_never_drawn():
    model = tiny().eval()
    with torch.no_grad():
        model.wte.weight[250:] = 100 * model.ln_f.bias  # by far the highest logits
    assert min(collect(model, [[1, 2]], new=5)[0]) >= 250
    for temperature in (0.0, 5.0):
        assert max(collect(model, [[1, 2]], new=20, n_vocab=250, temperature=temperature)[0]) < 250


@pytest.mark.parametrize("options, expected", [
    ({}, [0.5, 0.3, 0.15, 0.05]), (dict(top_k=2), [0.625, 0.375, 0, 0]), (dict(top_p=0.75), [0.625, 0.375, 0, 0]),
    (dict(temperature=0.5), [0.685, 0.247, 0.062, 0.007]), (dict(top_k=99), [0.5, 0.3, 0.15, 0.05]),
    (dict(top_p=1e-6), [1, 0, 0, 0]), (dict(temperature=0.0), [1, 0, 0, 0])])
def test_drawing_follows_the_distribution_top_k_and_top_p(options, expected):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)
    settings = dict(temperature=1.0, top_k=0, top_p=1.0, generator=torch.Generator().manual_seed(0)) | options
    shares = torch.bincount(model_module.draw(logits, **settings), minlength=4) / 20_000
    assert torch.allclose(shares, torch.tensor(expected, dtype=torch.float32), atol=0.02)
    assert (shares[torch.tensor(expected) == 0] == 0).all()


def test_the_likelihood_of_answers_is_that_of_the_whole_texts(varied):
    answers = [[5, 6, 7], [8], [5, 9]]
    prompts = [*PROMPTS, [7] * 62]  # the last leaves just enough room
    found = varied.log_likelihood(prompts, answers)
    for (row, prompt), (column, answer) in itertools.product(enumerate(prompts), enumerate(answers)):
        logs = varied(torch.tensor([prompt + answer[:-1]]))[0].log_softmax(-1)
        expected = sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert found[row, column].item() == pytest.approx(expected, abs=1e-4)
