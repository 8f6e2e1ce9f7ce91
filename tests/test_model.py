"""model.py against transformers and against itself: logits, packing, generation, files, downloads."""
import copy
import hashlib
import http.server
import itertools
import json
import threading

import pytest
import torch
import transformers
from conftest import randomise, tiny
from safetensors.torch import load_file, save_file

import cpu
import model as model_module
import weights
from console import UserError
from cpu import Linear, SlicedAdamW
from model import GPT, IGNORE
from weights import SIZES, read_safetensors, write_safetensors


def reference(n_layer=2, n_head=4, n_embd=32, vocab_size=257, n_positions=64, seed=0, std=0.1):
    config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size,
                                     n_positions=n_positions, bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1)
    return randomise(transformers.GPT2LMHeadModel(config).eval(), std, seed)


def assert_same_logits(ours, theirs, length=40, tolerance=1e-4):
    idx = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(idx).logits
        error = (ours.eval()(idx) - expected).abs().max() / expected.std()
    assert error < tolerance


@pytest.mark.parametrize("size", SIZES)
def test_logits_equal_transformers_for_the_shape_of_every_size(size, tmp_path):
    _, n_head, n_embd = SIZES[size]
    theirs = reference(2 if size in ("gpt2-large", "gpt2-xl") else 4, n_head, n_embd, 50257, 1024)
    theirs.save_pretrained(tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_full_size_gpt2_as_the_hub_has_it_and_back(tmp_path):
    """The hub's own file: an old-format .bin, names without a prefix, and the causal masks among the weights."""
    theirs = reference(12, 12, 768, 50257, 1024, std=0.1)
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.transformer.state_dict().items()}
    for layer in range(12):
        state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 1024, 1024).tril()
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    ours = GPT.from_pretrained(path)
    assert_same_logits(ours, theirs)
    ours.save_pretrained(tmp_path / "back")
    assert_same_logits(ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back").eval())
    saved = load_file(tmp_path / "back" / "model.safetensors")
    assert "lm_head.weight" not in saved and saved["transformer.wte.weight"].shape == (50257, 768)
    path.unlink()


def test_both_names_and_the_tied_head_load(tmp_path):
    theirs = reference(n_embd=128, n_head=2)
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    save_file(state, tmp_path / "weights.safetensors")
    assert_same_logits(GPT.from_pretrained(tmp_path / "weights.safetensors"), theirs)
    state["lm_head.weight"][0, 0] += 1
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="output head differs"):
        GPT.from_pretrained(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("change, message", [
    ({"n_layer": 3}, "h.2.attn.c_attn.bias is missing"), ({"n_embd": 64}, r"is \(96,\), expected \(192,\)"),
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"activation_function": "relu"}, "activation_function"),
    ({"n_layer": "two"}, "no GPT-2 configuration"), ({"n_head": 5}, "no multiple")])
