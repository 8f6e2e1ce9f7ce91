"""Models as files: Hugging Face's directories, nanoGPT's ckpt.pt, LoRA adapters in PEFT's layout.

Tensors are read one by one, so that a file is never in memory twice.
"""
import math
import re
from pathlib import Path

import torch

from nanosft.console import UserError
from nanosft.files import read_json, write_json
from nanosft.hub import PICKLES, weight_files
from nanosft.tensors import read_pickle, read_safetensors, taken_from, write_safetensors

# what model.py computes, in the words of config.json; a value that is not named there is the one here
ARCHITECTURE = {
    "gpt2": {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
             "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True},
    "llama": {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}}
# GPTConfig's numbers by their names there
NUMBERS = {
    "gpt2": {"block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
             "n_embd": "n_embd"},
    "llama": {"block_size": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers",
              "n_head": "num_attention_heads", "n_embd": "hidden_size", "n_kv_head": "num_key_value_heads",
              "head_dim": "head_dim", "n_inner": "intermediate_size"}}
NUMBERS |= dict.fromkeys(("qwen2", "qwen3"), NUMBERS["llama"])
PADDING = 512  # a model may have fewer than these ids that its tokenizer lacks, for speed; Qwen has up to 399
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # Llama 3's
LLAMA = dict(fused_qkv=False, gated_mlp=True, bias=False, rms_norm=True)  # in GPTConfig
PREFIXES = re.compile(r"^((transformer|model|module|_orig_mod)\.)+")  # those that some files lack or add
RENAMED = {"wte.": "embed_tokens.", "h.": "layers.", "ln_1.": "input_layernorm.", "ln_2.": "post_attention_layernorm.",
           "ln_f.": "norm.", "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
           "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
           "attn.k_norm": "self_attn.k_norm", "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj",
           "mlp.c_proj": "mlp.down_proj"}  # model.py's names in the files of all but GPT-2
TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")  # GPT-2's files hold these as (in, out)
BIASED = re.compile(r"(ln_.|c_\w+)\.weight$")
MASKS = re.compile(r"h\.\d+\.(attn\.(masked_)?bias|self_attn\.rotary_emb\.inv_freq)")  # no weights, in old files


def family_of(config):
    if not config.rope_theta:
        return "gpt2"
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"


def rename(name, names):
    """`name` with its parts replaced, each from its beginning on."""
    return re.sub("|".join(rf"(?<![a-z_]){re.escape(part)}" for part in names), lambda match: names[match[0]], name)


def file_name(config, name):
    """The name that a layer or tensor of model.py has in the family's files."""
    if name.startswith("lm_head"):
        return name
    return f"model.{rename(name, RENAMED)}" if config.rope_theta else f"transformer.{name}"


def own_name(family, name):
    """The name in model.py of a layer or tensor of the family's files."""
    name = PREFIXES.sub("", name)
    return rename(name, {theirs: ours for ours, theirs in RENAMED.items()}) if family != "gpt2" else name


# ---- configuration --------------------------------------------------------------------------------------------------

def checked(numbers, path):
    """GPTConfig's numbers as they were read from this file, if they can be a model's, with an end-of-text id."""
    for name in sorted({**NUMBERS["gpt2"], **numbers}.keys() & NUMBERS["llama"].keys()):
        number = numbers.get(name)
        if type(number) is not int or not 0 < number < 1 << 24:
            raise UserError(f"{path} is no configuration of a model: {name} is {number!r}; download or write it again")
    if "head_dim" not in numbers and numbers["n_embd"] % numbers["n_head"]:
        raise UserError(f"{path}: n_embd={numbers['n_embd']} is no multiple of n_head={numbers['n_head']}; correct it")
    if numbers["n_head"] % numbers.get("n_kv_head", 1):
        raise UserError(f"{path}: {numbers['n_head']} heads are no multiple of {numbers['n_kv_head']}; correct it")
    eos = numbers.get("eos_token_id")
    if isinstance(eos, list) and eos:
        eos = eos[0]
    if type(eos) is not int or not 0 <= eos < numbers["vocab_size"]:
        eos = min(50256, numbers["vocab_size"] - 1)  # GPT-2's own, or the last id of a smaller vocabulary
    bos = numbers.get("bos_token_id")
    return {**numbers, "eos_token_id": eos, "bos_token_id": bos if type(bos) is int else eos}


def read_config(path):
    """(family, GPTConfig's values) of a config.json; UserError names the first thing that model.py does not compute."""
    values = read_json(path)
    family = str(values.get("model_type", "gpt2"))
    if family not in ARCHITECTURE:
        raise UserError(f"{path}: model_type is {family!r}; take one of {', '.join(ARCHITECTURE)}")
    for name, ours in ARCHITECTURE[family].items():
        if values.get(name, ours) != ours:
            raise UserError(f"{path}: {name} is {values[name]!r}; take a {family} with its own {ours!r}")
    defaults = {"n_positions": 1024, "vocab_size": 50257} if family == "gpt2" else {}
    values = {**defaults, **values}
    numbers = {ours: values[theirs] for ours, theirs in NUMBERS[family].items() if values.get(theirs) is not None}
    numbers = checked({**numbers, **{name: values.get(name) for name in ("bos_token_id", "eos_token_id")}}, path)
    if family == "gpt2":
        return family, numbers
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}  # the older name counts more
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_parameters or rope_scaling is {rope!r}; download or write it again")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: rope_type is {kind!r}; only default and llama3 are supported: take another {family}")
    scaling = {name: rope.get(name) for name in SCALING} if kind == "llama3" else {}
    theta, epsilon = rope.get("rope_theta") or values.get("rope_theta") or 10000.0, values.get("rms_norm_eps", 1e-6)
    if not all(isinstance(number, int | float) and number > 0 for number in (theta, epsilon, *scaling.values())):
        raise UserError(f"{path}: rms_norm_eps, rope_theta or rope_scaling is no number; download or write it again")
    return family, {**LLAMA, "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3", **numbers,
                    "norm_eps": epsilon, "rope_theta": float(theta),
                    "rope_scaling": {"rope_type": kind, **scaling} if scaling else None,
                    "tied_head": bool(values.get("tie_word_embeddings", False))}


