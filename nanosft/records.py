"""A record of any kind as messages. One table says by which names people call what; nothing after it knows kinds."""
import contextlib
import json
import re
from itertools import islice
from typing import NamedTuple

from nanosft.console import UserError

NAME = re.compile(r"\{(?!\s*[\"'])([^{}\n]+)\}")  # a field's name in prompt_format and response_format; JSON is none

# what a field is, and the names that it goes by, those that count more first
NAMES = {"conversation": ("messages", "conversations", "conversation"),
         "role": ("role", "from"), "content": ("content", "value", "text"), "weight": ("weight",),
         "system": ("system", "system_prompt"), "history": ("history",),
         "question": ("instruction", "prompt", "question", "query", "input"),
         "context": ("input", "context", "question", "query"),
         "answer": ("output", "completion", "response", "answer"), "text": ("text",)}
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
CUT = "truncated_cells"  # the columns that the hub's viewer has cut in a row
CALLS = ("tool_calls", "function_call")
EXPECTED = ("expected instruction and output, question and answer, prompt and completion, messages, conversations or "
            "text; for other columns prepare_data.py has --prompt_format and --response_format")


def columns_of(wording):
    """The names of the fields in a format, each once."""
    return list(dict.fromkeys(NAME.findall(wording)))


class Message(NamedTuple):
    role: str  # system, user, assistant; prompt, completion, which are rendered as they are; text
    fields: dict  # texts by name; an answer has one
    learned: bool = True  # of an answer

    def text(self):
        """All its texts as one."""
        return "\n\n".join(filter(None, self.fields.values()))


class Unusable(UserError):
    """A record that cannot be used. `reason` is one of few, by which such records are counted; `detail` says more."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# ---- fields ---------------------------------------------------------------------------------------------------------

def beginning(value):
    """The first characters of a value of any size and depth, as JSON."""
    return "".join(islice(json.JSONEncoder(default=str).iterencode(value), 40))[:40]


def whole(text, name):
    """`text`, if it is one that UTF-8 can hold and tiktoken can cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("broken text", f"{name}: half a surrogate pair ({text[error.start]!a}); repair it") from None
    if len(text) > 100_000 and re.search(r"\s{100000}", text):
        raise Unusable("100,000 characters of white space in a row are too many for the tokenizer", f"{name}; cut them")
    return text


def is_missing(value):
    """Whether a field says that there is nothing: null, white space, an empty list, or the NaN that pandas writes."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or value in ([], {}) or value != value


def is_text(part):
    """Whether a part of a content is text and nothing else; a table's parts have all fields, most of them null."""
    used = {name for name, value in part.items() if not is_missing(value)}
    return used <= {"type", "text"} and isinstance(part.get("text"), str)


def text_of(value, name):
    """A field's value as text: numbers and dates are written out, true and false as in JSON, parts of text joined."""
    if isinstance(value, str):
        return whole(value, name)
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return whole(value[0], name)
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        if not all(map(is_text, value)):
            raise Unusable("a part that is no text", f"{name!r} is {beginning(value)}")
        return whole("".join(part["text"] for part in value), name)
    if is_missing(value) or isinstance(value, list | dict | bytes):
        raise Unusable("a field that is no text", f"{name!r} is {beginning(value)}")
    return str(value)


def fill(template, fields, flag):
    """`template` with every {name} replaced by that field's text, and nothing else."""
    def value(match):
        if match[1] not in fields:
            columns = ", ".join(map(str, fields)) or "none"
            raise Unusable("a column is missing", f"--{flag} names {{{match[1]}}}; the columns are {columns}")
        value = fields[match[1]]
        return "" if is_missing(value) else text_of(value, match[1])  # null is a table's empty cell
    return NAME.sub(value, whole(template, f"--{flag}"))


def take(fields, kind):
    """Takes what goes by one of a kind's names out of `fields`. Returns (name, value), or (None, None)."""
    for name in NAMES[kind]:
        value = fields.get(name)
        if value is not None and not is_missing(value):
            return name, fields.pop(name)
    return None, None


# ---- messages -------------------------------------------------------------------------------------------------------

