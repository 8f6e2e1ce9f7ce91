"""model.py against transformers and against itself: logits, packing, the loss, 16 bits, compiling, generation."""
import itertools
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FAMILIES, colour_records, randomise, theirs, tiny, tiny_llama
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import model as model_module
import train
from model import GPT, IGNORE_INDEX, GPTConfig, RMSNorm, pack, rotary
from nanosft.console import UserError
from nanosft.hub import SIZES
from nanosft.shards import Shards, load_meta

ROPE_OF_LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                      original_max_position_embeddings=8192)
CONFIGS = [(size, transformers.GPT2Config(n_head=n_head, n_embd=n_embd, n_layer=2, vocab_size=2003, resid_pdrop=0.0,
                                          embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2))
           for size, (_, n_head, n_embd) in SIZES.items()]
CONFIGS += [(name, transformers.LlamaConfig(
    num_attention_heads=n_head, num_key_value_heads=n_kv_head, hidden_size=n_embd, intermediate_size=n_inner,
    num_hidden_layers=2, vocab_size=2003, max_position_embeddings=131072, **changes)) for name, (
        n_head, n_kv_head, n_embd, n_inner), changes in (
    ("Llama 3.2 1B", (32, 8, 2048, 8192), dict(rope_parameters=ROPE_OF_LLAMA3, tie_word_embeddings=True)),
    ("Llama 3.2 3B", (24, 8, 3072, 8192), dict(rope_parameters=ROPE_OF_LLAMA3, tie_word_embeddings=True, head_dim=128)),
    ("TinyLlama", (32, 4, 2048, 5632), dict(rms_norm_eps=1e-5, bos_token_id=7)),
    ("SmolLM2", (9, 3, 576, 1536), dict(rope_parameters=dict(rope_type="default", rope_theta=100000.0),
                                        tie_word_embeddings=True)),
    ("wide heads", (4, 2, 96, 200), dict(rope_parameters=ROPE_OF_LLAMA3, head_dim=48, rms_norm_eps=1e-5)))]
CONFIGS += [(name, kind(num_attention_heads=n_head, num_key_value_heads=n_kv_head, hidden_size=n_embd,
                        intermediate_size=n_inner, num_hidden_layers=2, vocab_size=2003, max_position_embeddings=32768,
                        rope_parameters=dict(rope_type="default", rope_theta=1e6), tie_word_embeddings=tied,
                        bos_token_id=7, eos_token_id=8))
            for name, kind, (n_head, n_kv_head, n_embd, n_inner), tied in (
                ("Qwen 2.5 0.5B", transformers.Qwen2Config, (14, 2, 896, 4864), True),
                ("Qwen 3 0.6B", transformers.Qwen3Config, (16, 8, 1024, 3072), True),
                ("Qwen 3 8B, narrow", transformers.Qwen3Config, (4, 2, 96, 200), False))]


@pytest.mark.parametrize("config", [
    pytest.param(config, id=name, marks=[pytest.mark.slow] if config.hidden_size > 1024 else [])
    for name, config in CONFIGS])
