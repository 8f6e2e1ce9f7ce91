"""GPT-2: its definition, OpenAI's weights in and out, LoRA, and generation with a key/value cache.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameters carry the names of OpenAI's
release (wte, wpe, h.0.attn.c_attn ...), and matrices are stored as nn.Linear has them, (out, in): the transpose of
what Hugging Face's files hold.
"""
import functools
import json
import math
import os
import re
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import UserError

IGNORE = -1  # a target that nothing is learned from
SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


# ---- the network ----------------------------------------------------------------------------------------------------

class Layout(NamedTuple):
    """How N packed tokens, B sequences end to end and a tail that fills up, stand in a (B, T) grid for attention. The
    tail's tokens stand in cells that are free, behind the end of a sequence, where causal attention sees none."""
    position: torch.Tensor  # (N,) place within its own sequence
    index: torch.Tensor | None  # (N,) place in the flattened grid; None where they are the same
    shape: tuple[int, int]  # B, T
    mask: torch.Tensor | None = None  # (B, 1, 1, S) the cached keys that each row sees; None: causal attention

    @classmethod
    def of(cls, lengths, device, N=0, T=0):
        """The layout of sequences of these lengths, with a tail to make N tokens if N is larger, in a grid of width T,
        if that is."""
        lengths = torch.as_tensor(lengths)
        B, T, tail = len(lengths), max(T, int(lengths.max())), max(0, N - int(lengths.sum()))
        taken = (torch.arange(T) < lengths[:, None]).flatten()  # (B * T,)
        index = torch.cat([taken.nonzero(), (~taken).nonzero()[:tail]]).squeeze(1)
        return cls(send(index % T, device), None if bool(taken.all()) else send(index, device), (B, T))

    def to_grid(self, x):
        """(N, C) -> (B, T, C), zeros where no token stands."""
        B, T = self.shape
        grid = x if self.index is None else x.new_zeros(B * T, x.size(-1)).index_copy(0, self.index, x)
        return grid.view(B, T, -1)

    def from_grid(self, grid):
        """(B, T, C) -> (N, C)."""
        rows = grid.flatten(0, 1)
        return rows if self.index is None else rows.index_select(0, self.index)


def send(x, device):
    """`x` on this device; to a GPU from pinned memory, so that nobody waits."""
    pinned = torch.device(device).type == "cuda" and x.device.type == "cpu"
    return x.pin_memory().to(device, non_blocking=True) if pinned else x.to(device)


