"""This process, its signals, and the others that torchrun started, which share every step out among them."""
import contextlib
import gc
import os
import signal
import sys
import threading

import torch
import torch.distributed as dist


def rank_and_world_size():
    """(the number of this process from 0, how many there are)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def all_reduce(number, how="SUM"):
    """The sum (or MAX) of a number over all processes. It travels on the CPU, so that no GPU is waited for."""
    if rank_and_world_size()[1] == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, how))
    return tensor.item()


@contextlib.contextmanager
def process_group(device):
    """Within it, this process is one of torchrun's, if any: only the first one prints, and they share the cores."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "LOCAL_RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with contextlib.redirect_stdout(sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")):
            yield
            dist.barrier()  # none leaves while another still talks
    finally:
        gc.collect()  # what is still on its way refers to the group, whose threads must not outlive Python
        dist.destroy_process_group()


def sum_over_processes(loss, parameters):
    """Sums the loss, a scalar, and all gradients over all processes. One that had no examples adds zeros."""
    if rank_and_world_size()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    exchanges = [dist.all_reduce(tensor, async_op=True) for tensor in (loss, *(p.grad for p in parameters))]
    for exchange in exchanges:
        exchange.wait()


@contextlib.contextmanager
def interrupts():
    """Yields a list of the signals that ask this process to end (SIGINT, SIGTERM, a closing terminal's SIGHUP), so that
    the step can end and be saved. A second SIGINT or SIGTERM kills, but not one of several processes: torchrun repeats
    what the terminal has sent to all of them. What is ignored (nohup) stays ignored."""
    caught, before = [], {}

    def handle(signum, frame):
        caught.append(signum)
        if rank_and_world_size()[1] == 1 and signum != getattr(signal, "SIGHUP", None):
            signal.signal(signum, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for signum in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # Windows lacks one
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, handle)
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