def test_logits_gradients_and_files_are_those_of_transformers(config, tmp_path):
    """Two layers of each shape, and every value random."""
    others = randomise(transformers.AutoModelForCausalLM.from_config(config).eval(), std=0.05)
    others.save_pretrained(tmp_path / "theirs")
    ours, (idx, targets) = GPT.from_pretrained(tmp_path / "theirs"), torch.randint(2003, (2, 2, 40))
    expected = others(idx).logits
    assert (ours(idx) - expected).abs().max() < 1e-4 * expected.std()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    ours(idx, targets).backward()
    ours.save_pretrained(tmp_path / "gradients", {name: p.grad for name, p in ours.named_parameters()})
    ours.save_pretrained(tmp_path / "ours")
    saved, back, gradients = (load_file(tmp_path / name / "model.safetensors") for name in (
        "theirs", "ours", "gradients"))
    assert saved.keys() == back.keys() == gradients.keys() == dict(others.named_parameters()).keys()
    for name, parameter in others.named_parameters():
        assert torch.equal(saved[name], back[name]), name
        assert (gradients[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm(), name
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("ours", "theirs")]
    assert {**configs[0], **configs[1], "_name_or_path": ""} == {**configs[0], "_name_or_path": ""}


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


def loss_and_gradients(model, *batches):
    """The sum of the batches' losses, and of their gradients by name."""
    model.zero_grad()
    loss = sum(model(*batch) for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_loss_and_gradients(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_loss_and_gradients_equal_those_of_the_examples_one_by_one(dtype, tolerance, family):
    model, (idx, targets, _) = FAMILIES[family]().to(dtype), packed_batch()
    alone = [(one[None], target[None]) for one, target in zip(idx.split(LENGTHS), targets.split(LENGTHS), strict=True)]
    expected = loss_and_gradients(model, *alone)
    assert_same_loss_and_gradients(loss_and_gradients(model, packed_batch()), expected, tolerance)


ALIKE = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2], [1, 2, 3, 9, 5, 4], [8, 2, 3], [8, 2, 3]]


def test_sequences_that_begin_as_the_one_before_share_those_tokens(family):
    model, targets = FAMILIES[family]().double(), torch.arange(23) % 5 * 7
    targets[targets == 0] = IGNORE_INDEX
    idx, lengths, computed = torch.tensor(sum(ALIKE, [])), [len(row) for row in ALIKE], []
    model.wte.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    logits = model(idx, lengths=lengths)
    assert computed == [5 + 1 + 0 + 4 + 3 + 0]
    assert torch.allclose(logits, torch.cat([model(torch.tensor([row]))[0] for row in ALIKE]))
    alone = [(torch.tensor([row]), target[None]) for row, target in zip(ALIKE, targets.split(lengths), strict=True)]
    found = loss_and_gradients(model, (idx, targets, lengths))
    assert_same_loss_and_gradients(found, loss_and_gradients(model, *alone), 1e-12)


def test_a_batch_of_examples_computes_every_beginning_once(prepare):
    records = [{**record, "input": "in short"} if i % 3 else record for i, record in enumerate(colour_records(60))]
    data = prepare(records, template="alpaca", block_size=512)
    idx, _, lengths = Shards(data, load_meta(data), "train").batch(range(40))
    beginnings = {tuple(row[:k + 1]) for row in idx.split(lengths) for row in [row.tolist()] for k in range(len(row))}
    assert len(pack(idx, lengths, "cpu")[0]) == len(beginnings) < len(idx) / 2


@pytest.mark.parametrize("changed, untouched", [(slice(0, 7), slice(7, 25)), (24, slice(0, 24)), (10, slice(0, 10))])
def test_no_token_is_influenced_by_another_example_or_by_later_tokens(changed, untouched, family):
    model, (idx, _, lengths) = FAMILIES[family]().eval(), packed_batch()
    before = model(idx, lengths=lengths)
    idx[changed] = (idx[changed] + 1) % 257
    after = model(idx, lengths=lengths)
    assert torch.allclose(after[untouched], before[untouched], atol=1e-5)
    assert not torch.allclose(after[changed], before[changed], atol=1e-2)


def test_the_loss_is_the_sum_over_supervised_targets():
    model, (idx, targets, lengths) = tiny().double(), packed_batch()
    expected = F.cross_entropy(model(idx, lengths=lengths), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    assert torch.allclose(model(idx, targets, lengths), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_without_supervised_targets_adds_nothing(dtype):
    idx, targets, lengths = packed_batch()
    loss, gradients = loss_and_gradients(tiny().to(dtype), (idx, torch.full_like(targets, IGNORE_INDEX), lengths))
    assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_the_loss_in_slices_and_gradient_checkpointing_change_nothing(family):
    """In three slices of rows; with dropout, which is drawn again in backward."""
    model, results = FAMILIES[family](block_size=192, dropout=0.1).double(), []
    idx = torch.randint(257, (6, 192), generator=torch.Generator().manual_seed(0))
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        torch.manual_seed(0)
        results.append(loss_and_gradients(model, (idx, idx)))
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


@pytest.mark.parametrize("T, n_kv_head", [(33, 4), (500, 4), (500, 2)])  # in one piece, in several
def test_attention_written_out_equals_the_fused_kernel(T, n_kv_head):
    q, k, v = torch.randn(3, 2, 4, T, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v = k[:, :n_kv_head], v[:, :n_kv_head]
    fused = model_module.attention(q, k, v, None, 0.0)
    written = model_module.attention(q.requires_grad_(), k, v, None, 0.0)
    assert 0 < (fused - written).norm() < 1e-2 * fused.norm()


def one_by_one(q, k, v, cu_seqlens, longest):
    """What varlen_attention promises."""
    ends = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q)
    rows = [[x[start:end].transpose(0, 1) for x in (q, k, v)] for start, end in itertools.pairwise(ends)]
    assert max(row[0].size(1) for row in rows) <= longest
    return torch.cat([F.scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1) for row in rows])


@pytest.mark.parametrize("lengths", [LENGTHS, [40], [32, 32]])
def test_attention_without_a_grid_gives_the_same_loss_and_gradients(lengths, family, monkeypatch):
    model, results = FAMILIES[family](dropout=0.5).double().eval(), []
    for varlen in (False, True):
        monkeypatch.setattr(model_module, "has_varlen_attention", lambda *_, varlen=varlen: varlen)
        monkeypatch.setattr(model_module, "varlen_attention", one_by_one)
        results.append(loss_and_gradients(model, packed_batch(lengths)))
    assert_same_loss_and_gradients(*results, 1e-10)
    monkeypatch.setattr(model_module, "varlen_attention", None)  # in training, dropout needs the grid
    assert model.train()(*packed_batch(lengths)).isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_on_a_gpu_is_that_of_the_grid(family, monkeypatch):
    model, results = FAMILIES[family]().cuda().bfloat16(), []
    assert model_module.has_varlen_attention(model.wte.weight, 8)
    for varlen in (True, False):
        monkeypatch.setattr(model_module, "has_varlen_attention", lambda *_, varlen=varlen: varlen)
        results.append(loss_and_gradients(model, packed_batch()))
    assert_same_loss_and_gradients(*results, 3e-2)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_compiled_blocks_take_every_shape_in_one_graph(device, family, monkeypatch):
    """On a CPU, and as on a GPU, by its fake kernels: nothing is compiled again, whatever the number and the lengths of
    examples, and the dtype of the gradients."""
    monkeypatch.setattr(model_module, "has_varlen_attention", lambda *_: device == "meta")
    model = FAMILIES[family](n_head=6, n_embd=48, block_size=512).to(device).bfloat16()  # no batch has 48 tokens
    for block in model.h:
        block.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    stance, weight = "default", model.h[1].mlp.c_proj.weight
    alone = [40] if device == "meta" else [40, 1]  # in a grid, a batch without gaps has a graph of its own
    for lengths, dtype in itertools.product((LENGTHS, [9, 3], [300, 7], alone), (torch.bfloat16, torch.float32)):
        for parameter in model.parameters():
            parameter.grad, parameter.grad_dtype = None, dtype
        with torch.compiler.set_stance(stance):
            model(*packed_batch(lengths)).backward()
        assert weight.grad.shape == weight.shape and weight.grad.dtype == dtype
        stance = "fail_on_recompile"


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

PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [9, 8, 7, 6, 11], [200, 100]]


@pytest.fixture
def varied(family):
    """A model whose greedy text is not one token for ever, which would hide cache and position faults."""
    model = FAMILIES[family](seed=5, std=0.1 if family == "gpt2" else 0.5).eval()
    with torch.no_grad():
        if model.wpe:
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
    others = theirs(tmp_path)
    others.generation_config.eos_token_id = None  # it would stop there, and never says that it did
    batched = collect(varied, PROMPTS)
    assert all(len(set(row)) >= 20 for row in batched)
    for prompt, row in zip(PROMPTS, batched, strict=True):
        assert collect(varied, [prompt]) == [row]
        ids = list(prompt)
        for _ in row:
            ids.append(int(varied(torch.tensor([ids]))[0, -1].argmax()))
        assert ids == prompt + row
        ids = others.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=45,
                              do_sample=False, pad_token_id=0)
        assert ids[0].tolist() == prompt + row


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(penalty, family, tmp_path):
    model, prompts = FAMILIES[family](std=0.3).eval(), [[5, 6, 7, 5], [9], [3, 1] * 9]
    model.save_pretrained(tmp_path)
    alone = []
    for prompt in prompts:
        ids = theirs(tmp_path).generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=20,
            eos_token_id=None, pad_token_id=0, repetition_penalty=penalty)
        alone.append(ids[0, len(prompt):].tolist())
    steps = list(model.generate(prompts, 20, repetition_penalty=penalty))
    assert [list(row) for row in zip(*steps, strict=True)] == alone
    assert alone != [list(row) for row in zip(*model.generate(prompts, 20), strict=True)]
    with torch.no_grad():  # in 16 bits the logits are shifted; the penalty is for those that are not
        x = torch.randn(3, model.config.n_embd, dtype=torch.bfloat16)
        exact, model = model.logits(x.float()), model.to(torch.bfloat16)
        assert (model.logits(x) + model.shift(x) - exact).abs().max() < 0.05 * exact.std()


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
    cut = varied.log_likelihood([[9] * 5 + [7] * 62], answers)
    assert torch.allclose(cut, found[-1:], atol=1e-4)  # its beginning is lost
    for (row, prompt), (column, answer) in itertools.product(enumerate(prompts), enumerate(answers)):
        logs = varied(torch.tensor([prompt + answer[:-1]]))[0].log_softmax(-1)
        expected = sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert found[row, column].item() == pytest.approx(expected, abs=1e-4)


