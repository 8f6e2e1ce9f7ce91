"""GPT-2: its definition, LoRA, and generation with a key/value cache.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Parameters carry the names of OpenAI's
release (wte, wpe, h.0.attn.c_attn ...), and matrices are stored as nn.Linear has them, (out, in): the transpose of
what Hugging Face's files hold.
"""
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from console import UserError
from cpu import Kept, Linear, embed, linear
from weights import base_of, locate, read_adapter, read_gpt2, write_adapter, write_gpt2

IGNORE = -1  # a target that nothing is learned from


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0


class Layout(NamedTuple):
    """How N packed tokens, B sequences end to end and a tail that fills up, stand in a (B, T) grid for attention. The
    tail's tokens stand in cells that are free, behind the end of a sequence, where causal attention sees none. Where
    attention takes the tokens as they lie, the tail is one more sequence."""
    position: torch.Tensor  # (N,) place within its own sequence
    index: torch.Tensor | None  # (N,) place in the flattened grid; None where they are the same
    shape: tuple[int, int]  # B, T
    mask: torch.Tensor | None = None  # (B, 1, 1, S) the cached keys that each row sees; None: causal attention
    bounds: torch.Tensor | None = None  # (B + 2,) int32 where sequences begin and end; attention then needs no grid

    @classmethod
    def of(cls, lengths, device, N=0, T=0, grid=True):
        """The layout of sequences of these lengths, with a tail to make N tokens if N is larger, in a grid of width T,
        if that is."""
        lengths = torch.as_tensor(lengths)
        B, T, tail = len(lengths), max(T, int(lengths.max())), max(0, N - int(lengths.sum()))
        taken = (torch.arange(T) < lengths[:, None]).flatten()  # (B * T,)
        index = torch.cat([taken.nonzero(), (~taken).nonzero()[:tail]]).squeeze(1)
        position = send(index % T, device)
        if not grid:
            bounds = F.pad(torch.cat([lengths, torch.tensor([tail])]).cumsum(0), (1, 0))
            return cls(position, None, (B, max(T, tail)), bounds=send(bounds.int(), device))
        return cls(position, None if bool(taken.all()) else send(index, device), (B, T))

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


