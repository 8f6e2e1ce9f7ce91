"""GPT-2 as files: OpenAI's weights from the Hugging Face hub, .safetensors and .bin, nanoGPT's ckpt.pt, LoRA adapters
in PEFT's layout, the tokenizer. Nothing that is read is executed, and what is written takes its place in one piece.
"""
import json
import math
import os
import re
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch

from console import UserError

SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
NUMBERS = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")  # of GPTConfig
TRANSPOSED = re.compile(r"(c_attn|c_proj|c_fc)\.weight$")  # GPT-2's own files hold these as (in, out)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


@contextmanager
def opened(path, mode, **options):
    """A file to write; where that fails, the error tells its name, as the system's own does not."""
    try:
        with open(path, mode, **options) as file:
            yield file
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def atomic_file(path):
    """A binary file that takes the place of `path` once it is written and synced; on an error nothing is left of it."""
    temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    try:
        with opened(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, values):
    with atomic_file(path) as file:
        file.write(json.dumps(values, indent=1).encode())


def read_json(path):
    """A JSON file that holds an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; download or write it again")
    return values


def write_safetensors(path, tensors, metadata=None):
    """Writes tensors by name in the safetensors format: 8 bytes of header length, a JSON header, the raw data."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_safetensors(path):
    """Yields (name, tensor) of a safetensors file; UserError where its header and its size do not agree exactly."""
    size, end = os.path.getsize(path), 0

    def check(true, message):
        if not true:
            raise ValueError(message)

    def unique(pairs):
        check(len(dict(pairs)) == len(pairs), "its header holds a name twice")
        return dict(pairs)

    with open(path, "rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            check(2 <= length <= size - 8, "its header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (start, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
                check(dtype, f"{name} is of the unknown dtype {entry['dtype']}")
                check(all(type(n) is int and n >= 0 for n in [*shape, start, stop]), f"{name} has a negative size")
                check(start == end and stop - start == math.prod(shape) * dtype.itemsize, f"{name} has a false offset")
                check(8 + length + stop <= size, f"it ends before {name} does")
                end, tensor = stop, torch.empty(shape, dtype=dtype)
                file.readinto(tensor.view(-1).view(torch.uint8).numpy())
                yield name, tensor
            check(8 + length + end == size, "it holds more than its header says")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # the last is torch's
            raise UserError(f"{path} is no valid safetensors file ({error}); download or write it again") from None


def read_pickle(path):
    """What torch.save wrote, if it is tensors and plain values; nothing in it is ever executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise UserError(f"{path} holds no plain tensors ({type(error).__name__}); "
                        "use the model's .safetensors") from None


def read_weights(path):
    """(name, tensor) pairs of a .safetensors or .bin file."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise UserError(f"{path} holds no state dict of tensors; expected GPT-2's weights by name")
    return state.items()


# ---- GPT-2 and its adapters ------------------------------------------------------------------------------------------

def checked(numbers, path):
    """GPTConfig's numbers as they were read from this file, if they can be GPT-2's."""
    for name, number in numbers.items():
        if type(number) is not int or not 0 < number < 1 << 24:
            raise UserError(f"{path} is no GPT-2 configuration: {name} is {number!r}; download or write it again")
    if numbers["n_embd"] % numbers["n_head"]:
        raise UserError(f"{path}: n_embd={numbers['n_embd']} is no multiple of n_head={numbers['n_head']}; correct it")
    return numbers


def read_nanogpt(path):
    """(state, numbers) of the ckpt.pt that nanoGPT writes, whose matrices lie as ours do; biases that it was
    trained without are zeros."""
    try:
        saved = read_pickle(path)
        args, state = saved["model_args"], {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor.float()
                                            for name, tensor in saved["model"].items()}
        numbers = checked({name: args[name] for name in NUMBERS}, path)
        for name in [name for name in state if name.endswith("weight") and ("ln_" in name or "c_" in name)]:
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(state[name])))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no checkpoint of nanoGPT; for one of train.py name its out_dir") from None
    return state, numbers