def round_up(n, multiple):
    return -(-n // multiple) * multiple


class Cache(NamedTuple):
    """The keys and values of the tokens so far."""
    state: torch.Tensor  # (2, n_layer, B, n_head, S, head_dim)
    lengths: torch.Tensor  # (B,) tokens in each row, on the CPU

    def select(self, rows):
        """The cache of these rows, which may repeat."""
        return Cache(self.state[:, :, rows], self.lengths[rows])


class Kept(dict):
    """Large buffers by name. On a CPU it takes longer to get such memory anew, page by page, than to fill it."""

    def room(self, name, like, dtype):
        """A contiguous tensor of `like`'s shape in this dtype, its contents those of the last use."""
        if name not in self or self[name].dtype != dtype or self[name].numel() < like.numel():
            with torch.inference_mode(False):  # or training could not write into what generation made
                self[name] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return self[name][:like.numel()].view_as(like)

    def cast(self, weight, dtype):
        """`weight`, whose memory this is, in this dtype: in a room of its own, where it is found until it changes; or,
        while its gradient stands there, in one room for all weights, until the next cast."""
        if weight.dtype == dtype:
            return weight.detach()
        if weight.grad is not None and weight.grad.dtype == dtype:
            return CASTS.room("any", weight, dtype).copy_(weight.detach())
        room = self.room("own", weight, dtype)
        if self.get("holds") != (state := (dtype, weight.data_ptr(), weight._version)):
            room.copy_(weight.detach())
            self["holds"] = state
        return room


CASTS = Kept()


class WrittenLinear(torch.autograd.Function):
    """start + x weight^T in the dtype of x, whose backward writes the weight's gradient straight into kept memory: in
    bfloat16 if x has it, as the matrix product makes it, in the place of the cast weight, which it was the last to
    need; and in weight's dtype once several are added up."""

    @staticmethod
    def forward(ctx, x, weight, start, kept):
        ctx.save_for_backward(x)
        ctx.weight, ctx.kept, ctx.start = weight, kept, start.shape
        return torch.addmm(start, x, kept.cast(weight, x.dtype).t())

    @staticmethod
    def backward(ctx, gradient):
        (x,), weight, kept = ctx.saved_tensors, ctx.weight, ctx.kept
        grad_start = gradient.sum_to_size(ctx.start) if ctx.needs_input_grad[2] else None
        grad_x = gradient @ kept.cast(weight, x.dtype)
        first, product = weight.grad is None, kept.room("own", weight, x.dtype)
        kept["holds"] = None
        if not first and weight.grad.dtype != weight.dtype:  # this room is needed again
            weight.grad = kept.room("sum", weight, weight.dtype).copy_(weight.grad)
        if not first and x.dtype == weight.dtype:
            weight.grad.addmm_(gradient.t(), x)
            return grad_x, None, grad_start, None
        torch.mm(gradient.t(), x, out=product)
        if first:
            weight.grad_dtype = None  # any
            weight.grad = product if x.dtype != torch.float16 else kept.room("sum", weight, weight.dtype).copy_(product)
            if weight.grad.dtype != weight.dtype:
                weight.grad.kept = kept  # SlicedAdamW leaves the new weight there
        else:
            weight.grad.add_(product)
        return grad_x, None, grad_start, None


def writes_gradient(weight):
    """Whether WrittenLinear serves this weight: on a CPU, in one process, since DistributedDataParallel waits for
    autograd's own gradients."""
    return weight.requires_grad and torch.is_grad_enabled() and weight.device.type == "cpu" and not (
        torch.distributed.is_available() and torch.distributed.is_initialized()) and not torch.compiler.is_compiling()


def linear(x, weight, start, kept):
    """start + x weight^T in the dtype of x; the weights may be kept in a higher one. x: (N, in), weight: (out, in),
    start: what broadcasts to (N, out), usually a bias."""
    start = start.to(x.dtype)
    if writes_gradient(weight):
        return WrittenLinear.apply(x, weight, start, kept)
    if weight.device.type == "cpu" and not torch.is_grad_enabled():
        weight = kept.cast(weight, x.dtype)
        if x.dtype == torch.bfloat16 and len(x) == 1:
            return torch.addmv(start.view(-1).expand(len(weight)), weight, x[0])[None]
        if x.dtype == torch.bfloat16 and len(x) <= 32 and len(weight) <= 8192:  # on the left it is read as it lies
            return torch.addmm(start.view(-1, start.size(-1)).t(), weight, x.t()).t().contiguous()
        return torch.addmm(start, x, weight.t())
    if weight.requires_grad and not torch.compiler.is_compiling():
        kept["holds"] = None  # it is about to change
    return torch.addmm(start, x, weight.to(x.dtype).t())


class Linear(nn.Linear):
    """Computes in the dtype of its input."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out)
        self.kept = Kept()

    def forward(self, x):
        return linear(x, self.weight, self.bias, self.kept)


class LoraLinear(Linear):
    """A frozen Linear plus a trainable update of low rank, alpha / rank · B A (Hu et al. 2021, "LoRA")."""

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.weight, self.bias, self.kept = base.weight, base.bias, base.kept
        self.scale, self.dropout = alpha / rank, dropout
        self.lora_A = nn.Parameter(torch.empty(rank, base.weight.size(1), device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.weight.size(0), rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype))  # (N, rank)
        return super().forward(x).addmm_(low * self.scale, self.lora_B.to(x.dtype).t())

    def merged(self):
        """A plain Linear with the update added to its weights."""
        weight = self.weight + self.scale * self.lora_B @ self.lora_A  # in the wider of their dtypes
        with torch.device("meta"):
            linear = Linear(weight.size(1), weight.size(0))
        linear.weight, linear.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return linear


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, layout, cache=None):
        (B, T), C = layout.shape, x.size(-1)
        qkv = layout.to_grid(self.c_attn(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim) each
        if cache is not None:
            keys, values = cache  # (B, n_head, S, head_dim) each
            if layout.mask is None:
                keys[:, :, :T], values[:, :, :T] = k, v
            else:  # one new token a row, each at its own position
                rows, seen = torch.arange(B, device=x.device), layout.mask.size(-1)
                keys[rows, :, layout.position], values[rows, :, layout.position] = k[:, :, 0], v[:, :, 0]
                k, v = keys[:, :, :seen], values[:, :, :seen]
        y = attend(q, k, v, layout.mask, self.dropout if self.training else 0.0)
        y = layout.from_grid(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(self.c_proj(y), self.dropout, self.training)


def attend(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(head_dim)) v for q, k, v (B, n_head, T, head_dim); causal where `mask` is None."""
    (B, n_head, T, head_dim) = q.shape
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and T <= 512):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    # written out: on short examples PyTorch's CPU kernel takes four times as long, most of it in backward
    q, k, v = (x.reshape(B * n_head, T, head_dim) for x in (q, k, v))
    weights = torch.baddbmm(future(T, q.dtype), q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim)).softmax(-1)
    return torch.bmm(F.dropout(weights, dropout), v).view(B, n_head, T, head_dim)


