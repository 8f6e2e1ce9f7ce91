"""Messages become segments, and segments become ids and flags: the one place for wording and loss mask.

A segment is (text, supervised), where text is a str, or a Special for a token of its own, such as EOT, end of text.
Each text is tokenised by itself as ordinary text, so that no content can become a special token, and a prompt has the
same ids with and without its answer. A `spec` is a dict of template (alpaca, chat, text, or model for the model's own),
prompt_format and response_format; `bring_tokenizer` adds to it what a model's own tokenizer needs.
"""
import contextlib
import json
from pathlib import Path

import tiktoken

from nanosft.chat_template import Special, read_chat_template, render_chat_template
from nanosft.console import UserError
from nanosft.files import atomic_file
from nanosft.hub import TOKENIZER
from nanosft.records import NAME, Message, Unusable, columns_of, fill
from nanosft.shards import START, SUPERVISED
from nanosft.tokenizer import read_tokenizer

EOT = Special("<|endoftext|>")  # by whatever name the encoding has it


# ---- messages become segments ---------------------------------------------------------------------------------------

def alpaca_prompt(instruction, given):
    """The prompt of Stanford Alpaca (Taori et al. 2023), with an input or, where `given` is empty, without."""
    context, section = "", ""
    if given:
        context, section = ", paired with an input that provides further context", f"### Input:\n{given}\n\n"
    return (f"Below is an instruction that describes a task{context}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{instruction}\n\n{section}### Response:\n")


def render(messages, spec):
    """The segments of messages. Those that end with an answer give a training example; others give the prompt for
    sampling, which is the beginning of that example, token for token."""
    roles, first = [message.role for message in messages], messages[0].fields
    begin = Special(spec["bos_token"]) if spec.get("bos_token") else EOT
    if roles[0] == "text":
        return [(begin, False), (first["text"], True), (EOT, True)]
    if roles[0] == "opening":  # the beginning of a text that sample.py goes on with
        return [(begin, False), (first["text"], False)]
    template, prompt = spec["template"], None
    if roles[0] == "prompt" and template != "text":
        prompt_format = spec["prompt_format"] if spec["response_format"] else f"{{{next(iter(first))}}}"
        prompt = fill(prompt_format, first, "prompt_format")
        messages = as_turns([Message("prompt", {"content": prompt}), *messages[1:]])
    if template == "model":
        return render_chat_template(messages, spec)
    if template == "chat":
        return render_chat(messages)
    if prompt is not None:  # a prompt and its answer stay as they are
        segments = [(prompt or EOT, False)]  # something must stand first
    elif template == "alpaca":
        if roles not in (["user"], ["user", "assistant"]):
            raise Unusable("the alpaca template holds one question and one answer",
                           f"not {' + '.join(roles)}; prepare_data.py --template=chat holds conversations")
        segments = [(alpaca_prompt(first["content"], first.get("input", "")), False)]
    else:
        raise Unusable("--template=text holds records with 'text', or --response_format", f"not {' + '.join(roles)}")
    if len(messages) > 1:
        answer, = messages[1].fields.values()
        segments += [(answer, messages[1].learned), (EOT, messages[1].learned)]
    return [(begin, False), *segments] if spec.get("starts_with_bos") else segments


def as_turns(messages):
    """A prompt and its answer as a question and its answer; others as they are."""
    roles = {"prompt": "user", "completion": "assistant"}
    return [message._replace(role=roles[message.role], fields={"content": next(iter(message.fields.values()))})
            if message.role in roles else message for message in messages]


def render_chat(messages):
    """One end-of-text between two turns closes one, supervised if that is an answer to learn, and opens the next."""
    segments, learned = [], False
    for message in messages:
        segments.append((EOT, learned))
        learned = message.role == "assistant" and message.learned
        if message.role == "assistant":
            segments += [("assistant\n", False), (message.text(), learned)]
        else:
            segments.append((f"{message.role}\n{message.text()}", False))
    segments.append((EOT, learned))
    return segments if messages[-1].role == "assistant" else [*segments, ("assistant\n", False)]


def render_answer(text, spec):
    """The segments of an answer, from the end of its prompt to what ends it; some templates write a space before it."""
    if spec["template"] != "model":
        return [(text, True), (EOT, True)]
    messages = [Message("user", {"content": ""}), Message("assistant", {"content": text})]
    return [(text, learned) for text, learned in render_chat_template(messages, spec) if learned]


def around_answer(spec):
    """(before, after): the texts between a prompt and its answer, and between that and what ends it."""
    text = "".join(text for text, _ in render_answer("\0", spec)[:-1])
    return text.partition("\0")[::2]


def as_rendered(messages, spec):
    """The spec by which sample.py words a prompt like the one of these messages."""
    if messages[0].role == "text":
        return {**spec, "template": "text"}
    if messages[0].role == "prompt" and not spec["response_format"]:
        (prompt,), (answer,) = (message.fields for message in messages)
        return {**spec, "prompt_format": f"{{{prompt}}}", "response_format": f"{{{answer}}}"}
    return spec


