"""Models as files: safetensors, .bin, nanoGPT's ckpt.pt, LoRA adapters in PEFT's layout.

Nothing that is read is ever executed. Tensors are read one by one, so that a file is never in memory twice.
"""
import json
import math
import os
import re
from pathlib import Path

import torch

from nanosft.console import UserError
from nanosft.files import atomic_file, read_json, write_json
from nanosft.hub import cached, download

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def write_safetensors(path, tensors):
    """Writes tensors by name in the safetensors format: 8 bytes of header length, a JSON header, the raw data."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data begin at a multiple of 8
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():  # copied to the CPU and made contiguous one at a time
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """Yields (name, tensor) of a safetensors file; UserError where its header and its size do not agree exactly."""
    size, end = os.path.getsize(path), 0
    with open(path, "rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            # tensors lie end to end, with no gap and nothing after the last
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (start, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
                if dtype is None:
                    raise ValueError(f"{name} is of the unknown dtype {entry['dtype']}")
                are_sizes = all(type(number) is int and number >= 0 for number in [*shape, start, stop])
                if not are_sizes or start != end or stop - start != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"{name} has a false offset or size")
                if 8 + length + stop > size:
                    raise ValueError(f"it ends before {name} does")
                end, tensor = stop, torch.empty(shape, dtype=dtype)
                file.readinto(tensor.view(-1).view(torch.uint8).numpy())
                yield name, tensor
            if 8 + length + end != size:
                raise ValueError("it holds more than its header says")
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # the last is torch's
            raise UserError(f"{path} is no valid safetensors file ({error}); download or write it again") from None


def read_pickle(path):
    """What torch.save wrote, if it is tensors and plain values; nothing in it is ever executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} holds no plain tensors ({type(error).__name__}); use the model's .safetensors"
                        ) from None


def read_tensors(path):
    """Yields (name, tensor) of a .safetensors or .bin file."""
    if path.suffix == ".safetensors":
        yield from read_safetensors(path)
        return
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; expected GPT-2's weights by name")
    for name in list(state):
        yield str(name), state.pop(name)  # the reader may free it


# ---- GPT-2 ----------------------------------------------------------------------------------------------------------

# n_layer, n_head, n_embd of OpenAI's weights
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
NUMBERS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # of GPTConfig
TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")  # Hugging Face's files hold these as (in, out)
MASKS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # causal masks, which some files hold
# what model.py computes, in the words of config.json and as its defaults; all else shows in the tensors
ARCHITECTURE = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}


def checked(numbers, path):
    """GPTConfig's numbers as they were read from this file, if they can be GPT-2's, with an end-of-text id."""
    for name in NUMBERS:
        number = numbers.get(name)
        if type(number) is not int or not 0 < number < 1 << 24:
            raise UserError(f"{path} is no GPT-2 configuration: {name} is {number!r}; download or write it again")
    if numbers["n_embd"] % numbers["n_head"]:
        raise UserError(f"{path}: n_embd={numbers['n_embd']} is no multiple of n_head={numbers['n_head']}; correct it")
    eos = numbers.get("eos_token_id")
    if type(eos) is not int or not 0 <= eos < numbers["vocab_size"]:
        eos = min(50256, numbers["vocab_size"] - 1)  # GPT-2's own, or the last id of a smaller vocabulary
    return {**{name: numbers[name] for name in NUMBERS}, "eos_token_id": eos}


def read_config(path):
    """GPTConfig's numbers in a Hugging Face config.json; UserError names the first thing that differs from GPT-2."""
    values = read_json(path)
    for name, ours in ARCHITECTURE.items():
        if values.get(name, ours) != ours:
            raise UserError(f"{path}: {name} is {values[name]!r}; only GPT-2's own {ours!r} is supported: take a GPT-2")
    return checked({"vocab_size": 50257, **values, "block_size": values.get("n_positions", 1024)}, path)


