"""Models as files: safetensors as the library has them, every layout of GPT-2 and of adapters, the hub's cache."""
import hashlib
import http.server
import json
import threading
import weakref

import peft
import pytest
import torch
import transformers
from conftest import randomise, tiny
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file

from model import GPT
from nanosft import weights
from nanosft.console import UserError
from nanosft.weights import read_gpt2, read_safetensors, read_tensors, write_safetensors

IDX = torch.arange(48)[None]


def logits(model):
    with torch.no_grad():
        found = model.eval()(IDX)
    return found if isinstance(found, torch.Tensor) else found.logits


def assert_same_logits(ours, theirs, tolerance=1e-4):
    expected = logits(theirs)
    assert (logits(ours) - expected).abs().max() < tolerance * expected.std()


def reference(n_layer=2, n_head=4, n_embd=32, vocab_size=257, n_positions=64, **changes):
    """A GPT-2 of transformers with every value random."""
    config = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=vocab_size,
                                     n_positions=n_positions, **{"bos_token_id": 256, "eos_token_id": 256, **changes})
    return randomise(transformers.GPT2LMHeadModel(config).eval())


def with_config(path, model, change):
    """Saves the model with these entries of config.json changed."""
    model.save_pretrained(path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **change}))


# ---- safetensors ----------------------------------------------------------------------------------------------------

def test_safetensors_are_what_the_library_writes_and_reads(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(4).bfloat16(), "c": torch.arange(6).view(2, 3),
               "d": torch.zeros(0, 2), "e": torch.randn(3, 5).double(), "f": torch.tensor(True)}
    write_safetensors(tmp_path / "ours", {**tensors, "a": tensors["a"].t().contiguous().t()})  # in any memory layout
    save_file(tensors, tmp_path / "theirs")
    for read in (load_file(tmp_path / "ours"), dict(read_safetensors(tmp_path / "theirs"))):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("header, data", [
    (b"[1]", 8), ({"a": A}, 4), ({"a": A}, 9), ({"a": {**A, "shape": 2}}, 8), ({"a": 3}, 8),
    ({"a": {**A, "shape": [3]}}, 8), ({"a": {**A, "shape": [-1, -2]}}, 8), ({"a": {**A, "dtype": "F33"}}, 8),
    ({"a": {**A, "data_offsets": [-8, 0]}}, 8), ({"a": {**A, "data_offsets": [8, 16]}}, 16),
    ({"a": {"dtype": "F32"}}, 8), ({"a": A, "b": {**A, "data_offsets": [4, 12]}}, 12),
    ({"a": {**A, "shape": [0, 10**30], "data_offsets": [0, 0]}}, 0)])
def test_a_false_safetensors_file_is_refused_in_one_line(header, data, tmp_path):
    path, text = tmp_path / "weights.safetensors", header if isinstance(header, bytes) else json.dumps(header).encode()
    for length in (len(text), 1 << 60):
        path.write_bytes(length.to_bytes(8, "little") + text + bytes(data))
        with pytest.raises(UserError, match="no valid safetensors file.*download or write it again") as caught:
            list(read_safetensors(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_that_were_taken_are_held_by_nobody_else(name, tmp_path):
    state, seen = {str(i): torch.randn(9) for i in range(5)}, []
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        write_safetensors(tmp_path / name, state)
    for _, tensor in read_tensors(tmp_path / name):
        seen.append(weakref.ref(tensor))
        assert all(earlier() is None for earlier in seen[:-1])


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------

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
    ({"n_layer": 3}, 'Missing.* "h.2.ln_1.weight"'), ({"n_embd": 64}, "size mismatch for wte.weight"),
    ({"model_type": "llama"}, "model_type is 'llama'"), ({"activation_function": "relu"}, "activation_function"),
    ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"), ({"scale_attn_weights": False}, "scale_attn_weights"),
    ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"), ({"tie_word_embeddings": False}, "tie_word"),
    ({"n_head": 5}, "no multiple")])
def test_a_config_that_does_not_match_is_refused_by_name(change, message, tmp_path):
    with_config(tmp_path, tiny(), change)
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("given, vocab_size, expected", [(7, 257, 7), (None, 257, 256), (50256, 50304, 50256),
                                                         (None, 50304, 50256), ([3, 4], 257, 256), (999, 257, 256)])
def test_end_of_text_is_config_jsons_or_gpt2s_own(given, vocab_size, expected, tmp_path):
    with_config(tmp_path, tiny(vocab_size=vocab_size), {"eos_token_id": given})
    model = GPT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "back")
    saved = json.loads((tmp_path / "back" / "config.json").read_text())
    assert model.config.eos_token_id == saved["eos_token_id"] == saved["bos_token_id"] == expected


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_loads(bias, tmp_path):
    """Compiled, so with a prefix; the head beside the embedding; matrices as nn.Linear has them."""
    model = tiny()
    if not bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
    state = {f"_orig_mod.transformer.{name}": tensor for name, tensor in model.state_dict().items()
             if bias or not name.endswith("bias")}
    state["_orig_mod.lm_head.weight"] = model.wte.weight.detach()
    args = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, bias=bias, vocab_size=257, dropout=0.0)
    torch.save({"model": state, "model_args": args, "iter_num": 5, "config": {"dataset": "x"}}, tmp_path / "ckpt.pt")
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "ckpt.pt")), logits(model))
    torch.save({"format_version": 1, "model": {}}, tmp_path / "ours.pt")
    with pytest.raises(UserError, match="ours.pt is no checkpoint of nanoGPT; for one of train.py name its out_dir"):
        GPT.from_pretrained(tmp_path / "ours.pt")


