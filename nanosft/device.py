"""The device and the dtype that this machine computes with."""
import ctypes
import os
import sys

import torch

from nanosft.console import UserError
from nanosft.distributed import all_reduce


def pick_device(name):
    """The named device, or the best that this machine has."""
    if name.startswith("meta"):
        raise UserError(f"--device={name} computes nothing; try --device=cpu")
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun starts one process a GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name}: {str(error).splitlines()[0]}; try --device=cpu") from None


def pick_dtype(name, device):
    """The dtype to compute in: as named, or for "auto" bfloat16 where the hardware multiplies it natively, else float16
    on older CUDA and float32. Several processes agree on the widest."""
    dtypes, choice = (torch.bfloat16, torch.float16, torch.float32), 2
    if device.type == "cuda":
        choice = 0 if torch.cuda.get_device_capability(device) >= (8, 0) else 1
    elif device.type == "cpu":
        able = torch.cpu.get_capabilities()
        choice = 0 if any(able.get(feature) for feature in ("avx512_bf16", "amx_bf16", "sve_bf16")) else 2
        if name in ("bfloat16", "float16") and choice == 2:
            print(f"warning: this CPU has no instructions for {name}, and may take a hundred times as long as in "
                  "float32: leave out --dtype")
    if name != "auto":
        return getattr(torch, name)
    return dtypes[int(all_reduce(choice, how="MAX"))]


def keep_freed_memory():
    """Tells glibc to keep the memory that is freed: to give it back and to get it anew, page by page, costs a training
    step on a CPU more time than AdamW does. Pieces of 32 MB and more, glibc's limit, come and go as usual: what is
    kept is split up by small pieces that stay, and would soon hold no large one."""
    # oneDNN keeps a kernel, a megabyte each, for every shape of a product: a thousand, unless it is told otherwise
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt:
        for option, value in ((-3, 1 << 25), (-1, -1), (-2, 1 << 28)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)