def config_from(state, path):
    """GPTConfig's numbers as weights without a config.json imply them; every GPT-2 has heads of 64."""
    try:
        vocab_size, n_embd = state["wte.weight"].shape
        block_size, _ = state["wpe.weight"].shape
        n_layer = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("h."))
    except (KeyError, ValueError):
        raise UserError(f"{path} holds no GPT-2: expected the matrices wte.weight and wpe.weight and layers h.0, h.1 "
                        "...") from None
    if n_embd % 64:
        raise UserError(f"{path}: n_embd={n_embd} is no multiple of 64; put the model's config.json beside it")
    return checked(dict(zip(NUMBERS, (block_size, vocab_size, n_layer, n_embd // 64, n_embd), strict=True)), path)


def read_nanogpt(path):
    """(pairs of name and tensor, numbers) of nanoGPT's ckpt.pt; biases that it was trained without are zeros."""
    saved = read_pickle(path)
    try:
        numbers = checked({name: saved["model_args"][name] for name in NUMBERS}, path)
        tensors = {name.removeprefix("_orig_mod."): tensor.float() for name, tensor in saved["model"].items()}
        for name in list(tensors):
            if re.search(r"(ln_.|c_\w+)\.weight$", name):
                tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(tensors[name])))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no checkpoint of nanoGPT; for one of train.py name its out_dir") from None
    return tensors.items(), numbers


def read_gpt2(path):
    """(state, numbers) of a GPT-2 in a .safetensors, .bin or nanoGPT's .pt file: its float32 tensors with the names and
    shapes of model.py's parameters, if it is one, and its configuration as GPTConfig takes it."""
    config, from_nanogpt, state = path.parent / "config.json", path.suffix == ".pt", {}
    if from_nanogpt:
        tensors, numbers = read_nanogpt(path)
    else:
        tensors, numbers = read_tensors(path), read_config(config) if config.exists() else None
    for name, tensor in tensors:
        name = name.removeprefix("transformer.")
        if name in state:
            raise UserError(f"{path} holds {name} twice, once as transformer.{name}; download or write it again")
        if TRANSPOSED.search(name) and tensor.dim() == 2 and not from_nanogpt:  # nanoGPT's matrices lie as ours do
            tensor = tensor.t()
        if not MASKS.fullmatch(name):
            state[name] = tensor.float().contiguous()
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.get("wte.weight", head)):
        raise UserError(f"{path}: the output head differs from the token embedding, and GPT-2 ties them: take a GPT-2")
    return state, numbers or config_from(state, path)


def write_gpt2(directory, state, config):
    """Writes config.json and model.safetensors in Hugging Face's layout; `state` and `config` as model.py has them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {
        "architectures": ["GPT2LMHeadModel"], **ARCHITECTURE, "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "bos_token_id": config.eos_token_id, "eos_token_id": config.eos_token_id,
        "torch_dtype": str(state["wte.weight"].dtype).removeprefix("torch.")})
    write_safetensors(directory / "model.safetensors", {  # last: no weights without their configuration
        f"transformer.{name}": tensor.t() if TRANSPOSED.search(name) else tensor for name, tensor in state.items()})


# ---- LoRA adapters in PEFT's layout ---------------------------------------------------------------------------------

# entries of an adapter_config.json that are read here, or change nothing about what the adapter computes
KNOWN = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path", "peft_type",
         "peft_version", "task_type", "fan_in_fan_out", "inference_mode", "auto_mapping", "revision", "runtime_config",
         "megatron_core", "qalora_group_size"}
USUAL = (("bias", "none"), ("init_lora_weights", True))


def read_adapter(directory):
    """(rank, alpha, dropout, {layer: {"lora_A": (rank, in), "lora_B": (out, rank)}}) of a LoRA adapter, ours or peft's
    own; UserError for options that model.py lacks."""
    values, updates = read_json(Path(directory) / "adapter_config.json"), {}
    for name, value in values.items():
        if value and name not in KNOWN and (name, value) not in USUAL:
            raise UserError(f"{directory}: the adapter's option {name}={value!r} is not supported; merge it into its "
                            "base with peft")
    rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
    are_numbers = all(type(number) in (int, float) for number in (rank, alpha, dropout))
    if not are_numbers or rank < 1 or not 0 <= alpha < math.inf or not 0 <= dropout < 1:
        raise UserError(f"{directory}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r} in "
                        "adapter_config.json make no adapter; write or download it again")
    for name, tensor in read_safetensors(Path(directory) / "adapter_model.safetensors"):
        match = re.fullmatch(r"base_model\.model\.transformer\.(.+)\.(lora_[AB])\.weight", name)
        if not match:
            raise UserError(f"{directory}: the adapter holds {name}, which is no LoRA update of GPT-2; expected "
                            "lora_A and lora_B of its layers alone")
        updates.setdefault(match[1], {})[match[2]] = tensor.float()
    if not updates:
        raise UserError(f"{directory}: the adapter holds no updates; write or download it again")
    return rank, alpha, dropout, updates


def write_adapter(directory, base, rank, alpha, dropout, updates):
    """Writes what read_adapter reads; `base` is the name or path of the model that it was trained on."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "adapter_model.safetensors", {
        f"base_model.model.transformer.{layer}.{part}.weight": tensor
        for layer, parts in updates.items() for part, tensor in parts.items()})
    write_json(directory / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": alpha,
        "lora_dropout": dropout, "bias": "none", "fan_in_fan_out": True, "inference_mode": True,
        "target_modules": sorted({layer.split(".", 2)[2] for layer in updates})})


def base_of(path):
    """The name or path of the base that an adapter_config.json names."""
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is {base!r}; write there which weights it was trained on")
    return base.removeprefix("openai-community/")


def locate(name_or_path):
    """The weights file behind a name of OpenAI's (downloaded on first use), a directory or a file."""
    path = Path(name_or_path)
    if name_or_path in SIZES and not path.exists():
        repository, file = f"openai-community/{name_or_path}", "model.safetensors"
        former = cached(name_or_path, file)  # under its former name many caches hold it
        return cached(repository, file) or former or download(repository, file)
    for directory in (path / "best", path / "last", path):
        for name in ("adapter_config.json", "model.safetensors", "pytorch_model.bin"):
            if (directory / name).is_file():
                return directory / name
    if path.is_dir():
        raise UserError(f"{path} holds neither model.safetensors nor pytorch_model.bin nor adapter_config.json")
    if not path.is_file() or path.suffix not in (".safetensors", ".bin", ".pt"):
        raise UserError(f"no model {name_or_path!r}: expected {', '.join(SIZES)}, or the path of a Hugging Face "
                        "directory, a .safetensors or .bin file, nanoGPT's ckpt.pt, or an out_dir of train.py")
    return path
