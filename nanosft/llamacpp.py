"""A model as one GGUF file for llama.cpp and Ollama, with a Modelfile beside it. Needs the package gguf."""
import contextlib
import dataclasses
import json
import re
import shlex
from pathlib import Path

from model import rotary_speeds
from nanosft.console import UserError
from nanosft.files import atomic_file, read_json
from nanosft.records import Message, columns_of
from nanosft.templates import EOT, chat_template
from nanosft.tokenizer import DIGITS, GPT2, LLAMA3, QWEN
from nanosft.weights import family_of, file_name

TYPES = ("f16", "f32", "bf16", "q8_0")  # of the matrices
# llama.cpp's names of what cuts a text
PRE_TOKENIZERS = {GPT2: "gpt-2", DIGITS: "smollm", LLAMA3: "llama-bpe", QWEN: "qwen2"}


def write_gguf(path, loaded, kind):
    """Writes sample.py's LoadedModel, whose weights are float32, to `path`, with matrices of this kind (one of TYPES)
    and vectors in float32; and its wording for Ollama to Modelfile in the same directory."""
    try:
        import gguf
    except ImportError:
        raise UserError(f"--export={path} needs the package gguf: pip install gguf") from None
    path, config = Path(path), loaded.model.config
    if not (Path(loaded.directory) / "tokenizer.json").is_file():
        remedy = f"put the base's tokenizer.json into {loaded.directory}"
        if loaded.encoding.name == "bytes":
            remedy = "a model of bytes has none: prepare with --model=NAME"
        raise UserError(f"--export={path}: llama.cpp needs a tokenizer; {remedy}")
    for there in (path, path.parent / "Modelfile"):
        if there.exists():
            raise UserError(f"--export={path}: {there} is there already; name a file in another directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family_of(config).upper()], config.n_layer)  # by those in files
    with atomic_file(path) as file:
        writer = gguf.GGUFWriter(file.name, family_of(config))
        writer.add_name(path.stem)
        writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind])
        add_sizes(writer, config)
        add_tokenizer(writer, gguf, loaded)
        if config.rope_scaling:
            plain = rotary_speeds(dataclasses.replace(config, rope_scaling=None))
            writer.add_tensor("rope_freqs.weight", (plain / rotary_speeds(config)).numpy())
        for name, tensor in loaded.model.merge_lora().named_parameters():
            tensor = tensor.detach().float()
            for layer, heads in (("attn.c_q.", config.n_head), ("attn.c_k.", config.n_kv_head)):
                if layer in name and family_of(config) == "llama":
                    # each head's rows in llama.cpp's order: the pairs that rotary positions turn are neighbours there,
                    # and half a head apart in Hugging Face's files
                    tensor = tensor.view(heads, 2, -1, tensor.size(-1)).transpose(1, 2).reshape(tensor.shape)
            data_type = gguf.GGMLQuantizationType[kind.upper()]
            if tensor.dim() == 1 or name.startswith("wpe"):
                data_type = gguf.GGMLQuantizationType.F32
            elif kind == "q8_0" and tensor.size(-1) % 32:  # it counts in blocks of 32
                data_type = gguf.GGMLQuantizationType.F16
            data = gguf.quants.quantize(tensor.contiguous().numpy(), data_type)
            name = names.get_name(file_name(config, name), try_suffixes=(".weight", ".bias"))
            writer.add_tensor(name, data, raw_dtype=data_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    columns = columns_of(loaded.spec["prompt_format"])
    if len(columns) > 1:
        print(f"Ollama asks one question: word the columns of each as in {loaded.spec['prompt_format']!r}")
        loaded = dataclasses.replace(loaded, spec={**loaded.spec, "prompt_format": "{text}"})
    with atomic_file(path.parent / "Modelfile") as file:
        file.write(modelfile(path.name, loaded).encode())
    name, file = path.stem.lower().replace(" ", "-"), shlex.quote(str(path.parent / "Modelfile"))
    print(f"wrote {path} and Modelfile; try: ollama create {name} -f {file}")


def add_sizes(writer, config):
    sizes = {"context_length": config.block_size, "embedding_length": config.n_embd, "block_count": config.n_layer,
             "feed_forward_length": config.n_inner, "head_count": config.n_head, "vocab_size": config.vocab_size}
    if config.rope_theta:
        sizes |= dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), config.head_dim)
        sizes |= {"head_count_kv": config.n_kv_head, "rope_freq_base": config.rope_theta}
    sizes["layer_norm_rms_eps" if config.rms_norm else "layer_norm_eps"] = config.norm_eps
    for name, value in sizes.items():
        getattr(writer, f"add_{name}")(value)


