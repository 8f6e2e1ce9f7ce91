"""A model's own chat template, in Jinja, as segments.

The template never sees a content: it is rendered with placeholders, and what stands around them depends on the roles
alone. So no content can forge a turn, and conversations with the same roles are rendered once.
A `spec` is a dict of chat_template (the source), bos_token and eos_token ("" for none), and special_tokens, the texts
that are tokens of their own.
"""
import json
import re
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

from nanosft.console import UserError
from nanosft.files import read_json
from nanosft.records import Unusable

PAD = "\u2003"  # white space around a placeholder: gone where the template strips the content
MARK = "pLace\n\n holder's <é> & \"{"  # a template that changes contents is likely to change this
PLACEHOLDER = f"{PAD}?{re.escape(MARK)}[0-9]+;{PAD}?"
STRIP = {(True, True): str, (False, True): str.lstrip, (True, False): str.rstrip, (False, False): str.strip}
UNFIT, REMEDY = "the chat template does not fit", "prepare with --template=chat"


class Special(str):
    """The text of a special token, in a segment in the place of ordinary text."""


def read_chat_template(directory):
    """The Jinja source in a model's directory, or None where it has none."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path} is no UTF-8 text; download it again") from None
    path = Path(directory) / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template and not isinstance(template, str):
        raise UserError(f"{path}: its chat_template is no text; download it again")
    return template or None


def render_chat_template(messages, spec):
    """The segments, (text or Special, supervised), of messages. Those that end with an answer give a training example;
    others give the prompt for sampling, which is the beginning of that example, token for token: a text ends where a
    prompt does. What follows is supervised, up to the first special token after the answer."""
    roles = tuple(message.role for message in messages)
    learned = [False, *(message.learned for message in messages if message.role == "assistant")]  # of 0: no answer
    strips, segments = render_roles(spec["chat_template"], roles, spec["bos_token"], spec["eos_token"],
                                    tuple(spec["special_tokens"]))
    contents = [strip(message.text()) for strip, message in zip(strips, messages, strict=True)]
    rewrites = roles[-1] == "assistant" and "</think>" in spec["chat_template"]  # a prompt may hold earlier thoughts
    if rewrites and any(role == "assistant" and "</think>" in content
                        for role, content in zip(roles, contents, strict=True)):
        raise Unusable("an answer with a thought, which the chat template would take apart", REMEDY)
    return [(text if isinstance(text, Special) else text.format(*contents), learned[number])
            for text, number in segments]


@lru_cache(maxsize=1000)
def render_roles(source, roles, bos, eos, specials):
    """(strips, segments): for each message what the template does to its content, as a function; and (text, number)s, a
    Special or a format string ({0} is the first content) with the number of the answer that it is in, or 0."""
    text = render(source, roles, roles[-1] != "assistant", bos, eos)
    ends = [0]  # of the prompts; from each an answer goes on, with what follows up to the next end
    for index, role in enumerate(roles):
        if role == "assistant":
            prompt = render(source, roles[:index], True, bos, eos)
            if text.startswith(prompt):
                ends.append(len(prompt))
            elif roles[-1] == "assistant":  # in a prompt a template may have shortened earlier answers
                raise Unusable(UNFIT, f"its prompt is not the beginning of {' + '.join(roles)}; {REMEDY}")
    strips, segments = [], []
    longest_first = sorted(map(re.escape, specials), key=len, reverse=True)
    for number, (start, stop) in enumerate(pairwise([*ends, len(text)])):
        answered, ordinary = False, ""  # `number` becomes 0 where its answer has ended
        for piece in re.split(f"({'|'.join([PLACEHOLDER, *longest_first])})", text[start:stop]):
            if piece in specials:
                segments += [(ordinary, number), (Special(piece), number)]
                number, ordinary = 0 if answered else number, ""
            elif re.fullmatch(PLACEHOLDER, piece):
                ordinary += f"{{{len(strips)}}}"
                strips.append(STRIP[piece.startswith(PAD), piece.endswith(PAD)])
                answered = True
            else:
                ordinary += piece.replace("{", "{{").replace("}", "}}")
        segments.append((ordinary, number))
        if number:
            raise Unusable(UNFIT, f"it writes no special token after an answer, so nothing would end it; {REMEDY}")
    return strips, [(text, number) for text, number in segments if text]


def render(source, roles, prompting, bos, eos):
    """The template's text for placeholders in these roles, each of them once and in order."""
    marks = [f"{MARK}{index};" for index in range(len(roles))]
    messages = [{"role": role, "content": PAD + mark + PAD} for role, mark in zip(roles, marks, strict=True)]
    remedy = f"leave out the system prompt, or {REMEDY}" if "system" in roles else REMEDY
    said = " + ".join(roles) or "an answer without a question"
    try:
        text = compile_template(source).render(messages=messages, add_generation_prompt=prompting, bos_token=bos,
                                               eos_token=eos, tools=None, documents=None, enable_thinking=False)
    except Exception as error:  # the template's own, for nothing else runs in there
        raise Unusable(UNFIT, f"it fails on {said}: {error}; {remedy}") from None
    if [piece.strip(PAD) for piece in re.findall(PLACEHOLDER, text)] != marks:
        raise Unusable(UNFIT, f"it hides, changes, repeats or moves a message of {said}; {remedy}")
    return text


@lru_cache(maxsize=8)
def compile_template(source):
    """The template in a sandbox that is set up as transformers' is, but without a clock."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise UserError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals["raise_exception"] = raise_exception
    sandbox.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    # {% generation %} marks the answers for transformers; {% with %} is a block that changes nothing
    return sandbox.from_string(re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", r"\1\2with\3", source))
