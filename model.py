"""GPT-2 in plain PyTorch, with LoRA, and generation with a key/value cache.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Modules carry the names of OpenAI's release
(wte, wpe, h.0.attn.c_attn ...). Matrices are stored as nn.Linear has them, (out, in); Hugging Face's files hold the
transpose. All parameters rest in one dtype, which is the one computed in: `model.to(torch.bfloat16)`.

Shapes: B sequences of up to T tokens; N tokens of several sequences packed end to end; C = n_embd.
"""
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanosft.console import UserError
from nanosft.weights import base_of, locate, read_adapter, read_gpt2, write_adapter, write_gpt2

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


# ---- packing --------------------------------------------------------------------------------------------------------

class Packing(NamedTuple):
    """Where N packed tokens stand: in their own sequence, and in the (B, T) grid that attention wants."""
    position_ids: torch.Tensor  # (N,) each token's place in its own sequence
    shape: tuple[int, int]  # B, T
    index: torch.Tensor | None = None  # (N,) each token's place in the flattened grid; None: the grid has no gaps
    cu_seqlens: torch.Tensor | None = None  # (B + 1,) int32, where sequences begin and end; then no grid is needed
    mask: torch.Tensor | None = None  # (B, 1, 1, S) cached keys that each row sees; None: causal attention

    @classmethod
    def of(cls, lengths, device, varlen=False):
        """The packing of sequences of these lengths, in tokens."""
        lengths = torch.as_tensor(lengths)
        B, T = len(lengths), int(lengths.max())
        index = (torch.arange(T) < lengths[:, None]).flatten().nonzero().squeeze(1)  # (N,)
        position_ids = to_device(index % T, device)
        if varlen:
            cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
            return cls(position_ids, (B, T), cu_seqlens=to_device(cu_seqlens, device))
        return cls(position_ids, (B, T), index=None if len(index) == B * T else to_device(index, device))

    def pad(self, x):
        """(N, C) -> (B, T, C), zeros where no token stands."""
        B, T = self.shape
        if self.index is not None:
            x = x.new_zeros(B * T, x.size(-1)).index_copy(0, self.index, x)
        return x.view(B, T, -1)

    def unpad(self, x):
        """(B, T, C) -> (N, C)."""
        x = x.flatten(0, 1)
        return x if self.index is None else x.index_select(0, self.index)


def to_device(x, device):
    """`x` on this device; to a GPU from pinned memory, so that the CPU need not wait."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


# ---- attention ------------------------------------------------------------------------------------------------------

def attention(q, k, v, mask, dropout):
    """softmax(q k^T / sqrt(head_dim)) v, for (B, n_head, T, head_dim); causal where `mask` is None."""
    B, n_head, T, head_dim = q.shape
    short_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and T <= 512
    if mask is not None or not (short_on_cpu and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout)
    # Written out: on short examples torch's CPU kernel takes four times as long, most of it in backward.
    q, k, v = (x.reshape(B * n_head, T, head_dim) for x in (q, k, v))
    scores = torch.baddbmm(causal_bias(T, q.dtype), q, k.transpose(1, 2), alpha=1 / math.sqrt(head_dim))
    weights = F.dropout(scores.softmax(-1), dropout)  # (B * n_head, T, T)
    return torch.bmm(weights, v).view(B, n_head, T, head_dim)


@functools.lru_cache(maxsize=8)
def causal_bias(T, dtype):
    """(T, T), -inf where a query would see a later key, else 0."""
    return torch.full((T, T), -math.inf, dtype=dtype).triu(1)


def varlen_attention(q, k, v, cu_seqlens, longest):
    """Causal attention within each of the sequences that lie end to end in q, k, v, (N, n_head, head_dim): Dao 2023,
    FlashAttention 2. cu_seqlens: (B + 1,) int32, where the sequences begin and end."""
    from torch.nn.attention.varlen import varlen_attn  # takes a second to import, which only a GPU repays
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))


def has_varlen_attention(weight, head_dim):
    """Whether `varlen_attention` can be used: 16 bits, on an NVIDIA GPU from Ampere on."""
    return (weight.device.type == "cuda" and weight.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256
            and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability(weight.device) >= (8, 0))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, packing, cache=None):
        (B, T), C = packing.shape, x.size(-1)
        dropout = self.dropout if self.training else 0.0
        if packing.cu_seqlens is not None:
            q, k, v = self.c_attn(x).view(-1, 3, self.n_head, C // self.n_head).unbind(1)  # (N, n_head, head_dim)
            y = varlen_attention(q, k, v, packing.cu_seqlens, T).flatten(1)  # (N, C)
        else:
            qkv = packing.pad(self.c_attn(x)).view(B, T, 3, self.n_head, C // self.n_head)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim)
            if cache is not None:
                k, v = self.update(cache, k, v, packing)
            y = attention(q, k, v, packing.mask, dropout)
            y = packing.unpad(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(self.c_proj(y), dropout)

    def update(self, cache, k, v, packing):
        """Writes new keys and values, (B, n_head, T, head_dim), into the layer's cache; returns those to look at."""
        keys, values = cache  # (B, n_head, S, head_dim)
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
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
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

    def merged(self):
        """A plain Linear with the update added to its weights, in their dtype."""
        weight = self.weight + self.scale * self.lora_B @ self.lora_A
        linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight.detach()), self.bias
        return linear