def config_from(state, path):
    """GPTConfig's numbers as weights without a config.json imply them; every GPT-2 has heads of 64."""
    try:
        vocab_size, n_embd = state["wte.weight"].shape
        block_size, _ = state["wpe.weight"].shape
        n_layer = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    except (KeyError, ValueError):
        raise UserError(f"{path} holds no GPT-2: expected the matrices wte.weight and wpe.weight and layers h.0, h.1 "
                        "...; other models need their config.json beside it") from None
    if n_embd % 64:
        raise UserError(f"{path}: n_embd={n_embd} is no multiple of 64; put the model's config.json beside it")
    return checked({"block_size": block_size, "vocab_size": vocab_size, "n_layer": n_layer, "n_head": n_embd // 64,
                    "n_embd": n_embd}, path)


def write_config(path, config, dtype):
    family = family_of(config)
    values = {"architectures": ["GPT2LMHeadModel" if family == "gpt2" else f"{family.capitalize()}ForCausalLM"],
              **ARCHITECTURE[family], "torch_dtype": str(dtype).removeprefix("torch."),
              "bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id,
              **{theirs: getattr(config, ours) for ours, theirs in NUMBERS[family].items()}}
    if family == "gpt2":
        values |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout)
    else:
        values |= {"rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
                   "rope_scaling": config.rope_scaling, "tie_word_embeddings": config.tied_head}
    write_json(path, values)


# ---- weights --------------------------------------------------------------------------------------------------------

def read_tensors(path):
    """(pairs of name and tensor, GPTConfig's numbers or None) of a .safetensors file, of several with an index, or of a
    state dict, alone or in nanoGPT's checkpoint."""
    if path.suffix not in PICKLES:
        return (pair for file in weight_files(path) for pair in read_safetensors(file)), None
    saved, numbers = read_pickle(path), None
    try:
        if "model_args" in saved:
            numbers = checked({name: saved["model_args"][name] for name in NUMBERS["gpt2"]}, path)
        for key in ("model", "state_dict", "model_state_dict"):
            saved = saved.get(key, saved)
    except (KeyError, TypeError, AttributeError):
        saved = None
    return taken_from(saved, path), numbers


def lay(state):
    """Lays GPT-2's matrices as model.py's lie, (out, in), where they are (in, out), as OpenAI's are and nanoGPT's are
    not; biases that nanoGPT trained without become zeros."""
    widths = getattr(state.get("h.0.attn.c_attn.weight"), "shape", ())
    if len(widths) == 2 and widths[1] == 3 * widths[0]:
        for name in filter(TRANSPOSED.search, state):
            if state[name].dim() == 2:  # in its own memory: freed pieces would be too small for the next one
                transposed = state[name].t().contiguous()
                state[name] = state[name].view_as(transposed).copy_(transposed)
    elif not any(name.endswith("c_attn.bias") for name in state):
        for name in list(filter(BIASED.search, state)):
            state.setdefault(name.removesuffix("weight") + "bias", state[name].new_zeros(state[name].shape[:1]))