def test_a_config_that_does_not_match_is_refused_by_name(change, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


# ---- packing --------------------------------------------------------------------------------------------------------

LENGTHS = [7, 1, 12, 5]


def packed_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(257, (sum(LENGTHS),), generator=generator)
    targets = torch.where(torch.rand(len(idx), generator=generator) < 0.5, IGNORE,
                          torch.randint(257, (len(idx),), generator=generator))
    return idx, targets


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_loss_and_gradients_equal_those_of_the_examples_one_by_one(dtype):
    model = tiny().double()
    model.compute_dtype = dtype
    idx, targets = packed_batch()
    packed = model(idx, targets, LENGTHS)
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone = [model(one[None], target[None])
             for one, target in zip(idx.split(LENGTHS), targets.split(LENGTHS), strict=True)]
    sum(alone).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    assert packed.item() == pytest.approx(sum(alone).item(), rel=tolerance)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= tolerance * gradients[name].norm()


def test_changing_one_example_leaves_the_others_logits_untouched():
    model, (idx, _) = tiny().eval(), packed_batch()
    before = model(idx, lengths=LENGTHS)
    changed = idx.clone()
    changed[:7] = (changed[:7] + 1) % 257
    after = model(changed, lengths=LENGTHS)
    assert torch.equal(before[7:], after[7:]) and not torch.equal(before[:7], after[:7])


def test_a_token_is_not_influenced_by_later_ones():
    model, (idx, _) = tiny().eval(), packed_batch()
    changed = idx.clone()
    changed[-1] = (changed[-1] + 1) % 257
    assert torch.allclose(model(idx[None])[0, :-1], model(changed[None])[0, :-1], atol=1e-5)


def test_attention_written_out_equals_the_fused_kernel():
    q, k, v = torch.randn(3, 2, 4, 33, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    fused = model_module.attend(q, k, v, None, 0.0)
    written = model_module.attend(q.requires_grad_(), k, v, None, 0.0)
    assert (fused - written).norm() < 1e-2 * fused.norm()


def one_by_one(q, k, v, bounds, longest):
    """What attend_packed promises."""
    ends = bounds.tolist()
    assert bounds.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q)
    rows = [[x[start:end].transpose(0, 1) for x in (q, k, v)] for start, end in itertools.pairwise(ends)]
    assert max(row[0].size(1) for row in rows) <= longest
    return torch.cat([torch.nn.functional.scaled_dot_product_attention(*row, is_causal=True).transpose(0, 1)
                      for row in rows])


@pytest.mark.parametrize("lengths, block_size", [(LENGTHS, 64), ([3, 2], 8), ([32, 32], 64)])
def test_attention_without_a_grid_gives_the_same_loss_and_gradients(lengths, block_size, monkeypatch):
    """With a tail, with one longer than every example, without any. A GPU's kernel stands in for itself below."""
    model, generator, results = tiny(block_size=block_size).double(), torch.Generator().manual_seed(0), []
    model.config.dropout = 0.5  # a model in training needs the grid for it
    idx, targets = torch.randint(257, (2, sum(lengths)), generator=generator)
    for grid in (True, False):
        monkeypatch.setattr(model_module, "attends_packed", lambda *_, grid=grid: not grid)
        monkeypatch.setattr(model_module, "attend_packed", one_by_one)
        model.eval()
        model.zero_grad()
        loss = model(idx, targets, lengths)
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for expected, gradient in zip(*(gradients for _, gradients in results), strict=True):
        assert (gradient - expected).norm() <= 1e-10 * expected.norm()
    monkeypatch.setattr(model_module, "attend_packed", None)  # never called
    assert torch.isfinite(model.train()(idx, targets, lengths))


def test_torchs_attention_for_a_gpu_takes_what_we_give_it():
    """Shapes, dtypes and names alone, on the meta device: its own fake kernel checks them."""
    q, k, v = torch.empty(40, 3, 4, 32, dtype=torch.bfloat16, device="meta").unbind(1)
    bounds = torch.empty(5, dtype=torch.int32, device="meta")
    found = model_module.attend_packed(q, k, v, bounds, 16)
    assert found.shape == q.shape and found.dtype == q.dtype


def test_compiled_blocks_take_every_shape_in_one_graph(monkeypatch):
    """As on a GPU, by its fake kernels: nothing is compiled again, whatever the number and the lengths of examples."""
    monkeypatch.setattr(model_module, "attends_packed", lambda *_: True)
    model = tiny(n_head=5, n_embd=40).to("meta")  # the first batch has 32 tokens, which should be no other number
    model.compute_dtype = torch.bfloat16
    for block in model.h:
        block.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    for lengths, stance in (LENGTHS, "default"), ([9, 3], "fail_on_recompile"), ([40], "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            model(*torch.zeros(2, sum(lengths), dtype=torch.int64), lengths).backward()
    assert model.h[1].attn.c_attn.weight.grad.shape == (120, 40)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attention_on_a_gpu_is_that_of_the_grid(monkeypatch):
    model, (idx, targets), results = tiny().cuda(), packed_batch(), []
    model.compute_dtype = torch.bfloat16
    assert model_module.attends_packed(model.wte.weight, torch.bfloat16, 8)
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(model_module, "attends_packed", lambda *_: False)
        model.zero_grad()
        model(idx, targets, LENGTHS).backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for packed, expected in zip(*results, strict=True):
        assert (packed - expected).norm() <= 3e-2 * expected.norm()


def test_the_loss_in_slices_and_gradient_checkpointing_change_nothing():
    model = tiny(block_size=1200).double()
    idx = torch.randint(257, (3, 1200), generator=torch.Generator().manual_seed(0))
    sliced = model(idx, idx)
    sliced.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing = True
    whole = torch.nn.functional.cross_entropy(model(idx).flatten(0, 1), idx.flatten(), reduction="sum")
    whole.backward()
    assert sliced.item() == pytest.approx(whole.item(), rel=1e-12)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-10 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_written_in_place_are_autograds_own(dtype, lora, monkeypatch):
    """Over two micro-batches, and over a second step that reuses the buffers of the first."""
    model = tiny().to(torch.float64 if dtype == torch.float64 else torch.float32)
    if lora:
        model.add_lora(4, 8.0, 0.0, ["c_attn", "c_proj"])
    model.compute_dtype, results = dtype, []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(cpu, "writes_gradient", lambda weight: False)
        for seeds in ((0, 1), (2, 3)):
            model.zero_grad(set_to_none=True)
            for seed in seeds:
                model(*packed_batch(seed), LENGTHS).backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, expected in results[1].items():
        assert (results[0][name] - expected).norm() <= tolerance * expected.norm(), name


# ---- generation -----------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11], [200, 100]]


def varied():
    """A model whose greedy text is not one token for ever, which would hide cache and position faults."""
    model = tiny(seed=5).eval()
    with torch.no_grad():
        model.wpe.weight *= 3
    return model


def collect(model, prompts, new=45, **options):
    rows = [[] for _ in prompts]
    for step in model.generate(prompts, new, **options):
        for row, token in zip(rows, step, strict=True):
            row += [token] if token is not None else []
    return rows


def greedy_without_cache(model, prompt, new, stop=None):
    ids = list(prompt)
    while len(ids) < len(prompt) + new and (stop is None or stop not in ids[len(prompt):]):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


def test_greedy_is_the_same_with_cache_without_batched_and_in_transformers(tmp_path):
    ours = varied()
    ours.save_pretrained(tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = None  # it would stop there, and never says that it did
    batched = collect(ours, PROMPTS)
    assert all(len(set(row)) >= 20 for row in batched), [len(set(row)) for row in batched]
    for prompt, row in zip(PROMPTS, batched, strict=True):
        assert collect(ours, [prompt]) == [row]
        assert greedy_without_cache(ours, prompt, 45) == row
        ids = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=45,
                              do_sample=False, pad_token_id=0)
        assert ids[0, len(prompt):].tolist() == row


def test_rows_stop_at_different_times_and_the_rest_goes_on_unchanged():
    ours = varied()
    free = collect(ours, PROMPTS)
    for stop in (free[0][3], free[1][10], free[2][20]):
        expected = [row[:row.index(stop) + 1] if stop in row else row for row in free]
        assert collect(ours, PROMPTS, stop=stop) == expected
        assert len({len(row) for row in expected}) > 1


def test_generation_ends_where_the_context_does():
    ours = varied()
    rows = collect(ours, [[1] * 60, [2] * 64, [3]], new=100)
    assert [len(row) for row in rows] == [5, 1, 64]  # the last position still predicts one token
    with pytest.raises(UserError, match="the prompt has 65 tokens, the context 64"):
        collect(ours, [[1] * 65])


def test_ids_past_the_vocabulary_are_never_drawn():
    ours = tiny().eval()
    with torch.no_grad():
        ours.wte.weight[250:] = 100 * ours.ln_f.bias  # by far the highest logits
    assert min(collect(ours, [[1, 2]], new=5)[0]) >= 250
    assert max(collect(ours, [[1, 2]], new=20, n_vocab=250)[0]) < 250
    assert max(collect(ours, [[1, 2]], new=20, n_vocab=250, temperature=5.0)[0]) < 250


def test_drawing_follows_the_distribution_top_k_and_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20_000, 4)

    def shares(**options):
        settings = dict(temperature=1.0, top_k=0, top_p=1.0, generator=torch.Generator().manual_seed(0)) | options
        return torch.bincount(model_module.draw(logits, **settings), minlength=4) / 20_000
    assert torch.allclose(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.02)
    assert torch.allclose(shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(shares(top_p=0.75), torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)
    assert torch.allclose(shares(temperature=0.5), torch.tensor([0.685, 0.247, 0.062, 0.007]), atol=0.02)
    assert shares(top_p=1e-6)[0] == 1 and shares(temperature=0.0)[0] == 1


# ---- files ----------------------------------------------------------------------------------------------------------

def test_safetensors_are_what_the_library_writes_and_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.arange(6).view(2, 3),
               "d": torch.zeros(0, 2)}
    write_safetensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    for read in (load_file(tmp_path / "ours"), dict(read_safetensors(tmp_path / "theirs"))):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def with_header(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("content", [
    b"", b"\1", (1 << 60).to_bytes(8, "little") + b"{}", with_header(b"{not json"), with_header(b"[1]"),
    with_header({"a": ENTRY}, bytes(4)), with_header({"a": ENTRY}, bytes(9)),
    with_header({"a": {**ENTRY, "shape": [3]}}),
    with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)),  # overlapping
    with_header({"a": {**ENTRY, "data_offsets": [-8, 0]}}), with_header({"a": {**ENTRY, "dtype": "F33"}}),
    with_header({"a": {**ENTRY, "shape": [-1, -2]}}), with_header({"a": {"dtype": "F32"}}), with_header({"a": 3}),
    with_header({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16))])