# ---- segments become ids and flags ----------------------------------------------------------------------------------

def get_encoding(name, directory=""):
    """tiktoken's encoding of that name; `bytes`: 256 bytes and end-of-text, with no vocabulary to download; or
    tokenizer.json: a model's own, in its directory."""
    if name == "tokenizer.json":
        if not (Path(directory) / name).is_file():
            raise UserError(f"{Path(directory) / name} is missing; put the model's there")
        return read_tokenizer(Path(directory) / name)
    if name == "bytes":
        return tiktoken.Encoding("bytes", pat_str=r"(?s).{1,64}", special_tokens={"<|endoftext|>": 256},
                                 mergeable_ranks={bytes([byte]): byte for byte in range(256)})
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"encoding={name!r} is none of bytes, {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except OSError as error:
        raise UserError(f"cannot download the vocabulary {name!r} ({type(error).__name__}): connect to the network "
                        "once, or point TIKTOKEN_CACHE_DIR at a folder that holds it") from None


def bring_tokenizer(spec, encoding, directory):
    """The spec with what a model's own tokenizer and chat template in this directory add to it."""
    if encoding.name != "tokenizer.json":
        return spec
    template = read_chat_template(directory)
    if spec["template"] == "model" and not template:
        raise UserError(f"{Path(directory) / 'chat_template.jinja'} is missing; put the model's there")
    return {**spec, "bos_token": encoding.bos_token, "eos_token": encoding.eos_token,
            "starts_with_bos": encoding.starts_with_bos, "special_tokens": sorted(encoding.special_tokens_set),
            "chat_template": template}


def title_of(spec):
    """What people call the wording of this spec."""
    own = spec["response_format"] and spec["template"] not in ("chat", "model")
    return "your formats" if own else f"{spec['template'] or 'no'} template"


def stop_token(spec, encoding):
    """The id that ends an answer."""
    return encode(render_answer("", spec)[-1:], encoding)[0][0]


def encode(segments, encoding, train_on_prompt=False):
    """(ids, flags) of one example or prompt: a list of int and as many bytes."""
    ids, flags = [], bytearray()
    for text, supervised in segments:
        if text is EOT:
            part = [encoding.eot_token]
        elif isinstance(text, Special):
            part = [encoding.encode_single_token(text)]
        else:
            part = encoding.encode_ordinary(text)
        ids += part
        flags += bytes([SUPERVISED if supervised or train_on_prompt else 0]) * len(part)
    if flags:
        flags[0] = START  # nothing stands before the first token, so nothing can predict it
    return ids, bytes(flags)


def decode(ids, encoding):
    """The text of ids, less those that no token has: a vocabulary may have gaps."""
    text = b""
    for token in ids:
        with contextlib.suppress(KeyError):
            text += encoding.decode_single_token_bytes(token)
    return text.decode(errors="replace")


def blocks(ids, block_size):
    """Yields one long text as examples of at most block_size + 1 tokens. All but the first begin with the last token of
    the one before, so that every token but the very first is predicted exactly once."""
    for start in range(0, max(1, len(ids) - 1), block_size):
        part = ids[start:start + block_size + 1]
        yield part, bytes([START]) + bytes([SUPERVISED]) * (len(part) - 1)


# ---- for transformers -----------------------------------------------------------------------------------------------

REFUSE = ("{% if messages | map(attribute='role') | list not in [['user'], ['user', 'assistant']] %}{{ raise_exception("
          "'this model answers one question: give one user message, no system message and no earlier turns') }}"
          "{% endif %}")


def copy_tokenizer(source, target, spec):
    """Copies the tokenizer in one directory, if there is one, into another, with the spec as its chat template."""
    files = {name: (Path(source) / name).read_bytes() for name in TOKENIZER if (Path(source) / name).is_file()}
    if "tokenizer.json" in files and spec["template"] != "model" and chat_template(spec):
        files["chat_template.jinja"] = chat_template(spec).encode()
    for name, content in files.items():
        with atomic_file(Path(target) / name) as file:
            file.write(content)


def chat_template(spec):
    """The spec as a Jinja template for transformers, which refuses a conversation that the spec cannot hold. None where
    it is no conversation: plain text, or several columns."""
    if spec["template"] == "chat":
        return ("{% for m in messages %}{{ eos_token + m['role'] + '\n' + m['content'] }}{% endfor %}"
                "{{ eos_token }}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}")
    columns = columns_of(spec["prompt_format"])
    if spec["template"] in ("", "text") or len(columns) > 1 or (spec["response_format"] and not columns):
        return None
    wording = NAME.sub("\0", spec["prompt_format"]) if columns else alpaca_prompt("\0", "")
    pieces = [f"{{{{ {json.dumps(piece, ensure_ascii=False)} }}}}" for piece in wording.split("\0")]
    bos = "{{ bos_token }}" if spec.get("starts_with_bos") else ""
    return (REFUSE + bos + "{{ messages[0]['content'] }}".join(pieces)
            + "{% if messages | length == 2 %}{{ messages[1]['content'] + eos_token }}{% endif %}")
