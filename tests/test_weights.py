"""Models as files: safetensors as the library has them, every layout of a model and of adapters, the hub's cache."""
import hashlib
import http.server
import json
import threading
import weakref

import peft
import pytest
import torch
import transformers
from conftest import FAMILIES, assert_same_logits, logits, theirs, tiny, tiny_llama, with_lora
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file, save_file

from model import GPT
from nanosft.console import UserError
from nanosft.hub import INDEX, locate
from nanosft.tensors import read_safetensors, write_safetensors
from nanosft.weights import TRANSPOSED, read_tensors


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


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_that_were_taken_are_held_by_nobody_else(name, tmp_path):
    state, seen = {str(i): torch.randn(9) for i in range(5)}, []
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
    else:
        write_safetensors(tmp_path / name, state)
    for _, tensor in read_tensors(tmp_path / name)[0]:
        seen.append(weakref.ref(tensor))
        assert all(earlier() is None for earlier in seen[:-1])


# ---- directories ----------------------------------------------------------------------------------------------------

def test_an_old_file_of_the_hubs_loads(family, tmp_path):
    """An old-format .bin, names without a prefix, causal masks or rotary frequencies among the weights; of GPT-2 the
    head beside the embedding and no config.json."""
    changes = dict(vocab_size=50257, block_size=1024, n_embd=128, n_head=2, eos_token_id=50256, bos_token_id=50256)
    model = FAMILIES[family](**changes if family == "gpt2" else {})
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if family == "gpt2":
        (tmp_path / "config.json").unlink()
        state["lm_head.weight"] = state["transformer.wte.weight"]
        state |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 1024, 1024).tril() for layer in range(2)}
    else:
        state |= {f"layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    state = {name.removeprefix("transformer.").removeprefix("model."): tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    old = GPT.from_pretrained(tmp_path)
    assert torch.equal(logits(old), logits(model)) and old.config == model.config
    if family == "gpt2":
        torch.save(state | {"lm_head.weight": state["wte.weight"] + 1}, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="output head is not the token embedding"):
            GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("make, change, message", [
    *((tiny, *row) for row in (
        ({"n_layer": 3}, 'Missing.* "h.2.ln_1.weight"'), ({"n_embd": 64}, "size mismatch for wte.weight"),
        ({"activation_function": "relu"}, "activation_function"), ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_weights": False}, "scale_attn_weights"), ({"tie_word_embeddings": False}, "tie_word"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer"), ({"n_head": 5}, "no multiple"))),
    *((tiny_llama, *row) for row in (
        *(({"model_type": other}, f"model_type is '{other}'; take one of gpt2, llama, q")
          for other in ("mistral", "gemma", "gpt_neox")),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window is True; take a qwen2 with its"),
        ({"attention_bias": True}, "attention_bias is True; take a llama with its own False"),
        ({"mlp_bias": True}, "mlp_bias is True"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; take a llama with"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; only default and llama3 are"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}}, "rope_type is 'yarn'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
         "rope_theta or rope_scaling is no number"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3'; download or write it again"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of 3"), ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"num_hidden_layers": 3}, 'Missing.* "h.2.ln_1.weight"'), ({"head_dim": 8}, "size mismatch for h.0.attn.c_q"),
        ({"tie_word_embeddings": True}, "output head is not the token embedding")))])