def test_a_false_safetensors_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="no valid safetensors file") as caught:
        list(read_safetensors(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"wte.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no plain tensors"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="holds no plain tensors"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["gpt3", "no/such/place", "empty"])
def test_a_model_that_is_not_there_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="gpt2-medium|neither model.safetensors"):
        GPT.from_pretrained(tmp_path / name if name == "empty" else name)


# ---- the hub --------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with the real one's paths, redirect and headers. hub.fault: '' | 'cut' | 'corrupt' | 'gone'."""
    tiny(vocab_size=50257, n_embd=64, n_head=1).save_pretrained(tmp_path / "remote")
    content = (tmp_path / "remote" / "model.safetensors").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.requests.append(f"{self.command} {self.path}")
            if self.server.fault == "gone":
                return self.send_error(404)
            if self.path.startswith("/storage"):
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
            else:
                self.send_response(302)
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/storage")
                self.send_header("X-Repo-Commit", "0123456789" * 4)
                self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            if self.path.startswith("/storage"):
                broken = {"cut": content[:1000], "corrupt": content[:-1] + b"x"}
                self.wfile.write(broken.get(self.server.fault, content))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.requests, server.cache = "", [], tmp_path / "cache"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(server.cache))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield server
    server.shutdown()


def load_small_gpt2(monkeypatch):
    numbers = dict(zip(weights.NUMBERS, (64, 50257, 2, 1, 64), strict=True))
    monkeypatch.setattr(weights, "config_from", lambda state, path: {**numbers})
    return GPT.from_pretrained("gpt2")


