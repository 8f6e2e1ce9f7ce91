"""One decoder, GPT-2, Llama or Qwen by its configuration, in plain PyTorch, with LoRA and a key/value cache.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Touvron et al. 2023, "LLaMA". Modules carry
the names of OpenAI's release (wte, h.0.attn.c_proj ...) in all; nanosft/weights.py has those of the files.
Matrices are stored as nn.Linear has them, (out, in). All parameters rest in one dtype, which is the one computed in:
`model.to(torch.bfloat16)`.

Shapes: B sequences of up to T tokens; N tokens of several sequences packed end to end; C = n_embd.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanosft.console import UserError
from nanosft.hub import base_trained_on, locate
from nanosft.weights import file_name, read_adapter, read_pretrained, write_adapter, write_pretrained

IGNORE_INDEX = -100  # a target that nothing is learned from; the default of F.cross_entropy


@dataclass
class GPTConfig:
    block_size: int = 1024  # the longest sequence, in tokens
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    eos_token_id: int = 50256  # ends an answer; the model does not use it, its config.json tells it to others
    bos_token_id: int = 50256
    # what follows is GPT-2's; other families change some
    fused_qkv: bool = True  # one matrix for queries, keys and values
    n_kv_head: int = 0  # heads of keys and values, each of which serves several of queries; 0 = n_head
    head_dim: int = 0  # 0 = n_embd / n_head
    n_inner: int = 0  # width within the MLP; 0 = 4 n_embd
    gated_mlp: bool = False  # SwiGLU (Shazeer 2020) in the place of GELU
    bias: bool = True  # of the linear layers
    qkv_bias: bool = False  # of queries, keys and values alone, as Qwen 2 has it
    qk_norm: bool = False  # RMSNorm of each head's query and key, as Qwen 3 has it
    rms_norm: bool = False  # RMSNorm (Zhang and Sennrich 2019) in the place of LayerNorm
    norm_eps: float = 1e-5
    rope_theta: float = 0.0  # the base of rotary positions (Su et al. 2021); 0 = learned positions
    rope_scaling: dict | None = None  # Llama 3's, for long contexts: factor, low_freq_factor ..., as in config.json
    tied_head: bool = True  # the token embedding is the output head, too

    def __post_init__(self):
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd


# ---- packing --------------------------------------------------------------------------------------------------------

class Packing(NamedTuple):
    """Where M tokens stand: in their own sequence, and in the (B, T) grid that attention wants."""
    position_ids: torch.Tensor  # (M,) each token's place in its own sequence
    shape: tuple[int, int]  # B, T
    source: torch.Tensor | None = None  # (B * T,) the token at each place of the flattened grid; None: as they come
    index: torch.Tensor | None = None  # (M,) the first place of each token
    cu_seqlens: torch.Tensor | None = None  # (B + 1,) int32, where sequences begin and end; then no grid is needed
    mask: torch.Tensor | None = None  # (B, 1, 1, S) cached keys that each row sees; None: causal attention
    rotary: tuple | None = None  # cosines and sines, (M, 1, head_dim / 2) each, of rotary positions

    def pad(self, x):
        """(M, C) -> (B, T, C), any token's values where no token stands: after a row's end, where none looks."""
        return (x if self.source is None else x.index_select(0, self.source)).view(*self.shape, -1)

    def unpad(self, x):
        """(B, T, C) -> (M, C)."""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)


def pack(idx, lengths, device, varlen=False, multiple=1):
    """(ids (M,), packing, token_of (N,)) of sequences that lie end to end in idx, (N,).

    Where a sequence begins as the one before it does, with a template's words, say, or a system prompt, it shares that
    one's tokens, which are computed once: causal attention gives the same in both. token_of says which of the M tokens
    each of the N is. M and T are rounded up to a multiple. With `varlen` there is no grid, no token is shared, M is N.
    """
    lengths = torch.as_tensor(lengths)
    B, T = len(lengths), -(-int(lengths.max()) // multiple) * multiple
    real = torch.arange(T) < lengths[:, None]  # (B, T)
    if varlen:
        position_ids, cu_seqlens = torch.arange(T).expand(B, T)[real], F.pad(lengths.cumsum(0), (1, 0)).int()
        packing = Packing(to_device(position_ids, device), (B, T), cu_seqlens=to_device(cu_seqlens, device))
        return to_device(idx, device), packing, torch.arange(len(idx))
    idx = idx.to("cpu")
    grid, is_new = torch.full((B, T), -1).masked_scatter(real, idx), real.clone()
    is_new[1:] &= (grid[1:] == grid[:-1]).cumprod(1) == 0
    number = torch.where(is_new, is_new.flatten().cumsum(0).view(B, T) - 1, 0)
    source = number.cummax(0).values.flatten()  # a place's own token, or the last new one above
    index = is_new.flatten().nonzero().squeeze(1)
    tail = (0, -len(index) % multiple)
    ids, rounded = F.pad(idx[is_new[real]], tail), F.pad(index, tail)
    packing = Packing(to_device(rounded % T, device), (B, T))
    if B > 1 and len(index) < B * T:  # else the tokens are the grid
        packing = packing._replace(source=to_device(source, device), index=to_device(rounded, device))
    return to_device(ids, device), packing, source[real.flatten()]


def to_device(x, device):
    """`x` on this device; to a GPU from pinned memory, so that the CPU need not wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---- attention ------------------------------------------------------------------------------------------------------

