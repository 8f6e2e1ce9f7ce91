"""A model as one GGUF file for llama.cpp and Ollama, with a Modelfile beside it. Needs the package gguf."""
import dataclasses
import json
from pathlib import Path

from model import rotary_speeds
from nanosft.chat_template import Special, render_roles
from nanosft.console import UserError
from nanosft.files import atomic_file, read_json
from nanosft.records import NAME
from nanosft.templates import alpaca_prompt, chat_template
from nanosft.tokenizer import DIGITS, GPT2, LLAMA3
from nanosft.weights import rename

TYPES = ("f16", "f32", "bf16", "q8_0")  # of the matrices
PRE_TOKENIZERS = {GPT2: "gpt-2", DIGITS: "smollm", LLAMA3: "llama-bpe"}  # llama.cpp's names of what cuts a text
RENAMED = {"wte.": "token_embd.", "wpe.": "position_embd.", "h.": "blk.", "ln_1.": "attn_norm.", "ln_2.": "ffn_norm.",
           "ln_f.": "output_norm.", "lm_head.": "output.", "attn.c_attn": "attn_qkv", "attn.c_q": "attn_q",
           "attn.c_k": "attn_k", "attn.c_v": "attn_v", "attn.c_proj": "attn_output", "mlp.c_gate": "ffn_gate",
           "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # kinds of tokens


def write_gguf(path, loaded, kind):
    """Writes sample.py's LoadedModel, whose weights are float32, to `path`, with matrices of this kind (one of TYPES)
    and vectors in float32; and its wording for Ollama to Modelfile in the same directory."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"--export={path} needs the package gguf: pip install gguf") from None
    path, config = Path(path), loaded.model.config
    if not (Path(loaded.directory) / "tokenizer.json").is_file():
        raise UserError(f"--export={path}: llama.cpp needs a tokenizer; put the base's tokenizer.json into "
                        f"{loaded.directory}")
    path.parent.mkdir(parents=True, exist_ok=True)
    type_of = gguf.GGMLQuantizationType
    with atomic_file(path) as file:
        writer = gguf.GGUFWriter(file.name, "llama" if config.rope_theta else "gpt2")
        writer.add_name(path.stem)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind])
        add_sizes(writer, config)
        add_tokenizer(writer, gguf, loaded)
        if config.rope_scaling:
            plain = rotary_speeds(dataclasses.replace(config, rope_scaling=None))
            writer.add_tensor("rope_freqs.weight", (plain / rotary_speeds(config)).numpy())
        for name, tensor in loaded.model.named_parameters():
            tensor = tensor.detach().float()
            for layer, heads in (("attn.c_q.", config.n_head), ("attn.c_k.", config.n_kv_head)):
                if layer in name:
                    tensor = interleave(tensor, heads)
            is_small = tensor.dim() == 1 or name.startswith("wpe")
            data_type = type_of.F32 if is_small else getattr(type_of, kind.upper())
            if data_type == type_of.Q8_0 and tensor.size(-1) % 32:  # it counts in blocks of 32
                data_type = type_of.F16
            data = gguf.quants.quantize(tensor.contiguous().numpy(), data_type)
            writer.add_tensor(rename(name, RENAMED), data, raw_dtype=data_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with atomic_file(path.parent / "Modelfile") as file:
        file.write(modelfile(path.name, loaded).encode())
    print(f"wrote {path} and Modelfile; try: ollama create {path.stem.lower()} -f {path.parent / 'Modelfile'}")


def add_sizes(writer, config):
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_vocab_size(config.vocab_size)
    if not config.rope_theta:
        return writer.add_layer_norm_eps(config.norm_eps)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def add_tokenizer(writer, gguf, loaded):
    """The vocabulary as tokenizer.json has it, the special tokens, and the wording as a chat template."""
    encoding, values = loaded.encoding, read_json(Path(loaded.directory) / "tokenizer.json")
    pre = PRE_TOKENIZERS.get(getattr(encoding, "pattern", GPT2))
    if not pre:
        raise UserError(f"--export: llama.cpp has no name for the pre-tokenizer of {loaded.directory}; "
                        "export a directory instead")
    texts = {token: text for text, token in values["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in values["added_tokens"]}
    ids = range(loaded.model.config.vocab_size)
    texts = {**{token: f"[PAD{token}]" for token in ids if token not in texts}, **texts, **special}
    kinds = [CONTROL if token in special else UNUSED if texts[token] == f"[PAD{token}]" else NORMAL for token in ids]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([texts[token] for token in ids])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in values["model"]["merges"]])
    bos = getattr(encoding, "bos_token", None)
    writer.add_bos_token_id(encoding.encode_single_token(bos) if bos else encoding.eot_token)
    writer.add_eos_token_id(loaded.stop)
    writer.add_add_bos_token(getattr(encoding, "starts_with_bos", False))
    spec = loaded.spec
    source = spec and (spec["chat_template"] if spec["template"] == "model" else chat_template(spec))
    if source:
        writer.add_chat_template(source)


def interleave(weight, heads):
    """A matrix (out, in) with each head's rows in llama.cpp's order: the pairs that rotary positions turn are
    neighbours there, and half a head apart in Hugging Face's files."""
    return weight.view(heads, 2, -1, weight.size(-1)).transpose(1, 2).reshape(weight.shape)


# ---- Ollama ---------------------------------------------------------------------------------------------------------

def literal(text):
    """Text for a Go template, in which {{ begins code."""
    return text.replace("{{", "\0").replace("}}", '{{ "}}" }}').replace("\0", '{{ "{{" }}')


def modelfile(name, loaded):
    """The prompt of training in Ollama's words, with the question at {{ .Prompt }}, and what ends an answer."""
    stop = loaded.encoding.decode([loaded.stop])
    lines = [f"FROM ./{name}", f"PARAMETER stop {json.dumps(stop)}", "PARAMETER temperature 0"]
    wording = go_template(loaded.spec, stop) if loaded.spec else "{{ .Prompt }}"
    return "\n".join([*lines, f'TEMPLATE """{wording}{{{{ .Response }}}}"""', ""])


def go_template(spec, stop):
    if spec["template"] == "model":
        user, system = go_turns(spec, ("user",)), None
        try:
            system = go_turns(spec, ("system", "user"))
        except UserError:  # the template holds none
            return user
        return f"{{{{ if .System }}}}{system}{{{{ else }}}}{user}{{{{ end }}}}"
    if spec["response_format"]:
        columns = NAME.findall(spec["prompt_format"])
        return "{{ .Prompt }}".join(map(literal, NAME.sub("\0", spec["prompt_format"]).split("\0"))) if columns else ""
    if spec["template"] == "chat":
        return (f"{{{{ if .System }}}}{stop}system\n{{{{ .System }}}}{{{{ end }}}}{stop}user\n{{{{ .Prompt }}}}{stop}"
                "assistant\n")
    return "{{ .Prompt }}".join(map(literal, alpaca_prompt("\0", "").split("\0")))


def go_turns(spec, roles):
    """What the model's own template writes for these roles, with Ollama's names for the contents."""
    _, segments = render_roles(spec["chat_template"], roles, spec["bos_token"], spec["eos_token"],
                               tuple(spec["special_tokens"]))
    names = [f"{{{{ .{'System' if role == 'system' else 'Prompt'} }}}}" for role in roles]
    begin = spec["bos_token"] if spec.get("starts_with_bos") else ""  # llama.cpp puts it first by itself
    text = "".join(text if isinstance(text, Special) else literal(text).format(*names) for text, _ in segments)
    return text.removeprefix(begin)