@functools.lru_cache(maxsize=8)
def future(T, dtype):
    """(T, T), -inf where a query would see a later key."""
    return torch.full((T, T), -math.inf, dtype=dtype).triu(1)


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
    x.register_hook(add_rows)
    return x


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, layout, cache=None):
        x = x + self.attn(self.ln_1(x), layout, cache)
        return x + self.mlp(self.ln_2(x))


def widened(x):
    """`x` in float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy of each row of logits (N, V), 0 where its target is IGNORE, in float32 or better. A few rows at
    a time are widened, while they are in the cache; backward writes their gradient in the place of the logits."""

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.rows = max(1, (1 << 20 if logits.device.type == "cpu" else 1 << 26) // logits.size(1))
        log_sum = torch.cat([widened(part).logsumexp(-1) for part in logits.split(ctx.rows)])
        ctx.save_for_backward(logits, targets, log_sum)
        right = widened(logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1))
        return (log_sum - right).masked_fill(targets == IGNORE, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        logits, targets, log_sum = ctx.saved_tensors
        gradient = gradient.masked_fill(targets == IGNORE, 0)
        for part, *rest in zip(*(x.split(ctx.rows) for x in (logits, targets, log_sum, gradient)), strict=True):
            target, log, scale = (x[:, None] for x in rest)
            probability = (widened(part) - log).exp_()
            probability.scatter_add_(1, target.clamp(min=0), probability.new_full(target.shape, -1))
            part.copy_(probability.mul_(scale))
        return logits, None


class GPT(nn.Module):
    """GPT-2 with freshly initialised weights; `compute_dtype`, where set, is the dtype of all activations."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}")
        self.config, self.compute_dtype, self.gradient_checkpointing = config, None, False
        self.kept = Kept()  # the head's
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head, which GPT-2 ties to it
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # there are 2 n_layer of them on the residual path
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, layout, cache=None):
        """The last layer's normalised output, (N, n_embd), for packed token ids (N,)."""
        x = embed(self.wte.weight, idx, self.wpe(layout.position))
        x = F.dropout(x.to(self.compute_dtype or x.dtype), self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout, (cache[0][i], cache[1][i]) if cache is not None else None)
        return self.ln_f(x)

    def logits(self, x):
        """(N, n_embd) -> (N, vocab_size) in the dtype of x. GPT-2's logits lie around -100, where bfloat16 has steps of
        a half: with 16-bit x they are computed about a mean of zero, a shift that softmax does not see."""
        weight, start = self.wte.weight, x.new_zeros(1, 1)
        if x.element_size() == 2:
            some = weight.detach()[::max(1, len(weight) // 512)].mean(0, dtype=torch.float32)
            start = -(x.float() @ some)[:, None]  # its gradient takes the mean out of backward's rounding, too
        return linear(x, weight, start, self.kept)

    def forward(self, idx, targets=None, lengths=None, each=False):
        """Logits or, with `targets`, the sum (not the mean) of the losses of all targets that are not IGNORE.

        idx: int64 token ids, (B, T); or (N,) with `lengths`: sequences of these lengths end to end, none of which sees
        another. targets: of idx's shape, the id that follows each token; best left on the CPU, where they are counted.
        Returns float32 logits of idx's shape + (vocab_size,); or a float32 scalar; or, with `each`, the loss of every
        target that is not IGNORE, in order. float64 for a float64 model.
        """
        lengths, device = lengths if lengths is not None else [idx.size(1)] * idx.size(0), self.wte.weight.device
        longest = int(max(lengths))
        assert longest <= self.config.block_size, f"{longest} tokens exceed the context"
        if targets is None:
            layout = Layout.of(lengths, device)
            return widened(self.logits(self.hidden(send(idx.flatten(), device), layout))).view(*idx.shape, -1)
        # every new shape costs the making of kernels, so a tail rounds the tokens up, and unsupervised ones the targets
        idx, targets, T = idx.flatten(), targets.flatten(), min(round_up(longest, 16), self.config.block_size)
        N = min(round_up(len(idx), 32), len(lengths) * T)
        learned = (targets != IGNORE).nonzero().squeeze(1)
        rows = F.pad(learned, (0, -len(learned) % 32))
        targets = targets[rows].index_fill_(0, torch.arange(len(learned), len(rows), device=rows.device), IGNORE)
        x = self.hidden(send(F.pad(idx, (0, N - len(idx))), device), Layout.of(lengths, device, N, T))
        losses = self.losses(x.index_select(0, send(rows, device)), send(targets, device))
        return losses[:len(learned)] if each else losses.sum()

    def losses(self, x, targets):
        """Cross-entropy of each row, a slice of them at a time: the logits of a whole batch of text would not fit."""
        def slice_losses(x, targets):
            return CrossEntropy.apply(self.logits(x), targets)
        if len(x) <= 1024:
            return slice_losses(x, targets)
        return torch.cat([checkpoint(slice_losses, *one, use_reentrant=False)
                          for one in zip(x.split(1024), targets.split(1024), strict=True)])

    # ---- generation ----

    def prefill(self, prompts, new_tokens):
        """Reads prompts, lists of ids of any lengths: (hidden state (B, n_embd) at the end of each, Cache)."""
        block_size, longest = self.config.block_size, max(map(len, prompts))
        if not 0 < min(map(len, prompts)) <= longest <= block_size:
            raise UserError(f"the prompt has {longest:,} tokens, the context {block_size:,}: shorten it")
        weight, lengths = self.wte.weight, torch.tensor([len(prompt) for prompt in prompts])
        state = torch.zeros(2, self.config.n_layer, len(prompts), self.config.n_head,
                            min(block_size, longest + new_tokens), self.config.n_embd // self.config.n_head,
                            dtype=self.compute_dtype or weight.dtype, device=weight.device)
        packed = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)
        x = self.hidden(packed, Layout.of(lengths, weight.device), state)
        return x.index_select(0, (lengths.cumsum(0) - 1).to(weight.device)), Cache(state, lengths)

    def decode(self, ids, cache):
        """Reads one more token a row, ids (B,): (hidden state (B, n_embd), Cache with these tokens)."""
        position = cache.lengths.clamp(max=cache.state.size(4) - 1)  # rows that have ended stay within the cache
        seen = torch.arange(int(position.max()) + 1) <= position[:, None]
        layout = Layout(position.to(ids.device), None, (len(ids), 1), seen[:, None, None].to(ids.device))
        return self.hidden(ids, layout, cache.state), Cache(cache.state, cache.lengths + 1)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, stop=None, n_vocab=None,
                 generator=None):
        """Continues `prompts`, lists of token ids of any lengths, and yields a list with each row's next id, step by
        step; None for rows that have ended.

        A row ends with `stop` (which is yielded), after max_new_tokens, or when the context is full. temperature 0
        takes the most likely token; top_k > 0 and top_p < 1 cut the distribution; ids from n_vocab on are never drawn.
        """
        training = self.training
        self.eval()
        try:
            x, cache = self.prefill(prompts, max_new_tokens)
            rows = list(range(len(prompts)))  # the prompt that each row of the cache goes on with; None: ended
            for step in range(max_new_tokens):
                drawn = draw(widened(self.logits(x)[:, :n_vocab]), temperature, top_k, top_p, generator)
                ids = dict(zip(rows, drawn.tolist(), strict=True))
                yield [ids.get(row) for row in range(len(prompts))]
                full = (cache.lengths == cache.state.size(4)).tolist()
                rows = [None if row is None or ids[row] == stop or ended else row
                        for row, ended in zip(rows, full, strict=True)]
                left = [place for place, row in enumerate(rows) if row is not None]
                if not left or step + 1 == max_new_tokens:
                    return
                if len(left) <= len(rows) // 2:  # copying the cache pays once half of its rows have ended
                    rows, drawn, cache = [rows[place] for place in left], drawn[left], cache.select(left)
                x, cache = self.decode(drawn, cache)
        finally:
            self.train(training)

    @torch.inference_mode()
    def log_likelihood(self, prompts, answers):
        """The log-probability of each of `answers` (lists of ids) after each of `prompts`, (len(prompts),
        len(answers)), float32: summed over an answer's tokens; every prompt is read once."""
        x, cache = self.prefill(prompts, max(map(len, answers)))
        each = [row for row in range(len(prompts)) for _ in answers]  # a row for every pair
        x, cache, total = x[each], cache.select(each), 0.0
        for step in range(max(map(len, answers))):
            ids = torch.tensor([answer[step] if step < len(answer) else 0 for answer in answers] * len(prompts))
            counts = torch.tensor([float(step < len(answer)) for answer in answers] * len(prompts))
            log_probabilities = widened(self.logits(x)).log_softmax(-1).gather(1, ids.to(x.device)[:, None]).squeeze(1)
            total = total + log_probabilities * counts.to(x.device)
            if step + 1 < max(map(len, answers)):
                x, cache = self.decode(ids.to(x.device), cache)
        return total.view(len(prompts), len(answers))

    # ---- LoRA ----

    def add_lora(self, rank, alpha, dropout, targets):
        """Freezes all weights and gives the linear layers named in `targets` trainable updates of this rank."""
        self.requires_grad_(False)
        for name, module in list(self.named_modules()):
            if isinstance(module, Linear) and any(name == target or name.endswith(f".{target}") for target in targets):
                self.set_submodule(name, LoraLinear(module, rank, alpha, dropout))
        return self

    def merge_lora(self):
        """Turns LoRA's updates, where there are any, into plain weights."""
        for name, module in list(self.named_modules()):
            if isinstance(module, LoraLinear):
                self.set_submodule(name, module.merged())
        return self.requires_grad_(True)

    def save_adapter(self, directory, base):
        """Writes LoRA's updates alone, in PEFT's layout and names; `base` is the name or path of the frozen model."""
        lora = {name: module for name, module in self.named_modules() if isinstance(module, LoraLinear)}
        first = next(iter(lora.values()))
        rank, directory = first.lora_A.size(0), Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_safetensors(directory / "adapter_model.safetensors", {
            f"base_model.model.transformer.{name}.{part}.weight": getattr(module, part)
            for name, module in lora.items() for part in ("lora_A", "lora_B")})
        with atomic_file(directory / "adapter_config.json") as file:
            file.write(json.dumps({
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
                "lora_alpha": first.scale * rank, "lora_dropout": first.dropout, "bias": "none", "fan_in_fan_out": True,
                "target_modules": sorted({name.split(".", 2)[2] for name in lora}), "inference_mode": True},
                indent=1).encode())

    def load_adapter(self, directory):
        """Adds the LoRA adapter of a directory in PEFT's layout, ours or peft's own; options we lack are refused."""
        values = read_json(Path(directory) / "adapter_config.json")
        plain = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "base_model_name_or_path",
                 "peft_type", "peft_version", "task_type", "fan_in_fan_out", "inference_mode", "auto_mapping",
                 "revision", "runtime_config", "megatron_core", "qalora_group_size"}
        for name, value in values.items():
            if name not in plain and value and (name, value) not in (("bias", "none"), ("init_lora_weights", True)):
                raise UserError(f"{directory}: the adapter's option {name}={value!r} is not supported; merge it into "
                                "its base with peft")
        rank, alpha, dropout = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
        if type(rank) is not int or rank < 1 or not all(type(number) in (int, float) and 0 <= number < limit
                                                        for number, limit in ((alpha, math.inf), (dropout, 1))):
            raise UserError(f"{directory}: r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r} in "
                            "adapter_config.json make no adapter; write or download it again")
        found = {}
        for name, tensor in read_safetensors(Path(directory) / "adapter_model.safetensors"):
            match = re.fullmatch(r"base_model\.model\.transformer\.(.+)\.(lora_[AB])\.weight", name)
            if not match:
                raise UserError(f"{directory}: the adapter holds {name}, which is no LoRA update of GPT-2; expected "
                                "lora_A and lora_B of its layers alone")
            found[match[1], match[2]] = tensor
        if not found:
            raise UserError(f"{directory}: the adapter holds no updates; write or download it again")
        modules = dict(self.named_modules())
        for path in sorted({path for path, _ in found}):
            base, A, B = modules.get(path), found.get((path, "lora_A")), found.get((path, "lora_B"))
            if not isinstance(base, Linear) or A is None or B is None or (
                    (*A.shape, *B.shape) != (rank, base.weight.size(1), base.weight.size(0), rank)):
                raise UserError(f"{directory}: the adapter's {path} does not fit this model or its rank {rank}; name "
                                "the base that it was trained on")
            module = LoraLinear(base, rank, alpha, dropout)
            module.lora_A.data, module.lora_B.data = (x.to(base.weight.device, torch.float32) for x in (A, B))
            self.set_submodule(path, module)
        return self

    # ---- weights in and out ----

    @classmethod
    def from_pretrained(cls, name_or_path, dropout=0.0):
        """GPT-2 from OpenAI's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl: downloaded once), or from a
        Hugging Face directory, a .bin or .safetensors file, or an out_dir of train.py (its best weights; a LoRA adapter
        comes on its base). float32."""
        path = locate(str(name_or_path))
        if path.name == "adapter_config.json":
            base = base_of(path)
            if locate(base).name == path.name:
                raise UserError(f"{path}: the base {base} is itself an adapter; name plain weights there")
            return cls.from_pretrained(base, dropout).load_adapter(path.parent)
        state, config, config_file = {}, None, path.parent / "config.json"
        if path.suffix == ".pt":
            state, config = read_nanogpt(path)
        for name, tensor in read_weights(path) if config is None else ():
            name = name.removeprefix("transformer.")
            if name in state:
                raise UserError(f"{path} holds {name} twice, once as transformer.{name}; download or write it again")
            turned = TRANSPOSED.search(name) and tensor.dim() == 2
            state[name] = tensor.t().float().contiguous() if turned else tensor.float()
        for name in [name for name in state if re.fullmatch(r"h\.\d+\.attn\.(masked_)?bias", name)]:
            del state[name]  # causal masks that the hub's files hold
        head = state.pop("lm_head.weight", None)
        config = config or (read_config(config_file) if config_file.exists() else config_from(state, path))
        config.dropout, config.n_layer = dropout, min(config.n_layer, len(state) + 1)  # enough to miss some
        with torch.device("meta"):
            model = cls(config)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(f"{path} does not fit {config_file.name}: {name} is {found.get(name, 'missing')}, "
                                f"expected {expected.get(name, 'no such tensor')}; this is no GPT-2, or a broken file")
        if head is not None and not torch.equal(head.float(), state["wte.weight"]):
            raise UserError(f"{path}: the output head differs from the token embedding; GPT-2 ties them")
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(True)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors in Hugging Face's layout, each under a temporary name first."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {f"transformer.{name}": parameter.detach().t() if TRANSPOSED.search(name) else parameter.detach()
                   for name, parameter in self.named_parameters()}
        config = self.config
        with atomic_file(directory / "config.json") as file:
            file.write(json.dumps({
                "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
                "vocab_size": config.vocab_size, "n_positions": config.block_size, "n_ctx": config.block_size,
                "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "layer_norm_epsilon": 1e-5,
                "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
                "bos_token_id": config.vocab_size - 1, "eos_token_id": config.vocab_size - 1,
                "tie_word_embeddings": True, "torch_dtype": "float32"}, indent=1).encode())
        write_safetensors(directory / "model.safetensors", tensors)  # last: no weights without their config