def test_a_penalty_follows_its_row_when_others_have_ended():
    model, prompts = tiny(std=0.3).eval(), [[5, 6, 7, 5], [9, 30, 31]]
    stop = collect(model, prompts, new=20, repetition_penalty=1.3)[0][2]
    both, alone = (collect(model, asked, new=20, repetition_penalty=1.3, stop=stop) for asked in (prompts, prompts[1:]))
    assert both[1] == alone[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_penalty_is_on_true_logits(dtype):
    model = tiny(seed=2, block_size=300).eval()
    with torch.no_grad():  # logits around -100, as GPT-2's
        model.wte.weight += 0.3
        model.ln_f.bias -= 10
    prompt, least = list(range(257)), int(model(torch.arange(257)[None])[0, -1].argmin())
    prompt.remove(least)  # the only id without the penalty, which makes -100 worse
    assert collect(model.to(dtype), [prompt], new=1, repetition_penalty=3.0) == [[least]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_stands_in_its_places_in_training_alone(dtype, family, monkeypatch):
    net, seen, plain, fused = FAMILIES[family](dropout=0.25).to(dtype), [], F.dropout, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "dropout", lambda x, p, training=True: seen.append(p * training) or plain(x, p, training))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, dropout_p=0.0, **more: seen.append(dropout_p)
                        or fused(*args, dropout_p=dropout_p, **more))
    idx = torch.arange(40)[None]
    net(idx, idx)
    assert seen == [0.25] * (1 + 3 * net.config.n_layer)  # embedding; weights and output of attention, MLP
    seen.clear()
    net.eval()(idx)
    assert not any(seen)


def test_norms_and_angles_are_made_in_float32():
    config, places = tiny_llama().config, torch.arange(3000)
    exact, rounded = (rotary(config, places, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert all((one - other).abs().max() < 2**-8 for one, other in zip(exact, rounded, strict=True))
    ours, theirs = RMSNorm(64, 1e-5).bfloat16(), LlamaRMSNorm(64, 1e-5).bfloat16()
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (ours(x) != theirs(x)).float().mean() < 0.01