def read_pretrained(path, dtype):
    """(state, values) of a model's weights file, or index: its tensors in `dtype` with the names and shapes of
    model.py's parameters, if it is one, and its GPTConfig's values."""
    config, state, family = path.parent / "config.json", {}, "gpt2"
    tensors, values = read_tensors(path)
    if config.exists() and not values:
        family, values = read_config(config)
    for name, tensor in tensors:
        name = own_name(family, name)
        if name in state:
            raise UserError(f"{path} holds {name} twice, under different prefixes; download or write it again")
        if not MASKS.fullmatch(name):
            state[name] = tensor.to(dtype, copy=path.suffix in PICKLES).contiguous()  # there several may share memory
    if family == "gpt2":
        lay(state)
    values = values or config_from(state, path)
    if values.get("tied_head", True):
        head = state.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state.get("wte.weight", head)):
            raise UserError(f"{path}: the output head is not the token embedding, as config.json says; take another")
    return state, values


def write_pretrained(directory, state, config):
    """Writes config.json and model.safetensors in Hugging Face's layout; `state` and `config` as model.py has them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_config(directory / "config.json", config, state["wte.weight"].dtype)
    transposed = family_of(config) == "gpt2"
    write_safetensors(directory / "model.safetensors", {  # last: no weights without their configuration
        file_name(config, name): tensor.t() if transposed and TRANSPOSED.search(name) else tensor
        for name, tensor in state.items()})


# ---- LoRA adapters in PEFT's layout ---------------------------------------------------------------------------------

# entries of an adapter_config.json that are read here, or change nothing about what the adapter computes
KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path", "peft_type",
         "peft_version", "task_type", "fan_in_fan_out", "inference_mode", "auto_mapping", "runtime_config",
         "megatron_core", "qalora_group_size"}
USUAL = [("bias", "none"), ("revision", "main"),
         *(("init_lora_weights", name) for name in (True, "gaussian", "orthogonal"))]


def read_adapter(directory, config):
    """(rank, alpha, dropout, {layer: {"lora_A": (rank, in), "lora_B": (out, rank)}}) of a LoRA adapter, ours or peft's
    own; UserError for options that model.py lacks."""
    values, updates = read_json(Path(directory) / "adapter_config.json"), {}
    for name, value in values.items():
        if value and name not in KNOWN and (name, value) not in USUAL:
            raise UserError(f"{directory}: option {name}={value!r} is not supported; merge it into its base with peft")
    rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
    are_numbers = type(rank) is int and all(type(number) in (int, float) for number in (alpha, dropout))
    if not are_numbers or rank < 1 or not 0 <= alpha < math.inf or not 0 <= dropout < 1:
        raise UserError(f"{directory}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r} in "
                        "adapter_config.json make no adapter; write or download it again")
    old, new = (Path(directory) / f"adapter_model.{kind}" for kind in ("bin", "safetensors"))
    for name, tensor in read_tensors(old if old.exists() and not new.exists() else new)[0]:
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", name)
        if not match or match[1].endswith("lm_head"):
            raise UserError(f"{directory}: the adapter holds {name}; expected lora_A and lora_B of linear layers in "
                            "blocks alone: merge it into its base with peft")
        updates.setdefault(own_name(family_of(config), match[1]), {})[match[2]] = tensor.float()
    if not updates:
        raise UserError(f"{directory}: the adapter holds no updates; write or download it again")
    return rank, alpha, dropout, updates


def write_adapter(directory, base, config, rank, alpha, dropout, updates):
    """Writes what read_adapter reads; `base` is the name or path of the model that it was trained on."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "adapter_model.safetensors", {
        f"base_model.model.{file_name(config, layer)}.{part}.weight": tensor
        for layer, parts in updates.items() for part, tensor in parts.items()})
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "lora_dropout": dropout, "bias": "none", "fan_in_fan_out": family_of(config) == "gpt2",
        "inference_mode": True,
        "target_modules": sorted({re.sub(r".*\.\d+\.", "", file_name(config, layer)) for layer in updates})})