# ---- the hub --------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with the real one's paths, redirect and headers. hub.fault: '' | 'cut' | 'corrupt' | 'gone'."""
    tiny(vocab_size=50257, n_embd=64, n_head=1).save_pretrained(tmp_path / "remote")
    content = (tmp_path / "remote" / "model.safetensors").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.server.requests.append(f"{self.command} {self.path}")
            status, headers = 200, {"Content-Length": len(content)}
            if not self.path.startswith("/storage"):
                status, headers = 302, {"Location": f"http://127.0.0.1:{self.server.server_port}/storage",
                                        "Content-Length": 0, "X-Repo-Commit": "0123456789" * 4,
                                        "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if self.server.fault == "gone":
                status, headers = 404, {"Content-Length": 0}
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, str(value))
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
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_weights_are_downloaded_once_into_the_usual_cache(hub, tmp_path):
    state, numbers = read_gpt2(weights.locate("gpt2"))
    assert torch.equal(state["wte.weight"], GPT.from_pretrained(tmp_path / "remote").wte.weight)
    assert numbers["n_embd"] == 64 and numbers["n_head"] == 1 and hub.requests[-1] == "GET /storage"
    asked, repository = list(hub.requests), hub.cache / "models--openai-community--gpt2"
    assert weights.locate("gpt2").name == "model.safetensors" and hub.requests == asked
    assert try_to_load_from_cache("openai-community/gpt2", "model.safetensors", cache_dir=hub.cache)
    content = weights.locate("gpt2").read_bytes()
    weights.locate("gpt2").resolve().write_bytes(content[:99])  # a blob that was cut short is fetched anew
    (repository / "refs" / "main").unlink()
    assert weights.locate("gpt2").read_bytes() == content and len(hub.requests) > len(asked)
    asked = list(hub.requests)
    repository.rename(hub.cache / "models--gpt2")  # the repository's former name
    assert weights.locate("gpt2").read_bytes() == content and hub.requests == asked


@pytest.mark.parametrize("fault", ["cut", "corrupt", "gone", "offline"])
def test_a_broken_download_leaves_nothing_and_says_what_to_do(fault, hub, monkeypatch):
    hub.fault, message = fault, "download of openai-community/gpt2 failed.*try again, or name the path of a copy"
    if fault == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        message = "openai-community/gpt2 is not in .* and HF_HUB_OFFLINE is set; unset it, or name the path of a copy"
    with pytest.raises(UserError, match=message):
        weights.locate("gpt2")
    assert not [path for path in hub.cache.rglob("*") if path.is_file()]
    hub.fault = ""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert weights.locate("gpt2").is_file()


# ---- adapters -------------------------------------------------------------------------------------------------------

@pytest.fixture
def base(tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora_model(base, targets=("c_attn", "c_proj", "c_fc"), seed=3):
    """The base with a LoRA update with every value random."""
    model, generator = base.add_lora(4, 6.0, 0.0, targets), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


@pytest.mark.parametrize("targets", [("c_attn", "c_proj", "c_fc"), ("c_attn",), ("attn.c_proj",)])
def test_our_adapter_gives_the_same_logits_in_peft(base, tmp_path, targets):
    model = lora_model(GPT.from_pretrained(base), targets)
    model.save_adapter(tmp_path / "adapter", str(base))
    assert_same_logits(model, peft.PeftModel.from_pretrained(
        transformers.GPT2LMHeadModel.from_pretrained(base), tmp_path / "adapter"))
    assert torch.equal(logits(GPT.from_pretrained(tmp_path / "adapter")), logits(model))
    assert set(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == {
        f"base_model.model.transformer.{name}.weight" for name, _ in model.named_parameters() if "lora" in name}


def peft_model(base, **options):
    config = dict(r=4, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True,
                  task_type="CAUSAL_LM")
    return peft.get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base),
                               peft.LoraConfig(**{**config, **options}))


def test_an_adapter_made_by_peft_loads_here(base, tmp_path):
    theirs = peft_model(base)
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    assert_same_logits(GPT.from_pretrained(tmp_path / "adapter"), theirs)


@pytest.mark.parametrize("options, name", [
    (dict(use_rslora=True), "use_rslora=True"), (dict(use_dora=True), "use_dora=True"),
    (dict(bias="all"), "bias='all'"), (dict(modules_to_save=["wte"]), "modules_to_save"),
    (dict(rank_pattern={"c_attn": 2}), "rank_pattern")])
def test_options_of_pefts_that_we_do_not_have_are_refused_by_name(options, name, base, tmp_path):
    peft_model(base, **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"the adapter's option {name}"):
        GPT.from_pretrained(tmp_path / "adapter")