def test_a_config_that_does_not_match_is_refused_by_name(make, change, message, tmp_path):
    with_config(tmp_path, make(), change)
    with pytest.raises(UserError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def in_several_files(model, path):
    """transformers' model of ours, saved at this path in files of 30 KB."""
    model.save_pretrained(path)
    others = theirs(path)
    (path / "model.safetensors").unlink()
    others.save_pretrained(path, max_shard_size="30KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return others


def test_several_files_with_an_index_are_one_model(family, tmp_path):
    model = FAMILIES[family]()
    assert_same_logits(model, in_several_files(model, tmp_path / "several"))
    assert torch.equal(logits(tmp_path / "several"), logits(model))
    several = sorted(tmp_path.glob("several/*.safetensors"))
    index = json.loads((tmp_path / "several" / INDEX).read_text())
    several[1].unlink()
    with pytest.raises(OSError, match=f"No such file or directory: .*{several[1].name}"):
        GPT.from_pretrained(tmp_path / "several")
    for name in "../one/model.safetensors", "/etc/passwd", 3, ["a"]:
        index["weight_map"]["lm_head.weight"] = name
        (tmp_path / "several" / INDEX).write_text(json.dumps(index))
        with pytest.raises((UserError, OSError), match="index.json names no files; download or write it again|file.*3"):
            GPT.from_pretrained(tmp_path / "several" / INDEX)


@pytest.mark.parametrize("given, vocab_size, expected", [(7, 257, 7), (None, 257, 256), (50256, 50304, 50256),
                                                         (None, 50304, 50256), ([3, 4], 257, 3), (999, 257, 256)])
def test_end_of_text_is_config_jsons_or_gpt2s_own(given, vocab_size, expected, tmp_path):
    with_config(tmp_path, tiny(vocab_size=vocab_size), {"eos_token_id": given})
    model = GPT.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "back")
    saved = json.loads((tmp_path / "back" / "config.json").read_text())
    assert model.config.eos_token_id == saved["eos_token_id"] == expected and saved["bos_token_id"] == 256


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
    with pytest.raises(UserError, match="ours.pt does not fit|ours.pt holds no"):
        GPT.from_pretrained(tmp_path / "ours.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "model.", "module._orig_mod.", "transformer."])
@pytest.mark.parametrize("kind", ["x.pt", "x.pth", "pytorch_model.bin", "model.safetensors"])
def test_a_state_dict_loads_under_any_prefix_with_matrices_laid_either_way(kind, prefix, tmp_path):
    """As people save it: bare, or in a dict beside the optimizer; OpenAI's (in, out) or nn.Linear's (out, in)."""
    model = tiny(n_embd=64, n_head=1)  # what weights without a config.json imply
    expected = logits(model)
    for turned in (False, True):
        state = {prefix + name: (tensor.t() if turned and TRANSPOSED.search(name) else tensor).contiguous()
                 for name, tensor in model.state_dict().items()}
        if kind.endswith("safetensors"):
            save_file(state, tmp_path / kind)
            assert torch.equal(logits(GPT.from_pretrained(tmp_path / kind)), expected)
            continue
        for saved in (state, {"model_state_dict": state, "optimizer": {}}, {"state_dict": state, "epoch": 3}):
            torch.save(saved, tmp_path / kind)
            assert torch.equal(logits(GPT.from_pretrained(tmp_path / kind)), expected)


def test_distilgpt2_loads(tmp_path):
    config = transformers.GPT2Config(n_layer=6, vocab_size=1000, _num_labels=1, task_specific_params={"x": {}})
    others = transformers.GPT2LMHeadModel(config).eval()
    others.save_pretrained(tmp_path)
    model = GPT.from_pretrained(tmp_path)
    assert_same_logits(model, others)
    assert (model.config.n_layer, model.config.n_head, model.config.n_embd) == (6, 12, 768)


# ---- the hub --------------------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with the real one's paths, redirects and headers, whose repositories all hold what is in hub.remote.
    Those of `gated` are for the token `right`, those of `moved` now are of `gated`. hub.fault: a file and what is wrong
    with it: cut | corrupt | gone | untold."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            server.requests.append(f"{self.command} {self.path}")
            owner, file = self.path.split("/")[1], server.remote / self.path.split("/")[-1]
            # somebody pushes while a download goes on: main is another commit from the second file on
            asked = self.path.split("/")[-2].replace("main", COMMIT if file.stem.endswith("r_config") or (
                file.stem == "config") else "9" * 40)
            token, fault = self.headers["Authorization"], server.fault.removeprefix(f"{file.name} ")
            content = file.read_bytes() if file.is_file() and fault != "gone" else b""
            sha256, sha1 = (hashlib.new(kind, start + content).hexdigest() for kind, start in (
                ("sha256", b""), ("sha1", b"blob %d\0" % len(content))))
            status, headers = 200, {"X-Repo-Commit": asked, "ETag": f'"{sha1}"', "X-Linked-Etag": f'"{sha1}"'}
            if owner == "storage":  # another host, which must not see the token
                status = 400 if token else 200
            elif owner == "moved":
                status, headers = 307, {"Location": self.path.replace("moved", "gated")}
            elif owner == "gated" and token != "Bearer right":
                status = 403 if token else 401
            elif not content:
                status = 404
            elif file.suffix == ".safetensors":
                scheme = "" if owner == "gated" else "http:"
                status, headers["Location"] = 302, f"{scheme}//localhost:{server.server_port}/storage/{file.name}"
                headers |= {"X-Linked-Etag": f'"{sha256}"'}
                del headers["ETag"]
            if fault == "untold":
                del headers["X-Repo-Commit"]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": len(content) if status == 200 else 0}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET" and status == 200:
                self.wfile.write({"cut": content[:-9], "corrupt": content[:-1] + b"x"}.get(fault, content))

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fault, server.requests, server.cache, server.remote = "", [], tmp_path / "hf" / "hub", tmp_path / "remote"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    tiny(vocab_size=50257, n_embd=64, n_head=1).save_pretrained(server.remote)
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_once_into_the_usual_cache(hub):
    state, path = logits(hub.remote), locate("gpt2")
    asked, repository = list(hub.requests), hub.cache / "models--openai-community--gpt2"
    assert path == repository / "snapshots" / COMMIT / "model.safetensors" and asked[-1].startswith("GET /storage")
    assert torch.equal(logits("gpt2"), state) and hub.requests == asked
    assert try_to_load_from_cache("openai-community/gpt2", "model.safetensors", cache_dir=hub.cache) == str(path)
    content, written = path.read_bytes(), path.stat().st_mtime_ns
    (repository / "refs" / "main").unlink()
    (path.parent / "config.json").unlink()  # this alone is written anew
    assert locate("gpt2") == path and path.stat().st_mtime_ns == written and (path.parent / "config.json").is_file()
    asked = list(hub.requests)
    repository.rename(hub.cache / "models--gpt2")  # the repository's former name
    assert locate("gpt2").read_bytes() == content and hub.requests == asked


@pytest.mark.parametrize("name", ["gated/llama", "moved/llama"])
def test_a_gated_model_in_several_files_comes_with_its_tokenizer_for_the_right_token(name, hub, monkeypatch):
    (hub.remote / "model.safetensors").unlink()
    model = in_several_files(tiny_llama(), hub.remote)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (hub.remote / file).write_text(file)
    remedy = "set HF_TOKEN to a token that may read it"
    (hub.remote / ".netrc").write_text("machine 127.0.0.1 login me password x\n")  # this is not for the hub
    monkeypatch.setenv("HOME", str(hub.remote))
    with pytest.raises(UserError, match=rf"refuses {name} \(401\): check the name; .*licence on .*{remedy}"):
        locate(name)
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match=rf"the hub refuses {name} \(403\): .*{remedy}"):
        locate(name)
    if name == "gated/llama":
        monkeypatch.setenv("HF_TOKEN", "right")
    else:
        monkeypatch.delenv("HF_TOKEN")
        hub.cache.parent.mkdir()
        (hub.cache.parent / "token").write_text("right\n")
    assert locate(name).name == INDEX
    assert_same_logits(GPT.from_pretrained(name), model)
    assert {path.name: path.read_bytes() for path in locate(name).parent.iterdir()} == {
        path.name: path.read_bytes() for path in hub.remote.iterdir() if path.name not in (
            "generation_config.json", ".netrc")}


def test_an_adapter_is_downloaded_by_name(hub, tmp_path):
    base = tmp_path / "base"
    hub.remote.rename(base)
    model = with_lora(GPT.from_pretrained(base))
    model.save_adapter(hub.remote, str(base))
    assert torch.equal(logits("somebody/adapter"), logits(model))
    asked = list(hub.requests)
    assert locate("somebody/adapter").name == "adapter_config.json" and hub.requests == asked
    (hub.remote / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="else/adapter has no adapter_model.safetensors: take another copy of it"):
        locate("else/adapter")


@pytest.mark.parametrize("fault, message", [
    *((f"{file} {fault}", "download of openai-community/gpt2 failed.*and the network and try again, or name the path")
      for file in ("config.json", "model.safetensors") for fault in ("cut", "untold")),
    ("model.safetensors corrupt", "gpt2/model.safetensors came damaged.*and the network and try again"),
    ("config.json gone", "the hub has no model openai-community/gpt2 with a config.json; check the name"),
    ("model.safetensors gone", "openai-community/gpt2 has no model.safetensors: take another copy of it"),
    ("offline", "openai-community/gpt2/.* is not in .* and HF_HUB_OFFLINE is set; unset it, or name the path")])
def test_a_broken_download_leaves_no_weights_and_says_what_to_do(fault, message, hub, monkeypatch):
    hub.fault = fault
    if fault == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        locate("gpt2")
    assert not [path for path in hub.cache.rglob("*") if path.is_file() and path.stat().st_size > 5000]
    hub.fault = ""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert torch.equal(logits("gpt2"), logits(hub.remote))


# ---- adapters -------------------------------------------------------------------------------------------------------

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc", "attn.c_proj"], **dict.fromkeys(("llama", "qwen3"), [
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])}