def read_config(path):
    """GPTConfig's numbers in a Hugging Face config.json; UserError for what is not GPT-2 as model.py defines it."""
    values = read_json(path)
    numbers = {name: values.get(name) for name in NUMBERS}
    numbers = checked({**numbers, "block_size": values.get("n_positions", 1024),
                       "vocab_size": values.get("vocab_size", 50257)}, path)
    only = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
            "add_cross_attention": False}
    for name, value in only.items():
        if values.get(name, value) not in (value, 4 * numbers["n_embd"] if name == "n_inner" else value):
            raise UserError(f"{path}: {name} is {values[name]!r}; only GPT-2's own {value!r} is supported: take a "
                            "GPT-2")
    return numbers


def config_from(state, path):
    """GPTConfig's numbers as a weights file without config.json implies them; every GPT-2 has heads of 64."""
    try:
        (vocab_size, n_embd), (block_size, _) = state["wte.weight"].shape, state["wpe.weight"].shape
        n_layer = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("h.")), default=-1)
    except (KeyError, ValueError):
        raise UserError(f"{path} holds no GPT-2: expected the matrices wte.weight and wpe.weight and layers h.0, h.1 "
                        "...") from None
    if n_embd % 64:
        raise UserError(f"{path}: n_embd={n_embd} is no multiple of 64; put the model's config.json beside it")
    return checked(dict(zip(NUMBERS, (block_size, vocab_size, n_layer, n_embd // 64, n_embd), strict=True)), path)


def read_gpt2(path):
    """(state, numbers) of a GPT-2 in a .safetensors, .bin or nanoGPT's .pt file: its tensors in float32 with the names
    and shapes of model.py's parameters, if it is one, and its configuration, as GPTConfig takes it."""
    if path.suffix == ".pt":
        state, numbers = read_nanogpt(path)
    else:
        state, beside = {}, path.parent / "config.json"
        for name, tensor in read_weights(path):
            name = name.removeprefix("transformer.")
            if name in state:
                raise UserError(f"{path} holds {name} twice, once as transformer.{name}; download or write it again")
            turned = TRANSPOSED.search(name) and tensor.dim() == 2
            state[name] = tensor.t().float().contiguous() if turned else tensor.float()
        numbers = read_config(beside) if beside.exists() else config_from(state, path)
    for name in [name for name in state if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)]:
        del state[name]  # causal masks that the hub's files hold
    head, embedding = state.pop("lm_head.weight", None), state.get("wte.weight")
    if head is not None and embedding is not None and not torch.equal(head.float(), embedding):
        raise UserError(f"{path}: the output head differs from the token embedding; GPT-2 ties them")
    return state, numbers


def write_gpt2(directory, state, config):
    """Writes config.json and model.safetensors in Hugging Face's layout; `state` and `config` as model.py has them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "vocab_size": config.vocab_size, "n_positions": config.block_size, "n_ctx": config.block_size,
        "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "layer_norm_epsilon": 1e-5,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "bos_token_id": config.vocab_size - 1, "eos_token_id": config.vocab_size - 1,
        "tie_word_embeddings": True, "torch_dtype": "float32"})
    write_safetensors(directory / "model.safetensors", {  # last: no weights without their config
        f"transformer.{name}": tensor.t() if TRANSPOSED.search(name) else tensor for name, tensor in state.items()})


def read_adapter(directory):
    """(rank, alpha, dropout, {layer: {"lora_A": (rank, in), "lora_B": (out, rank)}}) of a LoRA adapter in PEFT's
    layout, ours or peft's own; UserError for options that model.py lacks."""
    values = read_json(Path(directory) / "adapter_config.json")
    plain = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path",
             "peft_type", "peft_version", "task_type", "fan_in_fan_out", "inference_mode", "auto_mapping",
             "revision", "runtime_config", "megatron_core", "qalora_group_size"}
    for name, value in values.items():
        if name not in plain and value and (name, value) not in (("bias", "none"), ("init_lora_weights", True)):
            raise UserError(f"{directory}: the adapter's option {name}={value!r} is not supported; merge it into its "
                            "base with peft")
    rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1 or not all(type(number) in (int, float) and 0 <= number < limit
                                                    for number, limit in ((alpha, math.inf), (dropout, 1))):
        raise UserError(f"{directory}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r} in "
                        "adapter_config.json make no adapter; write or download it again")
    updates = {}
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


def tokenizer_files(encoding):
    """GPT-2's vocab.json and merges.txt, recovered from tiktoken's ranks: the two parts of a token are what byte-pair
    encoding leaves of its bytes when it may use earlier ranks alone."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in visible}
    letter.update({byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in letter)})

    def spell(token):
        return "".join(letter[byte] for byte in token)
    ranks, merges = encoding._mergeable_ranks, []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            place = pairs.index(min(pairs))
            parts[place:place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append(f"{spell(parts[0])} {spell(parts[1])}")
    vocabulary = {spell(token): rank for token, rank in ranks.items()} | {"<|endoftext|>": encoding.eot_token}
    return json.dumps(vocabulary, ensure_ascii=False), "#version: 0.2\n" + "\n".join(merges) + "\n"


# ---- where the weights are -------------------------------------------------------------------------------------------

def locate(name_or_path):
    """The weights file behind a name of OpenAI's (downloaded on first use), a directory or a file."""
    path = Path(name_or_path)
    if name_or_path in SIZES and not path.exists():
        return download(name_or_path)
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


class KeepRedirect(urllib.request.HTTPRedirectHandler):
    """The hub tells a file's hash and size with its redirect to the storage server."""

    def redirect_request(self, *args):
        return None


def download(name):
    """OpenAI's weights from the Hugging Face hub into the hub's usual cache, where other programs find them too.

    Honours HF_ENDPOINT, HF_HUB_CACHE, HF_HOME and HF_HUB_OFFLINE. What the cache holds is not fetched again; size and
    hash are verified, and an interrupted download leaves nothing behind.
    """
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()
    for repository in (f"models--openai-community--{name}", f"models--{name}"):
        try:
            snapshot = hub / repository / "snapshots" / (hub / repository / "refs" / "main").read_text().strip()
        except OSError:
            continue
        for file in ("model.safetensors", "pytorch_model.bin"):
            if (snapshot / file).is_file():
                return snapshot / file
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/openai-community/{name}/resolve/main/model.safetensors"
    help_ = f"check the network and try again, or name the path of a copy instead (from {url})"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{name} is not in {hub} and HF_HUB_OFFLINE is set; unset it, or name the path of a copy")
    try:
        try:
            headers = urllib.request.build_opener(KeepRedirect).open(
                urllib.request.Request(url, method="HEAD"), timeout=30).headers
        except urllib.error.HTTPError as error:
            if error.code not in (301, 302, 303, 307, 308):
                raise
            headers = error.headers
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        size, commit = int(headers.get("X-Linked-Size") or headers["Content-Length"]), headers["X-Repo-Commit"]
        if not re.fullmatch(r"[0-9a-f]{64}", etag) or not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
            raise UserError(f"{endpoint} gave no hash for {name}; {help_}")
        folder = hub / f"models--openai-community--{name}"
        blob, snapshot = folder / "blobs" / etag, folder / "snapshots" / commit / "model.safetensors"
        for directory in (blob.parent, snapshot.parent, folder / "refs"):
            directory.mkdir(parents=True, exist_ok=True)
        if not blob.exists():
            print(f"downloading {name} ({size / 1e6:,.0f} MB) from {endpoint} to {hub}", flush=True)
            torch.hub.download_url_to_file(url, str(blob), hash_prefix=etag)
        if blob.stat().st_size != size:
            blob.unlink()
            raise UserError(f"{name} has another size than {endpoint} announced; {help_}")
        try:
            snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
        except OSError:  # Windows without developer mode
            os.replace(blob, snapshot)
        (folder / "refs" / "main").write_text(commit)
        return snapshot
    except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a hash that does not match
        raise UserError(f"the download of {name} failed ({str(error).splitlines()[0][:100]}); {help_}") from None