def test_weights_are_downloaded_once_into_the_usual_cache(hub, monkeypatch, tmp_path):
    ours = load_small_gpt2(monkeypatch)
    assert torch.equal(ours.wte.weight, GPT.from_pretrained(tmp_path / "remote").wte.weight)
    asked = list(hub.requests)
    assert any("/openai-community/gpt2/resolve/main/model.safetensors" in request for request in asked)
    load_small_gpt2(monkeypatch)
    assert hub.requests == asked
    from huggingface_hub import try_to_load_from_cache
    assert try_to_load_from_cache("openai-community/gpt2", "model.safetensors", cache_dir=hub.cache)


@pytest.mark.parametrize("fault", ["cut", "corrupt", "gone"])
def test_a_broken_download_leaves_nothing_and_says_what_to_do(hub, fault, monkeypatch):
    hub.fault = fault
    with pytest.raises(UserError, match="download of gpt2 failed.*try again, or name the path of a copy"):
        load_small_gpt2(monkeypatch)
    assert not [path for path in hub.cache.rglob("*") if path.is_file()]
    hub.fault = ""
    load_small_gpt2(monkeypatch)


def test_offline_says_so_and_an_older_cache_is_used(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        GPT.from_pretrained("gpt2")
    snapshot = hub.cache / "models--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (hub.cache / "models--gpt2" / "refs").mkdir()
    (hub.cache / "models--gpt2" / "refs" / "main").write_text("abc")
    (snapshot / "model.safetensors").write_bytes((tmp_path / "remote" / "model.safetensors").read_bytes())
    assert load_small_gpt2(monkeypatch).wte.weight.shape == (50257, 64)
    assert hub.requests == []


def test_the_likelihood_of_answers_is_that_of_the_whole_texts():
    model, answers = varied(), [[5, 6, 7], [8], [5, 9]]
    prompts = [*PROMPTS, [7] * 61]  # the last leaves just enough room
    found = model.log_likelihood(prompts, answers)
    for row, prompt in enumerate(prompts):
        for column, answer in enumerate(answers):
            logs = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
            expected = sum(logs[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
            assert found[row, column].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("written", [True, False])
def test_bfloat16_resolves_logits_that_all_lie_far_from_zero(written, monkeypatch):
    """GPT-2's do, around -100, where neighbouring bfloat16 numbers are a half apart."""
    model = tiny(seed=2)
    with torch.no_grad():
        model.wte.weight += 0.3
        model.ln_f.bias -= 10
    idx, targets = packed_batch()
    exact, logits = model(idx, targets, LENGTHS).item(), model(idx, lengths=LENGTHS)
    assert logits.mean().abs() > 60 and logits.std(-1).mean() < 10
    if not written:
        monkeypatch.setattr(cpu, "writes_gradient", lambda weight: False)
    model.compute_dtype, expected = torch.bfloat16, logits.log_softmax(-1)
    assert model(idx, targets, LENGTHS).item() == pytest.approx(exact, rel=3e-3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            error = model(idx, lengths=LENGTHS).log_softmax(-1) - expected
        assert error.pow(2).mean().sqrt() < 0.05


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_every_way_to_multiply_by_a_weight_gives_the_same(rows):
    """float32 or bfloat16 inputs, with gradients (written or autograd's) or without, few rows or many."""
    generator = torch.Generator().manual_seed(0)
    layer = randomise(Linear(48, 96))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        x = torch.randn(rows, 48, generator=generator)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        for weight_dtype in {torch.float32, dtype}:
            copied = copy.deepcopy(layer).to(weight_dtype)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    found = copied(x.to(dtype))
                assert found.dtype == dtype and found.shape == expected.shape
                assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_a_cast_is_made_anew_once_the_weights_may_have_changed():
    model, (idx, targets) = tiny(), packed_batch()
    model.compute_dtype = torch.bfloat16
    with torch.no_grad():
        before = [model(idx, targets, LENGTHS).item() for _ in range(2)]
        model.h[0].mlp.c_fc.weight.mul_(3)
        after = model(idx, targets, LENGTHS).item()
        assert before[0] == before[1] != after == copy.deepcopy(model)(idx, targets, LENGTHS).item()


def test_the_weight_that_the_optimizer_leaves_in_its_gradients_place_is_the_new_one():
    model, (idx, targets) = tiny(), packed_batch()
    model.compute_dtype = torch.bfloat16
    plain = copy.deepcopy(model)
    ours = SlicedAdamW(model.parameters(), lr=1e-2, fused=True)
    ours.grad_scale, ours.found_inf = torch.ones(()), torch.zeros(())
    model(idx, targets, LENGTHS).backward()
    assert model.wte.weight.grad.dtype == torch.bfloat16
    ours.step()
    assert model.wte.weight.grad is None and not torch.equal(model.wte.weight, plain.wte.weight)
    ours.zero_grad(set_to_none=True)
    plain.load_state_dict(model.state_dict())
    for batch in ((idx, targets, LENGTHS), (idx[:10], targets[:10], [10])):
        assert torch.equal(model(*batch), plain(*batch))
        model(*batch).backward()  # after the first of these the weights must be cast anew, beside their gradients
        plain(*batch).backward()
    for ours, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, other.grad)


@pytest.mark.parametrize("written", [True, False])
def test_evaluation_follows_an_optimizer_that_changes_weights_behind_their_version(written, monkeypatch):
    """As torch's fused AdamW does; and several processes have autograd's gradients."""
    model, (idx, targets) = tiny(), packed_batch()
    model.compute_dtype = torch.bfloat16
    if not written:
        monkeypatch.setattr(cpu, "writes_gradient", lambda weight: False)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), []
    for _ in range(2):
        with torch.no_grad():
            losses.append(model(idx, targets, LENGTHS).item())
            assert losses[-1] == copy.deepcopy(model)(idx, targets, LENGTHS).item()
        model(idx, targets, LENGTHS).backward()
        for parameter in model.parameters():
            gradient, parameter.grad = parameter.grad.float(), None
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] != losses[1]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("batches", [1, 2, 3])
def test_evaluation_between_backward_and_step_leaves_no_old_weight_behind(batches, half):
    model, (idx, targets) = tiny(), packed_batch()
    model.compute_dtype = torch.bfloat16
    optimizer = SlicedAdamW(model.parameters(), lr=1e-2, fused=True)
    optimizer.half = half
    for _ in range(2):
        for _ in range(batches):
            model(idx, targets, LENGTHS).backward()
            with torch.no_grad():
                model(idx, targets, LENGTHS)
        optimizer.step()
        optimizer.zero_grad()
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                found = model(idx, targets, LENGTHS).item()
                assert found == copy.deepcopy(model)(idx, targets, LENGTHS).item()


def test_a_graph_from_before_the_optimizers_step_is_refused():
    model, (idx, targets) = tiny(), packed_batch()
    optimizer = SlicedAdamW(model.parameters(), lr=1e-2, fused=True)
    old = model(idx, targets, LENGTHS)
    model(idx, targets, LENGTHS).backward()
    optimizer.step()
    with pytest.raises(AssertionError, match="the weight has changed since the forward pass"):
        old.backward()


def test_a_computed_weight_and_frozen_positions_take_the_plain_way():
    layer, kept, x = Linear(8, 8), cpu.Kept(), torch.randn(4, 8).bfloat16()
    for scale in (1.0, 2.0):
        computed = layer.weight * scale
        expected = torch.addmm(layer.bias.bfloat16(), x, computed.bfloat16().t())
        with torch.no_grad():
            found = cpu.linear(x, computed, layer.bias, kept)  # which rounds before it adds the bias
        assert torch.allclose(found, expected, rtol=2e-2, atol=1e-2)
        cpu.linear(x, computed, layer.bias, kept).sum().backward()
    model, (idx, targets) = tiny(), packed_batch()
    plain = copy.deepcopy(model)
    model.wpe.weight.requires_grad_(False)
    for one in (model, plain):
        one(idx, targets, LENGTHS).backward()
    assert torch.equal(model.wte.weight.grad, plain.wte.weight.grad) and model.wpe.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_our_cross_entropy_is_torchs_with_its_gradient(dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(50, 60_000, generator=generator)).to(dtype)  # several slices
    targets = torch.randint(0, 60_000, (50,), generator=generator)
    targets[[3, 49]] = IGNORE
    scale, found, expected = torch.randn(50, generator=generator), logits.clone(), logits.clone()
    found, expected = found.requires_grad_(), expected.requires_grad_()
    losses = model_module.CrossEntropy.apply(found + 0, targets)
    reference = torch.nn.functional.cross_entropy(model_module.widened(expected), targets, ignore_index=IGNORE,
                                                  reduction="none")
    assert torch.allclose(losses, reference, rtol=1e-6, atol=1e-5)
    (losses * scale).sum().backward()
    (reference * scale).sum().backward()
    assert torch.allclose(found.grad, expected.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-9, atol=1e-9)


def test_every_target_has_its_own_loss_and_the_tail_has_none():
    model, (idx, targets) = tiny().double(), packed_batch()
    each = model(idx, targets, LENGTHS, each=True)
    assert len(each) == int((targets != IGNORE).sum()) and len(each) % 32
    logits = model(idx, lengths=LENGTHS)
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(each, expected[targets != IGNORE])
    assert torch.allclose(each.sum(), model(idx, targets, LENGTHS))


def test_a_tail_stands_in_free_cells_behind_the_sequences_and_within_the_context():
    for lengths, N, T in (([3, 5, 2], 16, 8), ([4, 4], 8, 4), ([7], 7, 8), ([1, 8], 16, 8)):
        layout = model_module.Layout.of(lengths, "cpu", N, T)
        index = layout.index if layout.index is not None else torch.arange(N)
        assert len(index) == N == len(index.unique()) and layout.shape == (len(lengths), T)
        rows, start = index // T, 0
        for row, length in enumerate(lengths):
            assert (rows[start:start + length] == row).all()
            assert layout.position[start:start + length].tolist() == list(range(length))
            start += length
        for row, position in zip(rows[start:], layout.position[start:], strict=True):
            assert lengths[row] <= position < T


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_loads(bias, tmp_path):
    """Compiled, so with a prefix; the head beside the embedding; matrices as nn.Linear has them."""
    model = tiny()
    if not bias:
        for name, parameter in model.named_parameters():
            parameter.data *= not name.endswith("bias")
    state = {f"_orig_mod.transformer.{name}": tensor for name, tensor in model.state_dict().items()
             if bias or not name.endswith("bias")}
    state["_orig_mod.lm_head.weight"] = model.wte.weight.detach()
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=bias, vocab_size=257, dropout=0.0)
    torch.save({"model": state, "model_args": args, "iter_num": 5, "config": {"dataset": "x"}}, tmp_path / "ckpt.pt")
    idx = torch.arange(60)[None]
    assert torch.equal(GPT.from_pretrained(tmp_path / "ckpt.pt")(idx), model(idx))
    torch.save({"format_version": 1, "model": {}}, tmp_path / "ours.pt")
    with pytest.raises(UserError, match="ours.pt is no checkpoint of nanoGPT; for one of train.py name its out_dir"):
        GPT.from_pretrained(tmp_path / "ours.pt")
