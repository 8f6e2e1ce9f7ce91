"""What makes training fast on a CPU: memory that is kept, gradients that matrix products write in place, and an AdamW
that takes them in bfloat16. But for `half`, nothing here changes a result beyond rounding; a GPU takes the plain ways.
"""
import ctypes
import sys

import torch
import torch.nn as nn
from torch.nn import functional as F


def keep_freed_memory():
    """Tells glibc to keep what is freed: giving memory back and getting it anew, page by page, costs a training step on
    a CPU more than AdamW does."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # other C libraries have none
        for option, value in ((-4, 0), (-1, -1), (-2, 1 << 28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
            mallopt(option, value)


class Kept(dict):
    """Large buffers by name. On a CPU it takes longer to get such memory anew, page by page, than to fill it."""

    def room(self, name, like, dtype):
        """A contiguous tensor of `like`'s shape in this dtype, its contents those of the last use."""
        if name not in self or self[name].dtype != dtype or self[name].numel() < like.numel():
            with torch.inference_mode(False):  # or training could not write into what generation made
                self[name], self["holds"] = torch.empty(like.numel(), dtype=dtype, device=like.device), None
        return self[name][:like.numel()].view_as(like)

    def cast(self, weight, dtype):
        """`weight`, whose memory this is, in this dtype: in a room of its own, where it is found until it changes, by
        what `_version` counts, not through `.data`; or, while its gradient stands there, in one room for all weights,
        until the next cast."""
        if weight.dtype == dtype:
            return weight.detach()
        if weight.grad is not None and weight.grad.dtype == dtype:
            return CASTS.room("any", weight, dtype).copy_(weight.detach())
        room = self.room("own", weight, dtype)
        if self.get("holds") != (state := (dtype, weight.data_ptr(), weight._version)):
            room.copy_(weight.detach())
            self["holds"] = state if weight.grad is None else None  # with a gradient it is about to change
        return room


CASTS = Kept()