def rotary_speeds(config, device=None):
    """The angles, (head_dim / 2,), by which rotary positions turn each pair at each token. Llama 3 slows
    those that make under high_freq_factor turns in its first context, the slowest ones the most."""
    speeds = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    if config.rope_scaling:
        scaling = config.rope_scaling
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * speeds / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        speeds = speeds * (kept + (1 - kept) / scaling["factor"])
    return speeds


def rotary(config, position_ids, dtype):
    """Cosines and sines of the angles at these positions, (N, 1, head_dim / 2) each."""
    angles = position_ids[:, None, None] * rotary_speeds(config, position_ids.device)  # float32
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turns each pair (i, i + head_dim / 2) of the heads x, (N, heads, head_dim), by its angle."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attention(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(head_dim)) v, for q of (B, n_head, T, head_dim), and k and v of as many heads or fewer, each
    of which serves several of q's; causal where `mask` is None."""
    B, n_head, T, head_dim = q.shape
    shared = n_head // k.size(1)
    short_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 1024 and q.requires_grad
    if mask is not None or not short_on_cpu or torch.compiler.is_compiling():
        if shared > 1:
            k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    # Written out: on short examples torch's CPU kernel takes up to twice as long. The queries go in pieces of 128, each
    # of which meets only the keys up to its own end. Those that share a key stand below each other.
    k, v = (x.reshape(-1, T, head_dim) for x in (k, v))  # (B * n_kv_head, T, head_dim)
    q, pieces = q.reshape(len(k), shared, T, head_dim), []
    for start in range(0, T, 128):
        stop = min(start + 128, T)
        piece = q[:, :, start:stop].reshape(len(k), -1, head_dim)
        bias = torch.full((stop - start, stop), -math.inf, dtype=q.dtype).triu(start + 1).repeat(shared, 1)  # causal
        scores = torch.baddbmm(bias, piece, k[:, :stop].transpose(1, 2), alpha=1 / math.sqrt(head_dim))
        weights = F.dropout(scores.softmax(-1), dropout)  # (B * n_kv_head, shared * (stop - start), stop)
        pieces.append(torch.bmm(weights, v[:, :stop]).view(len(k), shared, -1, head_dim))
    return torch.cat(pieces, 2).view(B, n_head, T, head_dim)