def add_tokenizer(writer, gguf, loaded):
    """The vocabulary as tokenizer.json has it, the special tokens, and the wording as a chat template."""
    encoding, values = loaded.encoding, read_json(Path(loaded.directory) / "tokenizer.json")
    pre = PRE_TOKENIZERS.get(getattr(encoding, "pattern", GPT2))
    if not pre:
        raise UserError(f"--export: llama.cpp lacks {loaded.directory}'s pre-tokenizer; export a directory instead")
    ids, kind = range(loaded.model.config.vocab_size), gguf.TokenType
    texts = {token: text for text, token in values["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, kind.NORMAL)
    for token in values["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = kind.CONTROL if token["special"] else kind.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([texts.get(token, f"[PAD{token}]") for token in ids])
    writer.add_token_types([kinds.get(token, kind.UNUSED) for token in ids])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge)
                             for merge in values["model"]["merges"]])
    bos = getattr(encoding, "bos_token", None)
    writer.add_bos_token_id(encoding.encode_single_token(bos) if bos else encoding.eot_token)
    writer.add_eos_token_id(loaded.stop)
    writer.add_add_bos_token(getattr(encoding, "starts_with_bos", False))
    spec = loaded.spec
    source = spec["chat_template"] if spec["template"] == "model" else chat_template(spec)
    if source:
        writer.add_chat_template(source)


# ---- Ollama ---------------------------------------------------------------------------------------------------------

USER, SYSTEM, ANSWER = "\1", "\2", "\3"  # stand for the contents of messages
LAST = '{{ $last := "" }}{{ range .Messages }}{{ if eq .Role "user" }}{{ $last = .Content }}{{ end }}{{ end }}'
TURN = '{{{{ if eq .Role "{}" }}}}{{{{ .Content }}}}{}{{{{ end }}}}'


def modelfile(name, loaded):
    """The prompts of training in Ollama's words, and what ends an answer. Ollama puts the whole conversation through
    such a template. A model that keeps no turns answers the last question by itself, here as in sample.py."""
    stop, system = loaded.encoding.decode([loaded.stop]), ""
    alone, *rest = go_text(loaded, stop).split(USER)
    begin = alone
    if loaded.is_chat():
        with contextlib.suppress(UserError):  # some templates hold no system prompt
            system = go_text(loaded, stop, SYSTEM).split(USER)[0]
            begin = f"{{{{ if .System }}}}{system}{{{{ else }}}}{alone}{{{{ end }}}}".replace(SYSTEM, "{{ .System }}")
    wording = LAST + "{{ $last }}".join([begin, *rest])
    if loaded.keeps_turns():
        with contextlib.suppress(UserError):  # some templates hold one question
            earlier = Message("user", {"content": USER}), Message("assistant", {"content": ANSWER})
            text = go_text(loaded, stop, earlier=earlier)
            _, asked, answered, end = re.split(f"[{USER}{ANSWER}]", text)
            # what comes after `asked` opens the new answer alone; some templates put the system prompt last
            if end.startswith(asked) and (not system or go_text(loaded, stop, SYSTEM, earlier)
                                          == system + text.removeprefix(alone)):
                turns = TURN.format("user", asked) + TURN.format("assistant", answered)
                wording = f"{begin}{{{{ range .Messages }}}}{turns}{{{{ end }}}}{end.removeprefix(asked)}"
    return (f"FROM ./{name}\nPARAMETER stop {json.dumps(stop, ensure_ascii=False)}\nPARAMETER temperature 0\n"
            f'TEMPLATE """{wording}"""\n')


def go_text(loaded, stop, system="", earlier=()):
    """What stands before an answer, as literal text of Go's language for templates."""
    before = [Message("system", {"content": system})] if system else []
    segments = loaded.prompt([*before, *earlier, Message("user", {"content": USER, "input": ""})])
    text = "".join(stop if text is EOT else text for text, _ in segments)
    if loaded.spec.get("starts_with_bos"):
        text = text.removeprefix(loaded.spec["bos_token"])  # llama.cpp puts it first by itself
    for mark in ("{", '"""'):  # these are Go's and the Modelfile's own
        text = text.replace(mark, f"{{{{ {json.dumps(mark)} }}}}")
    return text