def transposed(x):
    """x^T; in bfloat16 contiguous, in one room for all, since a product takes twice as long over one that is not. What
    would need more than 32 MB, the logits of much text, stays as it lies. The copy is made in pieces: whole, it takes
    up to three times as long."""
    if x.dtype != torch.bfloat16 or x.numel() > 1 << 24:
        return x.t()
    room, rows = CASTS.room("transposed", x.t(), x.dtype), max(32, (1 << 16) // x.size(1))
    for part, columns in zip(x.split(rows), room.split(rows, dim=1), strict=True):
        columns.copy_(part.t())
    return room


class WrittenLinear(torch.autograd.Function):
    """start + x weight^T in the dtype of x, whose backward writes the weight's gradient straight into kept memory: in
    bfloat16 if x has it, as the matrix product makes it, in the place of the cast weight, which it was the last to
    need (SlicedAdamW takes it from there, other optimizers do not; a weight's hooks see None); and in weight's dtype
    once several are added up."""

    @staticmethod
    def forward(ctx, x, weight, start, kept):
        ctx.save_for_backward(x)
        ctx.weight, ctx.version, ctx.kept, ctx.start = weight, weight._version, kept, start.shape
        return torch.addmm(start, x, kept.cast(weight, x.dtype).t())

    @staticmethod
    def backward(ctx, gradient):
        (x,), weight, kept = ctx.saved_tensors, ctx.weight, ctx.kept
        assert weight._version == ctx.version, "the weight has changed since the forward pass"
        grad_start = gradient.sum_to_size(ctx.start) if ctx.needs_input_grad[2] else None
        grad_x = gradient @ kept.cast(weight, x.dtype)
        first, product = weight.grad is None, kept.room("own", weight, x.dtype)
        kept["holds"] = None
        if not first and weight.grad.dtype != weight.dtype:  # this room is needed again
            weight.grad = kept.room("sum", weight, weight.dtype).copy_(weight.grad)
        if not first and x.dtype == weight.dtype:
            weight.grad.addmm_(gradient.t(), x)
            return grad_x, None, grad_start, None
        torch.mm(transposed(gradient), x, out=product)
        if first:
            weight.grad_dtype = None  # any
            weight.grad = product if x.dtype != torch.float16 else kept.room("sum", weight, weight.dtype).copy_(product)
            if weight.grad.dtype != weight.dtype:
                weight.grad.kept = kept  # SlicedAdamW leaves the new weight there
        else:
            weight.grad.add_(product)
        return grad_x, None, grad_start, None


def keeps_cast(weight):
    """Whether a cast of this weight may be kept: one that is stored, not computed, and no compiler that would not see
    it change."""
    return isinstance(weight, nn.Parameter) and weight.device.type == "cpu" and not torch.compiler.is_compiling()


def writes_gradient(weight):
    """Whether WrittenLinear serves this weight: on a CPU, in one process, since DistributedDataParallel waits for
    autograd's own gradients."""
    return keeps_cast(weight) and weight.requires_grad and torch.is_grad_enabled() and not (
        torch.distributed.is_available() and torch.distributed.is_initialized())


def linear(x, weight, start, kept):
    """start + x weight^T in the dtype of x; the weights may be kept in a higher one. x: (N, in), weight: (out, in),
    start: what broadcasts to (N, out), a bias or a column. For few rows the result lies column by column."""
    start = start.to(x.dtype)
    if writes_gradient(weight):
        return WrittenLinear.apply(x, weight, start, kept)
    if weight.device.type == "cpu" and not torch.is_grad_enabled():
        weight = kept.cast(weight, x.dtype) if keeps_cast(weight) else weight.to(x.dtype)
        if x.dtype == torch.bfloat16 and len(x) <= 128:  # a weight on the left is read as it lies, if by two
            columns = x.expand(max(2, len(x)), -1).t()
            if start.dim() == 2:
                return torch.addmm(start.t(), weight, columns).t()[:len(x)]
            return torch.mm(weight, columns).t()[:len(x)] + start
        return torch.addmm(start, x, weight.t())
    if keeps_cast(weight):
        kept["holds"] = None  # the weight is about to change, and torch's fused AdamW leaves `_version` as it is
    return torch.addmm(start, x, weight.to(x.dtype).t())


class Linear(nn.Linear):
    """Computes in the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.kept = Kept()

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.kept)


def embed(weight, idx, positions):
    """weight[idx] + positions, (N, n_embd). Where the head's WrittenLinear has written the gradient of the weight that
    they share, by the time of backward, these tokens' rows are added to it."""
    if not writes_gradient(weight):
        return F.embedding(idx, weight) + positions

    def add_rows(gradient):
        if weight.grad is None:  # nothing was supervised
            weight.grad = torch.zeros_like(weight)
        tokens, place = idx.unique(return_inverse=True)  # summed by token first: the weight's gradient may be 16-bit
        rows = gradient.new_zeros(len(tokens), gradient.size(1)).index_add_(0, place, gradient)
        weight.grad.index_add_(0, tokens, rows.to(weight.grad.dtype))
    x = F.embedding(idx, weight.detach()) + positions
    if not x.requires_grad:  # the positions are frozen
        x.requires_grad_()
    x.register_hook(add_rows)
    return x


class SlicedAdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), slice by slice where something rests in bfloat16, so that it is
    float32 only while it is used: gradients as WrittenLinear leaves them and, with `half`, both moments. A gradient in
    bfloat16 is gone after the step, and in its memory stands the new weight, ready for the next forward pass."""
    half, room, grad_scale, found_inf = False, None, None, None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            whole = []  # (weight, gradient, mean, mean square, step) of those that need no slices
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=torch.zeros((), device=p.device), **{
                        name: torch.zeros_like(p, dtype=torch.bfloat16 if self.half else p.dtype)
                        for name in ("exp_avg", "exp_avg_sq")})
                for name in ("exp_avg", "exp_avg_sq") if self.half else ():  # load_state_dict has made them float32
                    state[name] = state[name].bfloat16()
                state["step"] += 1 if self.found_inf is None else 1 - self.found_inf
                torch.autograd.graph.increment_version(p)  # as the fused kernel does not
                five = p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
                if p.dtype == p.grad.dtype == state["exp_avg"].dtype:
                    whole.append(five)
                    continue
                self.step_in_slices(*five, group=group)
                if kept := getattr(p.grad, "kept", None):
                    kept["holds"], p.grad = (p.grad.dtype, p.data_ptr(), p._version), None
            if whole:
                self.update(*zip(*whole, strict=True), group)

    def step_in_slices(self, weight, *others, group, size=1 << 20):
        *others, step = others
        if self.room is None:
            self.room = torch.empty(3, size, dtype=weight.dtype, device=weight.device)
        for part, *parts in zip(*(x.reshape(-1).split(size) for x in (weight, *others)), strict=True):
            full = [x if x.dtype == weight.dtype else room[:len(x)].copy_(x)
                    for x, room in zip(parts, self.room, strict=True)]
            self.update([part], *([x] for x in full), [step], group)
            for rest, moment in zip(parts[1:], full[1:], strict=True) if self.half else ():
                rest.copy_(moment)
            if parts[0].dtype != part.dtype:
                parts[0].copy_(part)

    def update(self, weights, gradients, means, squares, steps, group):
        scale = self.grad_scale
        if weights[0].dtype == torch.float64:  # the kernel reads the scale as float32
            gradients, scale = [gradient / scale for gradient in gradients], None
        torch._fused_adamw_(list(weights), list(gradients), list(means), list(squares), [], list(steps),
                            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], amsgrad=False,
                            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                            grad_scale=None if scale is None else scale.float(), found_inf=self.found_inf)