def attend(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(head_dim)) v for q, k, v (B, n_head, T, head_dim); causal where `mask` is None."""
    (B, n_head, T, head_dim) = q.shape
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and T <= 512 and mask is None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    # written out: on short examples PyTorch's CPU kernel takes four times as long, most of it in backward
    q, k, v = (x.reshape(B * n_head, T, head_dim) for x in (q, k, v))
    weights = torch.baddbmm(future(T, q.dtype), q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim)).softmax(-1)
    return torch.bmm(F.dropout(weights, dropout), v).view(B, n_head, T, head_dim)


def attends_packed(weight, dtype, head_dim):
    """Whether `attend_packed` serves: 16-bit, on an NVIDIA GPU from Ampere on."""
    return (weight.device.type == "cuda" and dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(weight.device) >= (8, 0))


def attend_packed(q, k, v, bounds, longest):
    """Causal attention within each of the sequences that lie end to end in q, k, v (N, n_head, head_dim), as
    FlashAttention 2 has it (Dao 2023). bounds: (sequences + 1,) int32, where they begin and end."""
    from torch.nn.attention.varlen import varlen_attn  # a second to import, for GPUs alone
    return varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0))


@functools.lru_cache(maxsize=8)
def future(T, dtype):
    """(T, T), -inf where a query would see a later key."""
    return torch.full((T, T), -math.inf, dtype=dtype).triu(1)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, layout, cache=None):
        (B, T), C = layout.shape, x.size(-1)
        if layout.bounds is not None:
            q, k, v = self.c_attn(x).view(-1, 3, self.n_head, C // self.n_head).unbind(1)  # (N, n_head, head_dim) each
            y = attend_packed(q, k, v, layout.bounds, T)  # (N, n_head, head_dim)
            return F.dropout(self.c_proj(y.flatten(1)), self.dropout, self.training)
        qkv = layout.to_grid(self.c_attn(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim) each
        if cache is not None:
            keys, values = cache  # (B, n_head, S, head_dim) each
            if layout.mask is None:
                keys[:, :, :T], values[:, :, :T] = k, v
            else:  # one new token a row, each at its own position
                rows, seen = torch.arange(B, device=x.device), layout.mask.size(-1)
                keys[rows, :, layout.position], values[rows, :, layout.position] = k[:, :, 0], v[:, :, 0]
                q, k, v = q.contiguous(), keys[:, :, :seen], values[:, :, :seen]
        y = attend(q, k, v, layout.mask, self.dropout if self.training else 0.0)
        y = layout.from_grid(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(self.c_proj(y), self.dropout, self.training)


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
    a time are widened, while they are in the cache; backward writes their gradient in the place of the logits, which
    are gone then."""

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
        Returns float32 logits of idx's shape + (vocab_size,), shifted as `logits` says; or a float32 scalar; or, with
        `each`, the loss of every target that is not IGNORE, in order. float64 for a float64 model.
        """
        lengths, device = lengths if lengths is not None else [idx.size(1)] * idx.size(0), self.wte.weight.device
        longest = int(max(lengths))
        assert longest <= self.config.block_size, f"{longest} tokens exceed the context"
        if targets is None:
            layout = Layout.of(lengths, device)
            logits = widened(self.logits(self.hidden(send(idx.flatten(), device), layout)))
            return logits.contiguous().view(*idx.shape, -1)
        # every new shape costs the making of kernels, so a tail rounds the tokens up, and unsupervised ones the targets
        idx, targets, T = idx.flatten(), targets.flatten(), min(round_up(longest, 16), self.config.block_size)
        N = min(round_up(len(idx), 32), len(lengths) * T)
        learned = (targets != IGNORE).nonzero().squeeze(1)
        rows = F.pad(learned, (0, -len(learned) % 32))
        targets = targets[rows].index_fill_(0, torch.arange(len(learned), len(rows), device=rows.device), IGNORE)
        grid = self.training and self.config.dropout > 0 or not attends_packed(
            self.wte.weight, self.compute_dtype or self.wte.weight.dtype, self.config.n_embd // self.config.n_head)
        x = self.hidden(send(F.pad(idx, (0, N - len(idx))), device), Layout.of(lengths, device, N, T, grid))
        losses = self.losses(x.index_select(0, send(rows, device)), send(targets, device))
        return losses[:len(learned)] if each else losses.sum()

    def losses(self, x, targets):
        """Cross-entropy of each row, a slice of them at a time: the logits of a whole batch of text would not fit."""
        def slice_losses(x, targets):
            return CrossEntropy.apply(self.logits(x), targets)
        if len(x) <= 2048:
            return slice_losses(x, targets)
        return torch.cat([checkpoint(slice_losses, *one, use_reentrant=False)
                          for one in zip(x.split(2048), targets.split(2048), strict=True)])

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
        rank = first.lora_A.size(0)
        write_adapter(directory, base, rank, first.scale * rank, first.dropout, {
            name: {"lora_A": module.lora_A, "lora_B": module.lora_B} for name, module in lora.items()})

    def load_adapter(self, directory):
        """Adds the LoRA adapter of a directory in PEFT's layout, ours or peft's own; options we lack are refused."""
        rank, alpha, dropout, updates = read_adapter(directory)
        modules = dict(self.named_modules())
        for path, parts in sorted(updates.items()):
            base, shapes = modules.get(path), {name: tuple(tensor.shape) for name, tensor in parts.items()}
            if not isinstance(base, Linear) or shapes != {"lora_A": (rank, base.weight.size(1)),
                                                          "lora_B": (base.weight.size(0), rank)}:
                raise UserError(f"{directory}: the adapter's {path} does not fit this model or its rank {rank}; name "
                                "the base that it was trained on")
            module = LoraLinear(base, rank, alpha, dropout)
            for name, tensor in parts.items():
                getattr(module, name).data = tensor.to(base.weight.device)
            self.set_submodule(path, module)
        return self

    # ---- weights in and out ----

    @classmethod
    def from_pretrained(cls, name_or_path, dropout=0.0):
        """GPT-2 from OpenAI's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl: downloaded once), or from a
        Hugging Face directory, a .bin or .safetensors file, nanoGPT's ckpt.pt, or an out_dir of train.py (its best
        weights; a LoRA adapter comes on its base). float32."""
        path = locate(str(name_or_path))
        if path.name == "adapter_config.json":
            base = base_of(path)
            if locate(base).name == path.name:
                raise UserError(f"{path}: the base {base} is itself an adapter; name plain weights there")
            return cls.from_pretrained(base, dropout).load_adapter(path.parent)
        state, numbers = read_gpt2(path)
        numbers["n_layer"] = min(numbers["n_layer"], len(state) + 1)  # enough to miss some
        with torch.device("meta"):
            model = cls(GPTConfig(**numbers, dropout=dropout))
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(f"{path} does not fit config.json: {name} is {found.get(name, 'missing')}, expected "
                                f"{expected.get(name, 'no such tensor')}; this is no GPT-2, or a broken file")
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(True)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors in Hugging Face's layout, each under a temporary name first."""
        write_gpt2(directory, {name: parameter.detach() for name, parameter in self.named_parameters()}, self.config)


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
        before = probabilities.cumsum(-1) - probabilities
        probabilities[:, 1:][before[:, 1:] >= top_p] = 0  # the likeliest always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)


def optimizer_groups(model, weight_decay):
    """Trainable parameters for AdamW: matrices and embeddings decay, biases and norms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