def draw(logits, temperature, top_k, top_p, generator):
    """One id per row of logits (B, V): the most likely at temperature 0, else drawn from the k most likely and from the
    smallest set whose probability reaches top_p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -math.inf)
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    if top_p < 1:
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0  # the likeliest always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


def optimizer_groups(model, weight_decay):
    """Trainable parameters for AdamW: matrices and embeddings decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]


class SlicedAdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019), slice by slice where something rests in bfloat16, so that it is
    float32 only while it is used: gradients as WrittenLinear leaves them and, with `half`, both moments. A gradient in
    bfloat16 is gone after the step, and in its memory stands the new weight, ready for the next forward pass."""
    half, room = False, None

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
                state["step"] += 1 - self.found_inf
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
            self.room = torch.empty(3, size, device=weight.device)
        for part, *parts in zip(*(x.reshape(-1).split(size) for x in (weight, *others)), strict=True):
            full = [x if x.dtype == weight.dtype else room[:len(x)].copy_(x)
                    for x, room in zip(parts, self.room, strict=True)]
            self.update([part], *([x] for x in full), [step], group)
            for rest, moment in zip(parts[1:], full[1:], strict=True):
                if self.half:
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


# ---- files ----------------------------------------------------------------------------------------------------------

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


def read_nanogpt(path):
    """(state, configuration) of the ckpt.pt that nanoGPT writes, whose matrices lie as ours do; biases that it was
    trained without are zeros."""
    try:
        saved = read_pickle(path)
        args, state = saved["model_args"], {name.removeprefix("_orig_mod.").removeprefix("transformer."): tensor.float()
                                            for name, tensor in saved["model"].items()}
        config = GPTConfig(*(args[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")))
        config = checked(config, path)
        for name in [name for name in state if name.endswith("weight") and ("ln_" in name or "c_" in name)]:
            state.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(state[name])))
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no checkpoint of nanoGPT; for one of train.py name its out_dir") from None
    return state, config


def read_weights(path):
    """(name, tensor) pairs of a .safetensors or .bin file."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    state = read_pickle(path)
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise UserError(f"{path} holds no state dict of tensors; expected GPT-2's weights by name")
    return state.items()