@pytest.fixture
def base(family, tmp_path):
    FAMILIES[family]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("part", [slice(None), slice(1), slice(3, None)])
def test_our_adapter_gives_the_same_logits_in_peft(part, family, base, tmp_path):
    model = with_lora(GPT.from_pretrained(base), TARGETS[family][part])
    model.save_adapter(tmp_path / "adapter", str(base))
    assert_same_logits(model, peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter"))
    assert torch.equal(logits(tmp_path / "adapter"), logits(model))


def peft_model(base, **options):
    config = dict(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(theirs(base), peft.LoraConfig(**{**config, **options}))


@pytest.mark.parametrize("part", [slice(None), slice(1, None, 2)])
def test_an_adapter_made_by_peft_loads_here(part, family, base, tmp_path):
    others = peft_model(base, target_modules=TARGETS[family][part])
    for name, parameter in others.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.1)
    others.save_pretrained(tmp_path / "adapter")
    assert_same_logits(GPT.from_pretrained(tmp_path / "adapter"), others)
    file = tmp_path / "adapter" / "adapter_model.safetensors"  # older versions of peft leave another
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    assert_same_logits(GPT.from_pretrained(tmp_path / "adapter"), others)


@pytest.mark.parametrize("options, name", [
    (dict(use_rslora=True), "use_rslora=True"), (dict(use_dora=True), "use_dora=True"),
    (dict(bias="all"), "bias='all'"), (dict(modules_to_save=["wte"]), "modules_to_save"),
    (dict(rank_pattern={"c_attn": 2}), "rank_pattern")])
def test_options_of_pefts_that_we_do_not_have_are_refused_by_name(options, name, tmp_path):
    tiny().save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", **options).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"option {name}"):
        GPT.from_pretrained(tmp_path / "adapter")


def test_layers_that_share_memory_in_a_file_are_each_transposed_once(tmp_path):
    tiny(n_layer=2).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    first, second = (next(name for name in state if name.endswith(f"h.{i}.mlp.c_fc.weight")) for i in (0, 1))
    torch.save(state | {second: state[first]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    weights = [block.mlp.c_fc.weight for block in GPT.from_pretrained(tmp_path).h[:2]]
    assert all(torch.equal(weight, state[first].t()) for weight in weights)