def varlen_attention(q, k, v, cu_seqlens, longest):
    """Causal attention within each of the sequences that lie end to end in q, k, v, (N, n_head, head_dim): Dao 2023,
    FlashAttention 2. cu_seqlens: (B + 1,) int32, where the sequences begin and end."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import, which only a GPU repays
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))


def has_varlen_attention(weight, head_dim):
    """Whether `varlen_attention` can be used: 16 bits, on an NVIDIA GPU from Ampere on."""
    return (weight.device.type == "cuda" and weight.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 192
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(weight.device) >= (8, 0))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, C, D = config, config.n_embd, config.head_dim
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # of queries, keys and values
        if config.fused_qkv:
            self.c_attn = nn.Linear(C, sum(self.heads) * D, config.bias)
        else:
            bias = config.bias or config.qkv_bias
            self.c_q, self.c_k, self.c_v = (nn.Linear(C, heads * D, bias) for heads in self.heads)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)
        self.c_proj = nn.Linear(config.n_head * D, C, config.bias)

    def forward(self, x, packing, cache=None):
        (B, T), (n_head, n_kv_head, _), D = packing.shape, self.heads, self.config.head_dim
        dropout = self.config.dropout if self.training else 0.0
        qkv = self.c_attn(x) if self.config.fused_qkv else torch.cat([self.c_q(x), self.c_k(x), self.c_v(x)], -1)
        qkv = qkv.view(len(x), -1, D)  # (N, heads of all three, head_dim)
        if packing.rotary is not None:
            qk, v = qkv.split([n_head + n_kv_head, n_kv_head], 1)
            if self.config.qk_norm:
                qk = torch.cat([self.q_norm(qk[:, :n_head]), self.k_norm(qk[:, n_head:])], 1)
            qkv = torch.cat([rotate(qk, *packing.rotary), v], 1)
        if packing.cu_seqlens is not None:
            q, k, v = qkv.split(self.heads, 1)
            k, v = (x.repeat_interleave(n_head // n_kv_head, 1) for x in (k, v))
            y = varlen_attention(q, k, v, packing.cu_seqlens, T).flatten(1)  # (N, n_head * head_dim)
        else:
            qkv = packing.pad(qkv.flatten(1)).view(B, T, -1, D).transpose(1, 2)
            q, k, v = qkv.split(self.heads, 1)  # (B, heads, T, head_dim)
            if cache is not None:
                k, v = self.update(cache, k, v, packing)
            if packing.mask is not None:  # one new token a row: the queries that share a key stand in the place of T
                q = q.reshape(B, n_kv_head, -1, D)
            y = attention(q, k, v, packing.mask, dropout).view(B, n_head, T, D)
            y = packing.unpad(y.transpose(1, 2).reshape(B, T, -1))
        return F.dropout(self.c_proj(y), dropout)

    def update(self, cache, k, v, packing):
        """Writes new keys and values, (B, n_kv_head, T, head_dim), into the layer's cache; returns those to look at."""
        keys, values = cache  # (B, n_kv_head, S, head_dim)
        if packing.mask is None:  # whole prompts, which see themselves alone
            keys[:, :, :k.size(2)], values[:, :, :v.size(2)] = k, v
            return k, v
        # one new token a row, each at its own position
        rows, seen = torch.arange(len(k), device=k.device), packing.mask.size(-1)
        keys[rows, :, packing.position_ids] = k[:, :, 0]
        values[rows, :, packing.position_ids] = v[:, :, 0]
        return keys[:, :, :seen], values[:, :, :seen]


# ---- the other layers -----------------------------------------------------------------------------------------------

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        if config.gated_mlp:
            self.c_gate = nn.Linear(config.n_embd, config.n_inner, config.bias)
        self.c_fc = nn.Linear(config.n_embd, config.n_inner, config.bias)
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, config.bias)

    def forward(self, x):
        if self.config.gated_mlp:
            gate, x = self.c_gate(x), self.c_fc(x)
            # in training silu(gate) is computed anew in backward: 0.3 of 4.9 GB for 672 tokens of a 1B, and no slower
            x = checkpoint(swiglu, gate, x, use_reentrant=False) if gate.requires_grad else swiglu(gate, x)
        else:
            x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.config.dropout, self.training)