def read_json(path):
    """A JSON file that holds an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no JSON object; download or write it again")
    return values


def base_of(path):
    """The name or path of the base that an adapter_config.json names."""
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is {base!r}; write there which weights it was trained on")
    return base.removeprefix("openai-community/")


def checked(config, path):
    """A configuration that was read from this file, if its numbers can be GPT-2's."""
    for name, number in vars(config).items():
        if name != "dropout" and (type(number) is not int or not 0 < number < 1 << 24):
            raise UserError(f"{path} is no GPT-2 configuration: {name} is {number!r}; download or write it again")
    if config.n_embd % config.n_head:
        raise UserError(f"{path}: n_embd={config.n_embd} is no multiple of n_head={config.n_head}; correct it")
    return config


def read_config(path):
    """A Hugging Face config.json as GPTConfig; UserError for what is not GPT-2 as this file defines it."""
    values = read_json(path)
    numbers = (values.get(name) for name in ("n_layer", "n_head", "n_embd"))
    config = checked(GPTConfig(values.get("n_positions", 1024), values.get("vocab_size", 50257), *numbers), path)
    only = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None,
            "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
            "add_cross_attention": False}
    for name, value in only.items():
        if values.get(name, value) not in (value, 4 * config.n_embd if name == "n_inner" else value):
            raise UserError(f"{path}: {name} is {values[name]!r}; only GPT-2's own {value!r} is supported: take a "
                            "GPT-2")
    return config


def config_from(state, path):
    """The configuration that a weights file without config.json implies; every GPT-2 has heads of 64."""
    try:
        (vocab_size, n_embd), (block_size, _) = state["wte.weight"].shape, state["wpe.weight"].shape
        n_layer = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("h.")), default=-1)
    except (KeyError, ValueError):
        raise UserError(f"{path} holds no GPT-2: expected the matrices wte.weight and wpe.weight and layers h.0, h.1 "
                        "...") from None
    if n_embd % 64:
        raise UserError(f"{path}: n_embd={n_embd} is no multiple of 64; put the model's config.json beside it")
    return checked(GPTConfig(block_size, vocab_size, n_layer, n_embd // 64, n_embd), path)


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
    help_ = f"check the network and try again, or give --init_from the path of a copy (from {url})"
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON"):
        raise UserError(f"{name} is not in {hub} and HF_HUB_OFFLINE is set; unset it, or give --init_from a path")
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
