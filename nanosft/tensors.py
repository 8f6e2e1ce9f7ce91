"""Files of tensors: safetensors, and what torch.save writes. Nothing that is read is ever executed."""
import json
import math
import os

import torch

from nanosft.console import UserError
from nanosft.files import atomic_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def write_safetensors(path, tensors):
    """Writes tensors by name in the safetensors format: 8 bytes of header length, a JSON header, the raw data."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
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
        raise UserError(f"{path} holds no plain tensors ({type(error).__name__}); use a .safetensors file") from None


def taken_from(state, path):
    """Yields (name, tensor) of the state dict that a file held, and lets go of each, so that the reader may free it."""
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{path} holds no state dict of tensors; for a checkpoint of train.py name its out_dir")
    for name in list(state):
        yield str(name), state.pop(name)