def at_least_float32(x):
    """`x` in float32, or as it is where it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- the model ------------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """GPT-2 with freshly initialised weights in float32."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} is no multiple of n_head={config.n_head}")
        self.config, self.gradient_checkpointing = config, False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head, which GPT-2 ties to it
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # there are 2 n_layer of them on the residual path
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, idx, packing, cache=None):
        """The last layer's normalised output, (N, C), for packed token ids (N,)."""
        x = self.wte(idx) + self.wpe(packing.position_ids)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, packing, use_reentrant=False)
            else:
                x = block(x, packing, None if cache is None else cache[:, i])
        return self.ln_f(x)

    def logits(self, x):
        """(N, C) -> (N, vocab_size), in the dtype of x.

        GPT-2's logits lie around -100, where bfloat16 counts in halves. With 16-bit x they are therefore computed about
        a mean of zero, as x W^T - x·mean_row: a shift that softmax does not see, and rounding does.
        """
        weight = self.wte.weight
        if x.dtype.itemsize > 2:
            return F.linear(x, weight)
        sample = weight.detach()[::max(1, len(weight) // 512)]
        mean_row = sample.mean(0, dtype=torch.float32)  # (C,)
        bias = -(x.float() @ mean_row)[:, None].to(x.dtype)  # (N, 1); its gradient takes the mean out of backward, too
        return torch.addmm(bias, x, weight.t())

    def forward(self, idx, targets=None, lengths=None, reduction="sum"):
        """Logits or, with `targets`, the sum (not the mean) of the losses of all targets that are not IGNORE_INDEX.

        idx: int64 token ids, (B, T); or (N,) with `lengths`: sequences of these lengths end to end, each of which sees
        only itself. targets: the id that follows each token, in idx's shape; best left on the CPU.
        Returns logits of idx's shape + (vocab_size,), shifted as `logits` says; or the loss, a scalar; or, with
        reduction="none", the loss of each target that is not IGNORE_INDEX, in order. float32, or the model's float64.
        """
        device = self.wte.weight.device
        if lengths is None:
            lengths = [idx.size(1)] * idx.size(0)
        assert max(lengths) <= self.config.block_size, f"{max(lengths)} tokens exceed the context"
        varlen = has_varlen_attention(self.wte.weight, self.config.n_embd // self.config.n_head)
        packing = Packing.of(lengths, device, varlen and not (self.training and self.config.dropout))
        x = self.hidden(to_device(idx.flatten(), device), packing)  # (N, C)
        if targets is None:
            return at_least_float32(self.logits(x)).view(*idx.shape, -1)
        targets = targets.flatten()
        rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # the head sees supervised tokens alone
        return self.loss(x.index_select(0, to_device(rows, device)), to_device(targets[rows], device), reduction)

    def loss(self, x, targets, reduction, slice_rows=512):
        """The cross-entropy of (N, C) against (N,), a slice of rows at a time: all logits of a long text would not fit
        into memory, so those of several slices are computed anew in backward."""
        def slice_loss(x, targets):
            return F.cross_entropy(at_least_float32(self.logits(x)), targets, reduction=reduction)

        if len(x) <= slice_rows:
            return slice_loss(x, targets)
        losses = [checkpoint(slice_loss, *part, use_reentrant=False)
                  for part in zip(x.split(slice_rows), targets.split(slice_rows), strict=True)]
        return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)

    # ---- generation ----

    def prefill(self, prompts, new_tokens):
        """Reads prompts, lists of ids of any lengths. Returns the hidden state at the end of each, (B, C); the cache of
        keys and values, (2, n_layer, B, n_head, S, head_dim), with room for `new_tokens` more; the lengths, (B,)."""
        config, weight, longest = self.config, self.wte.weight, max(map(len, prompts))
        assert min(map(len, prompts)) > 0, "an empty prompt"
        if longest > config.block_size:
            raise UserError(f"the prompt has {longest:,} tokens, the context {config.block_size:,}: shorten it")
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        cache = weight.new_zeros(2, config.n_layer, len(prompts), config.n_head,
                                 min(config.block_size, longest + new_tokens), config.n_embd // config.n_head)
        ids = torch.tensor([token for prompt in prompts for token in prompt], device=weight.device)  # (N,)
        x = self.hidden(ids, Packing.of(lengths, weight.device), cache)
        return x.index_select(0, (lengths.cumsum(0) - 1).to(weight.device)), cache, lengths

    def decode(self, ids, cache, lengths):
        """Reads one more token a row, ids (B,), into the cache. Returns the hidden state, (B, C)."""
        position = lengths.clamp(max=cache.size(4) - 1)  # rows that have ended stay within the cache
        seen = torch.arange(int(position.max()) + 1) <= position[:, None]  # (B, S)
        packing = Packing(position.to(ids.device), (len(ids), 1), mask=seen[:, None, None].to(ids.device))
        return self.hidden(ids, packing, cache)

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, stop=None, n_vocab=None,
                 generator=None):
        """Continues `prompts`, lists of token ids of any lengths. Yields, step by step, a list with each row's next id;
        None for rows that have ended.

        A row ends with `stop` (which is yielded), after max_new_tokens, or when the context is full. temperature 0
        takes the most likely token; top_k > 0 and top_p < 1 cut the distribution; ids from n_vocab on are never drawn.
        """
        x, cache, lengths = self.prefill(prompts, max_new_tokens)
        rows = list(range(len(prompts)))  # the prompt that each row of the cache goes on with; None: it has ended
        for step in range(max_new_tokens):
            logits = at_least_float32(self.logits(x)[:, :n_vocab])
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
            x, lengths = self.decode(drawn, cache, lengths), lengths + 1

    @torch.inference_mode()
    def log_likelihood(self, prompts, answers):
        """The log-probability of each of `answers` after each of `prompts`, lists of ids: (len(prompts), len(answers)),
        float32, summed over an answer's tokens. Every prompt is read once."""
        x, cache, lengths = self.prefill(prompts, max(map(len, answers)))
        ids = nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], True, padding_value=-1)
        ids = ids.repeat(len(prompts), 1).to(x.device)  # (pairs, longest answer): a row for every prompt and answer
        pairs = torch.arange(len(prompts)).repeat_interleave(len(answers))
        x, cache, lengths = x[pairs], cache[:, :, pairs], lengths[pairs]
        total = torch.zeros(len(pairs), device=x.device)
        for step, token in enumerate(ids.unbind(1)):
            if step > 0:
                x, lengths = self.decode(ids[:, step - 1].clamp(min=0), cache, lengths), lengths + 1
            log_probabilities = at_least_float32(self.logits(x)).log_softmax(-1)
            total += log_probabilities.gather(1, token.clamp(min=0)[:, None]).squeeze(1) * (token >= 0)
        return total.view(len(prompts), len(answers))

    # ---- LoRA ----

    def add_lora(self, rank, alpha, dropout, targets):
        """Freezes all weights and gives the linear layers named in `targets` trainable updates of this rank."""
        self.requires_grad_(False)
        linear = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        for target in targets:
            named = [name for name in linear if f".{name}".endswith(f".{target}")]
            if not named:
                raise UserError(f"--lora_targets: {target!r} names no layer; GPT-2's are c_attn, c_proj, c_fc")
            for name in named:
                self.set_submodule(name, LoraLinear(linear[name], rank, alpha, dropout))
        return self

    def merge_lora(self):
        """Turns LoRA's updates, where there are any, into plain weights."""
        for name, module in list(self.named_modules()):
            if isinstance(module, LoraLinear):
                self.set_submodule(name, module.merged())
        return self.requires_grad_(True)

    def save_adapter(self, directory, base, state=None):
        """Writes LoRA's updates alone, in PEFT's layout and names; `base` is the name or path of the frozen model.
        `state`: the values to write, by parameter name; None: the parameters as they rest."""
        state = state or dict(self.named_parameters())
        lora = {name: module for name, module in self.named_modules() if isinstance(module, LoraLinear)}
        first = next(iter(lora.values()))
        write_adapter(directory, base, first.rank, first.scale * first.rank, first.dropout, {
            name: {part: state[f"{name}.{part}"] for part in ("lora_A", "lora_B")} for name in lora})

    def load_adapter(self, directory):
        """Adds the LoRA adapter of a directory in PEFT's layout, ours or peft's own; options we lack are refused."""
        rank, alpha, dropout, updates = read_adapter(directory)
        modules = dict(self.named_modules())
        for name, parts in sorted(updates.items()):
            base, shapes = modules.get(name), {part: tuple(tensor.shape) for part, tensor in parts.items()}
            if not isinstance(base, nn.Linear) or shapes != {"lora_A": (rank, base.in_features),
                                                             "lora_B": (base.out_features, rank)}:
                raise UserError(f"{directory}: the adapter's {name} does not fit this model or its rank {rank}; name "
                                "the base that it was trained on")
            module = LoraLinear(base, rank, alpha, dropout)
            for part, tensor in parts.items():
                getattr(module, part).data = tensor.to(base.weight)
            self.set_submodule(name, module)
        return self

    # ---- weights in and out ----

    @classmethod
    def from_pretrained(cls, name_or_path, dropout=0.0):
        """GPT-2 from OpenAI's weights by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl: downloaded once), or from a
        Hugging Face directory, a .bin or .safetensors file, nanoGPT's ckpt.pt, or an out_dir of train.py (its best
        weights; a LoRA adapter comes on its base). float32. UserError for what is none, or does not fit."""
        path = locate(str(name_or_path))
        if path.name == "adapter_config.json":
            base = base_of(path)
            if locate(base).name == path.name:
                raise UserError(f"{path}: the base {base} is itself an adapter; name plain weights there")
            return cls.from_pretrained(base, dropout).load_adapter(path.parent)
        state, numbers = read_gpt2(path)
        numbers["n_layer"] = min(numbers["n_layer"], len(state) + 1)  # enough to miss some
        with torch.device("meta"):  # no memory and no initial values for what the file fills
            model = cls(GPTConfig(**numbers, dropout=dropout))
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:  # its second line names the tensors that are missing, alien or of another shape
            raise UserError(f"{path} does not fit config.json: {str(error).splitlines()[1].strip()[:200]}; this is no "
                            "GPT-2, or a broken file") from None
        return model.requires_grad_(True)

    def save_pretrained(self, directory, state=None):
        """Writes config.json and model.safetensors in Hugging Face's layout, each under a temporary name first.
        `state`: the values to write, by parameter name; None: the parameters as they rest."""
        if state is None:
            state = {name: parameter.detach() for name, parameter in self.named_parameters()}
        write_gpt2(directory, state, self.config)


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