def to_messages(record, spec, answered=True):
    """(messages, rest): a record of any kind as messages, and its fields that were not used, by name. With
    answered=False it may lack its answer. Unusable for what is no record, or lacks what it needs.

    `spec`: template, prompt_format and response_format, as in meta.json and prompt.json.
    """
    if is_conversation(record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise Unusable("a record is an object with named fields", f"not {beginning(record)}")
    if record.get(CUT):
        raise Unusable("cells that the hub's viewer has cut", ", ".join(map(repr, record[CUT])))
    is_plain = spec["prompt_format"] == "{prompt}" and spec["response_format"][1:-1] in NAMES["answer"]
    by_form = answered or not is_plain and spec["template"] != "text" and all(
        name in record for name in columns_of(spec["prompt_format"]))
    if spec["response_format"] and by_form:
        messages, rest = by_formats(record, spec, answered)
    else:
        messages, rest = by_names(record)
    return messages, {name: value for name, value in rest.items() if not is_missing(value)}


def by_formats(record, spec, answered):
    """A record of any columns, in the words of prompt_format and response_format."""
    columns, answers = columns_of(spec["prompt_format"]), columns_of(spec["response_format"])
    rest = {name: value for name, value in record.items() if name not in (*columns, *answers)}
    if spec["template"] == "text":
        return [Message("text", {"text": fill(spec["response_format"], record, "response_format")})], rest
    fill(spec["prompt_format"], record, "prompt_format")  # refuses what it cannot word
    messages = [Message("prompt", {name: fill(f"{{{name}}}", record, "prompt_format") for name in columns})]
    is_empty = any(name in record and is_missing(record[name]) for name in answers)
    if not is_empty and (answered or all(name in record for name in answers)):
        messages.append(Message("completion", {"text": fill(spec["response_format"], record, "response_format")}))
    return messages, rest


def by_names(record):
    """A record whose fields have known names, in letters of either case."""
    lower = {str(name).lower().strip(): name for name in record}
    if len(lower) < len(record):
        lower = dict(zip(record, record, strict=True))
    rest = {small: record[name] for small, name in lower.items()}
    name, turns = take(rest, "conversation")
    has_text = not is_missing(rest.get("text"))
    asks = not name and (not has_text or not rest.keys().isdisjoint(NAMES["answer"]))
    asked, question = take(rest, "question") if asks else (None, None)
    if name:
        messages = with_system(conversation(turns, name, rest), rest)
    elif asked:
        messages = question_and_answer(asked, question, rest)
    elif has_text:
        messages = [Message("text", {"text": text_of(rest.pop("text"), "text")})]
    else:
        for kind, reason in (("question", "no question"), ("conversation", "no answer"), ("text", "an empty text")):
            if not rest.keys().isdisjoint(NAMES[kind]):
                raise Unusable(reason)
        raise Unusable("unknown kind of record", f"{', '.join(map(repr, record)) or 'no fields'}; {EXPECTED}")
    return messages, {lower.get(name, name): value for name, value in rest.items()}


def question_and_answer(asked, question, rest):
    """The messages of a question, under the name `asked`, and of what `rest` has with it."""
    name, answer = take(rest, "answer")
    beside = any(not is_missing(rest.get(name)) for kind in ("system", "history", "context") for name in NAMES[kind])
    role = "assistant"
    if is_conversation(question):  # TRL's: what comes before the completion is seen
        messages = [message._replace(learned=False) for message in conversation(question, asked, rest)]
        messages = with_system(messages, rest)
        if is_conversation(answer):
            return messages + conversation(answer, name, rest)
    elif asked == "prompt" and not beside:  # a prompt and its answer stay as they are
        messages, role = [Message("prompt", {asked: text_of(question, asked)})], "completion"
    else:
        context, given = take(rest, "context")
        fields = {"content": text_of(question, asked), "input": text_of(given, context) if context else ""}
        messages = with_system([*past(rest), Message("user", fields)], rest)
    return [*messages, Message(role, {name: text_of(answer, name)})] if name else messages


def is_conversation(value):
    """Whether a value is a list of turns, {"role": ..., "content": ...} or with other names for these."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and any(name in turn for name in NAMES["role"])
        and any(name in turn for name in (*NAMES["content"], *CALLS)) for turn in value)


def parsed(value):
    """What a table's field that holds a list as JSON stands for; other values as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def conversation(turns, name, rest):
    """A list of turns as messages; what a turn holds beyond role and content goes to `rest`. A role that is not known
    is refused: it could forge a turn."""
    if not is_conversation(turns := parsed(turns)):
        raise Unusable("no conversation", f"{name!r} must be a list of {{'role': ..., 'content': ...}} objects")
    messages = []
    for turn in map(dict, turns):
        (role_name, role), (content_name, content), (_, weight) = (
            take(turn, kind) for kind in ("role", "content", "weight"))
        if any(not is_missing(turn.get(call)) for call in CALLS):
            raise Unusable("a tool call")
        role = text_of(role, role_name or "role")
        if role.lower() not in ROLES:
            raise Unusable("an unknown role", f"{role!r} is none of system, user, assistant (human, gpt)")
        if weight not in (None, 0, 1):
            raise Unusable("a weight that is neither 0 nor 1", beginning(weight))
        text = text_of(content, content_name) if content_name else ""
        messages.append(Message(ROLES[role.lower()], {"content": text}, weight != 0))
        rest.update({f"{field} of a turn": value for field, value in turn.items() if not is_missing(value)})
    return messages


def with_system(messages, rest):
    """The messages after the system prompt that stands beside them, if they have none of their own."""
    if messages and messages[0].role == "system":
        return messages
    name, system = take(rest, "system")
    return [Message("system", {"content": text_of(system, name)}), *messages] if name else messages


def past(rest):
    """The turns of a `history`, a list of pairs of question and answer."""
    name, pairs = take(rest, "history")
    pairs = parsed(pairs) if name else []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Unusable("a history that is no list of pairs", beginning(pairs))
    return [Message(role, {"content": text_of(text, name)})
            for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]