def swiglu(gate, x):
    return F.silu(gate) * x


class RMSNorm(nn.RMSNorm):
    """As Llama computes it: the mean square in float32, the product with the weight in x's dtype. Backward needs no
    copy of x in float32, which torch's own keeps: 0.1 of 4.9 GB for 672 tokens of a 1B."""

    def forward(self, x):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        return (x * (norm.square() / x.size(-1) + self.eps).rsqrt()).to(x.dtype) * self.weight


def norm(config):
    return (RMSNorm if config.rms_norm else nn.LayerNorm)(config.n_embd, config.norm_eps)


def embedding(count, width):
    """An nn.Embedding without its own initial values: random ones on the meta device import torch's compiler, 1.6 s."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = Attention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, packing, cache=None):
        x = x + self.attn(self.ln_1(x), packing, cache)
        return x + self.mlp(self.ln_2(x))


class LoraLinear(nn.Linear):
    """A frozen Linear plus a trainable update of low rank, alpha / rank · B A (Hu et al. 2021, "LoRA")."""

    def __init__(self, base, rank, alpha, dropout):
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        options = dict(device=base.weight.device, dtype=base.weight.dtype)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (N, rank)
        return torch.addmm(super().forward(x), low, self.lora_B.t(), alpha=self.scale)


# ---- the model ------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """A decoder with freshly initialised weights in float32."""

    def __init__(self, config):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        self.wte = embedding(config.vocab_size, config.n_embd)
        self.wpe = None if config.rope_theta else embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = norm(config)
        self.lm_head = None if config.tied_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if self.wte.weight.is_meta:  # a file will fill it
            return
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # there are 2 n_layer of them on the residual path
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, packing, cache=None):
        """The last layer's normalised output, (N, C), for packed token ids (N,)."""
        x = self.wte(idx)
        if self.wpe:
            x = x + self.wpe(packing.position_ids)
        else:
            packing = packing._replace(rotary=rotary(self.config, packing.position_ids, x.dtype))
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, packing, use_reentrant=False)
            else:
                x = block(x, packing, None if cache is None else cache[:, i])
        return self.ln_f(x)

    def logits(self, x):
        """(N, C) -> (N, vocab_size), in float32 or, as x, float64.

        GPT-2's logits lie around -100, where bfloat16 counts in halves. With 16-bit x they are therefore computed about
        a mean of zero, as x W^T - x·mean_row: a shift that softmax does not see, and rounding does.
        """
        weight = self.lm_head.weight if self.lm_head else self.wte.weight
        if x.dtype.itemsize > 2:
            return F.linear(x, weight)
        return torch.addmm(-self.shift(x).to(x.dtype), x, weight.t()).float()

    def shift(self, x):
        """x·mean_row of `logits`, (N, 1), float32. Its gradient takes the mean out of backward, too."""
        weight = self.lm_head.weight if self.lm_head else self.wte.weight
        sample = weight.detach()[::max(1, len(weight) // 512)]
        return (x.float() @ sample.mean(0, dtype=torch.float32))[:, None]

    def forward(self, idx, targets=None, lengths=None):
        """Logits or, with `targets`, the sum (not the mean) of the losses of all targets that are not IGNORE_INDEX.

        idx: int64 token ids, (B, T); or (N,) with `lengths`: sequences of these lengths end to end, each of which sees
        only itself. targets: the id that follows each token, in idx's shape; best left on the CPU.
        Returns logits of idx's shape + (vocab_size,), shifted as `logits` says, or the loss, a scalar; float32, or the
        model's float64.
        """
        device = self.wte.weight.device
        if lengths is None:
            lengths = [idx.size(1)] * idx.size(0)
        assert max(lengths) <= self.config.block_size, f"{max(lengths)} tokens exceed the context"
        varlen = has_varlen_attention(self.wte.weight, self.config.head_dim)
        varlen = varlen and not (self.training and self.config.dropout)
        # a CPU makes kernels, and keeps them, for every shape: in training all are rounded up
        ids, packing, token_of = pack(idx.flatten(), lengths, device, varlen, multiple=1 if targets is None else 32)
        x = self.hidden(ids, packing)  # (M, C)
        if targets is None:
            return self.logits(x.index_select(0, to_device(token_of, device))).view(*idx.shape, -1)
        # the head sees the supervised tokens alone, and as many others as round them up
        tail = (0, -len(token_of) % 32)
        token_of, targets = F.pad(token_of, tail), F.pad(targets.flatten().to("cpu"), tail, value=IGNORE_INDEX)
        ignored = targets == IGNORE_INDEX
        supervised = len(targets) - int(ignored.sum())
        rows = ignored.byte().argsort(stable=True)[:-(-supervised // 32) * 32]
        return self.loss(x.index_select(0, to_device(token_of[rows], device)), to_device(targets[rows], device))

    def loss(self, x, targets, slice_rows=512):
        """The summed cross-entropy of (N, C) against (N,), a slice of rows at a time: all logits of a long text would
        not fit into memory, so those of several slices are computed anew in backward."""
        def slice_loss(x, targets):
            return F.cross_entropy(self.logits(x), targets, reduction="sum")

        if len(x) <= slice_rows:
            return slice_loss(x, targets)
        parts = zip(x.split(slice_rows), targets.split(slice_rows), strict=True)
        return sum(checkpoint(slice_loss, *part, use_reentrant=False) for part in parts)

    # ---- generation ----

    def prefill(self, prompts, new_tokens):
        """Reads prompts, lists of ids of any lengths. Returns the hidden state at the end of each, (B, C); the cache of
        keys and values, (2, n_layer, B, n_kv_head, S, head_dim), with room for `new_tokens` more; the lengths, (B,)."""
        config, weight, longest = self.config, self.wte.weight, max(map(len, prompts))
        assert min(map(len, prompts)) > 0, "an empty prompt"
        if longest > config.block_size:
            raise UserError(f"the prompt has {longest:,} tokens, the context {config.block_size:,}: shorten it")
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        cache = weight.new_zeros(2, config.n_layer, len(prompts), config.n_kv_head,
                                 min(config.block_size, longest + new_tokens), config.head_dim)
        ids = torch.tensor([token for prompt in prompts for token in prompt])  # (N,)
        ids, packing, token_of = pack(ids, lengths, weight.device)
        x = self.hidden(ids, packing, cache)
        return x.index_select(0, token_of[lengths.cumsum(0) - 1].to(weight.device)), cache, lengths

    def decode(self, ids, cache, lengths):
        """Reads one more token a row, ids (B,), into the cache. Returns the hidden state, (B, C)."""
        position = lengths.clamp(max=cache.size(4) - 1)  # rows that have ended stay within the cache
        seen = torch.arange(int(position.max()) + 1) <= position[:, None]  # (B, S)
        packing = Packing(position.to(ids.device), (len(ids), 1), mask=seen[:, None, None].to(ids.device))
        return self.hidden(ids, packing, cache)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, stop=None, n_vocab=None,
                 repetition_penalty=1.0, generator=None):
        """Continues `prompts`, lists of token ids of any lengths. Yields, step by step, a list with each row's next id;
        None for rows that have ended.

        A row ends with `stop` (which is yielded), after max_new_tokens, or when the context is full. temperature 0
        takes the most likely token; top_k > 0 and top_p < 1 cut the distribution; ids from n_vocab on are never drawn.
        repetition_penalty divides the positive logits of ids that a row has, and multiplies the negative ones (Keskar
        et al. 2019).
        """
        x, cache, lengths = self.prefill(prompts, max_new_tokens)
        rows = list(range(len(prompts)))  # the prompt that each row of the cache goes on with; None: it has ended
        seen = torch.zeros(len(prompts), self.config.vocab_size, dtype=torch.bool, device=x.device)  # ids of rows
        for row, prompt in zip(seen, prompts, strict=True):
            row[prompt] = True
        for step in range(max_new_tokens):
            logits = self.logits(x)[:, :n_vocab]
            if repetition_penalty != 1:
                if x.dtype.itemsize == 2:
                    logits = logits + self.shift(x)
                penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
                logits = torch.where(seen[:, :n_vocab], penalised, logits)
            drawn = draw(logits, temperature, top_k, top_p, generator)  # (B,)
            ids = dict(zip(rows, drawn.tolist(), strict=True))
            yield [ids.get(row) for row in range(len(prompts))]
            full = (lengths == cache.size(4)).tolist()
            rows = [None if ids[row] == stop or ended else row for row, ended in zip(rows, full, strict=True)]
            left = [place for place, row in enumerate(rows) if row is not None]
            if not left or step + 1 == max_new_tokens:
                return
            if len(left) <= len(rows) // 2:  # to copy the cache pays once half of its rows have ended
                rows, drawn, cache, lengths = [rows[i] for i in left], drawn[left], cache[:, :, left], lengths[left]
                seen = seen[left]
            seen.scatter_(1, drawn[:, None], True)
            x, lengths = self.decode(drawn, cache, lengths), lengths + 1

    @torch.inference_mode()
    def log_likelihood(self, prompts, answers):
        """The log-probability of each of `answers` after each of `prompts`, lists of ids: (len(prompts), len(answers)),
        float32, summed over an answer's tokens. Every prompt is read once; one that leaves no place for the longest
        answer loses its beginning."""
        longest = max(map(len, answers))
        assert longest <= self.config.block_size, f"an answer of {longest} tokens exceeds the context"
        prompts = [prompt[longest - self.config.block_size - 1:] for prompt in prompts]
        x, cache, lengths = self.prefill(prompts, longest)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], True, padding_value=-1)
        ids = ids.repeat(len(prompts), 1).to(x.device)  # (pairs, longest answer): a row for every prompt and answer
        pairs = torch.arange(len(prompts)).repeat_interleave(len(answers))
        x, cache, lengths = x[pairs], cache[:, :, pairs], lengths[pairs]
        total = torch.zeros(len(pairs), device=x.device)
        for step, token in enumerate(ids.unbind(1)):
            if step > 0:
                x, lengths = self.decode(ids[:, step - 1].clamp(min=0), cache, lengths), lengths + 1
            log_probabilities = self.logits(x).log_softmax(-1)
            total += log_probabilities.gather(1, token.clamp(min=0)[:, None]).squeeze(1) * (token >= 0)
        return total.view(len(prompts), len(answers))

    # ---- LoRA ----

    def add_lora(self, rank, alpha, dropout, targets):
        """Freezes all weights and gives linear layers trainable updates of this rank: those whose names, as the
        model's files have them, end in one of `targets`; [] = all but the output head."""
        self.requires_grad_(False)
        linear = {file_name(self.config, name): name for name, module in self.named_modules()
                  if isinstance(module, nn.Linear) and name != "lm_head"}
        for target in targets:
            if not any(f".{name}".endswith(f".{target}") for name in linear):
                kinds = ", ".join(sorted({name.split(".")[-1] for name in linear}))
                raise UserError(f"--lora_targets: {target!r} names no layer; this model's are {kinds}")
        for name, own_name in linear.items():
            if not targets or any(f".{name}".endswith(f".{target}") for target in targets):
                base = self.get_submodule(own_name)
                self.set_submodule(own_name, LoraLinear(base, rank, alpha, dropout))
        return self

    def merge_lora(self):
        """Adds LoRA's updates, where there are any, to the weights, in their dtype; all become trainable."""
        for name, module in list(self.named_modules()):
            if isinstance(module, LoraLinear):
                weight = module.weight + module.scale * module.lora_B @ module.lora_A
                linear = nn.Linear(module.in_features, module.out_features, device="meta")
                linear.weight, linear.bias = nn.Parameter(weight.detach()), module.bias
                self.set_submodule(name, linear)
        return self.requires_grad_(True)

    def save_adapter(self, directory, base, state=None):
        """Writes LoRA's updates alone, in PEFT's layout and names; `base` is the name or path of the frozen model.
        `state`: the values to write, by parameter name; None: the parameters as they rest."""
        state = state or dict(self.named_parameters())
        lora = {name: module for name, module in self.named_modules() if isinstance(module, LoraLinear)}
        first = next(iter(lora.values()))
        write_adapter(directory, base, self.config, first.rank, first.scale * first.rank, first.dropout, {
            name: {part: state[f"{name}.{part}"] for part in ("lora_A", "lora_B")} for name in lora})

    def load_adapter(self, directory):
        """Adds the LoRA adapter of a directory in PEFT's layout, ours or peft's own; options we lack are refused."""
        rank, alpha, dropout, updates = read_adapter(directory, self.config)
        modules = dict(self.named_modules())
        for name, parts in sorted(updates.items()):
            base, shapes = modules.get(name), {part: tuple(tensor.shape) for part, tensor in parts.items()}
            if not isinstance(base, nn.Linear) or shapes != {"lora_A": (rank, base.in_features),
                                                             "lora_B": (base.out_features, rank)}:
                raise UserError(f"{directory}: {name} does not fit this model or rank {rank}; name the adapter's base")
            module = LoraLinear(base, rank, alpha, dropout)
            module.load_state_dict(parts, strict=False)  # what it lacks is the base's
            self.set_submodule(name, module)
        return self

    # ---- weights in and out ----

    @classmethod
    def from_pretrained(cls, name_or_path, dropout=0.0, dtype=torch.float32):
        """A GPT-2, Llama or Qwen in this dtype: by name from the hub (gpt2 ... gpt2-xl, or owner/name: downloaded
        once), or from a Hugging Face directory, a .bin or .safetensors file, nanoGPT's ckpt.pt, or an out_dir of
        train.py (its best weights; a LoRA adapter comes on its base). UserError for what is none, or does not fit."""
        path = locate(str(name_or_path))
        if path.name == "adapter_config.json":
            return cls.from_pretrained(base_trained_on(path), dropout, dtype).load_adapter(path.parent)
        state, numbers = read_pretrained(path, dtype)
        numbers["n_layer"] = min(numbers["n_layer"], len(state) + 1)  # enough to miss some
        with torch.device("meta"):  # no memory and no initial values for what the file fills
            model = cls(GPTConfig(**numbers, dropout=dropout))
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:  # its second line names the tensors that are missing, alien or of another shape
            raise UserError(f"{path} does not fit config.json: {str(error).splitlines()[1].strip()[:200]}; this is "
                            "another kind of model, or a broken file") from None
        return model.requires_grad_(True)

    def save_pretrained(self, directory, state=None):
        """Writes config.json and model.safetensors in Hugging Face's layout, each under a temporary name first.
        `state`: the values to write, by parameter name; None: the parameters as they rest."""
        write_pretrained(directory, state or dict(self.named_parameters()), self.config)


def draw(logits, temperature, top_k, top_p, generator):
    """One id per row of logits (B, V): the most likely at temperature 0, else drawn from the k most likely and from the
    smallest set whose probability reaches top_p (Holtzman et al. 2020)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    if top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[:, 1:][before[:, 1:] >= top_p] = 0  # the likeliest always stays
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
