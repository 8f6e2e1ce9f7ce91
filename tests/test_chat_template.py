"""nanosft/chat_template.py against transformers' apply_chat_template, on templates in the manner of five families."""
import json
import os
import random
import tempfile
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from nanosft.chat_template import Special, read_chat_template, render_chat_template, render_roles
from nanosft.console import UserError
from nanosft.records import Message
from nanosft.templates import render, render_answer


def stop_of(spec):
    return render_answer("", {**spec, "template": "model"})[-1][0]


CHATML = """\
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- generation %}
{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{{ '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now('%d %b %Y') %}
    {%- else %}
        {%- set date_string = '01 Jan 2025' %}
    {%- endif %}
{%- endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{{- 'Knows the year: {2023}\\nToday: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
MISTRAL = """\
{%- set first = namespace(text='') %}
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- set first.text = m.content + '\\n\\n' %}
        {%- continue %}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + first.text + m.content + ' [/INST]' }}
        {%- set first.text = '' %}
    {%- else %}
        {{- ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # Llama 3's
FAMILIES = {  # template, bos, eos, other special tokens, whether it takes a system prompt
    "chatml": (CHATML, "", "<|im_end|>", ["<|im_start|>"], True),
    "llama": (LLAMA, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], True),
    "mistral": (MISTRAL, "<s>", "</s>", [], True),
    "gemma": (GEMMA, "<bos>", "<end_of_turn>", ["<start_of_turn>"], False),
}
LETTERS = ("abcdefgABCstSTmodeluser     \n\n\t.,:;!?'\"[]()<>|/{}%\\_#0123456789éßñ中文字🙂👩\u200d🚀"
           "\u0301\u2003\u00a0\u200b\x1c")


def content(draw):
    """Random text, often with words, without outer white space."""
    letters = draw.choice([LETTERS, "abc de", "01 23", LETTERS[-12:], "\n\n ab1.", "{0} %s ' "])
    return "".join(draw.choices(letters, k=draw.randint(1, 40))).strip() or "x"


def conversation(draw, turns, system, text=content):
    roles = ["system"] * system + ["user", "assistant"] * 3
    return [Message(role, {"content": text(draw)}) for role in roles[:system + turns]]


def byte_level(name, pattern):
    """(tokenizer of transformers with special tokens, the same without them), trained on random conversations."""
    source, bos, eos, others, system = FAMILIES[name]
    ordinary = tokenizers.Tokenizer(tokenizers.models.BPE())
    ordinary.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pattern == "llama3":
        ordinary.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    draw = random.Random(0)
    corpus = [f"system\n\nuser\nassistant\nmodel\n[INST] {content(draw)} [/INST] {content(draw)}" for _ in range(300)]
    ordinary.train_from_iterator(corpus, tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    special = {"bos_token": bos} if bos else {}
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(ordinary.to_str()), eos_token=eos, **special,
        additional_special_tokens=others, chat_template=source)
    return theirs, ordinary


def spec_of(tokenizer):
    return {"chat_template": tokenizer.chat_template, "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token, "special_tokens": list(tokenizer.added_tokens_encoder)}


def encode(segments, tokenizer, ordinary):
    """(ids, flags): a Special is one id, and every other text is tokenised by itself by what knows no special token."""
    ids, flags = [], []
    for text, supervised in segments:
        if isinstance(text, Special):
            part = [tokenizer.convert_tokens_to_ids(str(text))]
        else:
            part = ordinary.encode(text, add_special_tokens=False).ids
        ids, flags = ids + part, flags + [supervised] * len(part)
    return ids, flags


def apply(messages, tokenizer, tokenize=True, **options):
    """The ids, or the text, of transformers. The date is the one that our rendering, which has no clock, takes."""
    chat = [{"role": role, "content": fields["content"]} for role, fields, _ in messages]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=messages[-1][0] != "assistant", return_dict=False,
                                         tokenize=tokenize, date_string="01 Jan 2025", **options)


def check_conversation(messages, tokenizer, ordinary):
    spec = spec_of(tokenizer)
    segments = render_chat_template(messages, spec)
    ids, flags = encode(segments, tokenizer, ordinary)
    assert ids == apply(messages, tokenizer), messages
    runs = []  # of supervised segments
    for index, (role, fields, _) in enumerate(messages):
        if role == "assistant":
            prompt = render_chat_template(messages[:index], spec)
            assert segments[:len(prompt)] == prompt  # what is sampled from is the beginning of what is trained on
            prompt_ids, _ = encode(prompt, tokenizer, ordinary)
            assert ids[:len(prompt_ids)] == prompt_ids and flags[len(prompt_ids) - 1:len(prompt_ids) + 1] == [0, 1]
            (text, a), (stop, b) = segments[len(prompt):len(prompt) + 2]
            assert a and b and text.lstrip(" ") == fields["content"] and stop == stop_of(spec)
            runs += [text, stop]
    assert [text for text, supervised in segments if supervised] == runs


PAIRS = [(name, pattern) for name in FAMILIES for pattern in ("gpt2", "llama3") if (name, pattern) != ("llama", "gpt2")]


@pytest.mark.parametrize("name, pattern", PAIRS)
def test_ids_equal_transformers_and_prompts_begin_examples(name, pattern):
    tokenizer, ordinary = byte_level(name, pattern)
    draw = random.Random(1)
    for turns in range(1, 7):
        for system in {False, FAMILIES[name][4]}:
            for _ in range(20):
                check_conversation(conversation(draw, turns, system), tokenizer, ordinary)


def test_where_a_tokenizer_joins_across_the_end_of_a_prompt_the_ids_are_the_prompts():
    """GPT-2's pattern makes one token of the two line ends after Llama's header, but two where a text follows."""
    tokenizer, ordinary = byte_level("llama", "gpt2")
    messages = [Message("user", {"content": "a"}), Message("assistant", {"content": "b"})]
    ids, _ = encode(render_chat_template(messages, spec_of(tokenizer)), tokenizer, ordinary)
    assert ids == apply(messages[:1], tokenizer) + ordinary.encode("b").ids + [tokenizer.eos_token_id]
    assert ids != apply(messages, tokenizer)


def test_ids_equal_transformers_for_a_real_model():
    path = Path(os.getenv("NANOSFT_SMOLLM2", Path(tempfile.gettempdir()) / "smollm2"))
    if not (path / "ready").exists():
        pytest.skip(f"no SmolLM2 in {path}; NANOSFT_SMOLLM2 names its directory")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    assert read_chat_template(path) == tokenizer.chat_template
    ordinary = tokenizers.Tokenizer.from_str(json.dumps(
        {**json.loads((path / "tokenizer.json").read_text(encoding="utf-8")), "added_tokens": []}))
    draw = random.Random(2)
    for turns in range(1, 7):
        for system in (False, True):
            for _ in range(20):
                check_conversation(conversation(draw, turns, system), tokenizer, ordinary)
    assert stop_of(spec_of(tokenizer)) == "<|im_end|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_content_forges_a_special_token(name):
    tokenizer, ordinary = byte_level(name, "gpt2")
    source, bos, eos, others, system = FAMILIES[name]
    spec, special = spec_of(tokenizer), [bos, eos, *others, "{{ bos_token }}", "{% endfor %}"]
    plain = conversation(random.Random(0), 6, system, lambda _: "x")
    forged = conversation(random.Random(0), 6, system, lambda draw: "".join(draw.choices([*special, "\n"], k=9)))
    marks = [[(text, flag) for text, flag in render_chat_template(messages, spec) if isinstance(text, Special)]
             for messages in (plain, forged)]
    assert marks[0] == marks[1]
    ids, _ = encode(render_chat_template(forged, spec), tokenizer, ordinary)
    assert sum(id in tokenizer.all_special_ids for id in ids) == len(marks[0])


def chatml(source=CHATML):
    return {"chat_template": source, "bos_token": "", "eos_token": "<|im_end|>",
            "special_tokens": ["<|im", "<|im_start|>", "<|im_end|>"]}


def test_the_segments_of_one_conversation():
    start, end = Special("<|im_start|>"), Special("<|im_end|>")
    first = [(start, False), ("system\nBrief.", False), (end, False), ("\n", False), (start, False),
             ("user\nWhat is {0}?\n\n<|im_end|>", False), (end, False), ("\n", False), (start, False),
             ("assistant\n", False)]
    second = [(" Nothing.", True), (end, True), ("\n", False), (start, False), ("user\nAnd 1?", False), (end, False),
              ("\n", False), (start, False), ("assistant\n", False)]
    messages = [Message("system", {"content": "Brief."}),
                Message("user", {"content": "What is {0}?", "input": "<|im_end|>"}),
                Message("assistant", {"text": " Nothing."}), Message("user", {"content": "And 1?", "input": ""}),
                Message("assistant", {"text": ""})]
    expected = {2: first, 3: first + second[:3], 4: first + second,
                5: first + second + [("", True), (end, True), ("\n", False)]}
    for length, segments in expected.items():
        rendered = [(text, flag) for text, flag in render_chat_template(messages[:length], chatml()) if text]
        assert rendered == [(text, flag) for text, flag in segments if text]
        assert [type(text) for text, _ in rendered] == [type(text) for text, _ in segments if text]


def test_where_the_prompt_has_no_header_of_an_answer_it_is_learnt():
    messages = [Message("user", {"content": "Q"}), Message("assistant", {"content": "A"})]
    segments = render_chat_template(messages, chatml(CHATML.replace("if add_generation_prompt", "if false")))
    assert [text for text, supervised in segments if supervised] == ["<|im_start|>", "assistant\nA", "<|im_end|>"]
    assert segments[-1] == ("\n", False)


def test_a_pair_of_texts_is_a_question_and_its_answer():
    pair = [Message("prompt", {"title": "A", "abstract": "B"}), Message("completion", {"text": "C"})]
    formats = {"template": "model", "prompt_format": "{title}\n\n{abstract}", "response_format": "{kind}"}
    assert render(pair, {**chatml(), **formats}) == render_chat_template(
        [Message("user", {"content": "A\n\nB"}), Message("assistant", {"content": "C"})], chatml())


THINKING = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' and loop.last %}
        {{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""


def test_where_thinking_can_be_off_it_is_and_earlier_answers_come_without(monkeypatch):
    """In the manner of Qwen 3: the last answer is written after an empty thought, which the prompt holds."""
    specials = ["<|im_start|>", "<think>", "</think>"]
    monkeypatch.setitem(FAMILIES, "thinking", (THINKING, "", "<|im_end|>", specials, True))
    (tokenizer, ordinary), draw = byte_level("thinking", "llama3"), random.Random(3)
    for system in (False, True):
        for _ in range(20):
            messages = conversation(draw, 5, system)
            for turns in (1, 2, 3, 5):
                given = messages[:system + turns]
                ids, flags = encode(render_chat_template(given, spec_of(tokenizer)), tokenizer, ordinary)
                assert ids == apply(given, tokenizer, enable_thinking=False)
                assert any(flags) == (turns == 2)
    check_conversation(messages[:3], tokenizer, ordinary)
    with pytest.raises(UserError, match="the chat template does not fit: its prompt is not the beginning of system"):
        render_chat_template(messages[:5], spec_of(tokenizer))
    thought = [messages[1], Message("assistant", {"content": "<think>\nSo.\n</think>\n\nYes."})]
    with pytest.raises(UserError, match="an answer with a thought, which the chat template would take apart: prepare"):
        render_chat_template(thought, spec_of(tokenizer))
    assert render_chat_template(thought, chatml())  # other templates leave it as it is
    asked = render_chat_template([*thought, messages[1]], spec_of(tokenizer))  # a chat goes on after one
    assert not any(supervised for _, supervised in asked)


@pytest.mark.parametrize("filter, method", [("", str), (" | trim", str.strip), (".strip()", str.strip),
                                            (".lstrip()", str.lstrip), (".rstrip()", str.rstrip)])
def test_white_space_is_stripped_from_contents_as_the_template_does(filter, method):
    spec = chatml(CHATML.replace("message['content']", f"message['content']{filter}"))
    answer = " \n\u2003a b\t\u2003 "
    messages = [Message("user", {"content": answer}), Message("assistant", {"content": answer})]
    segments = render_chat_template(messages, spec)
    assert segments[1] == ("user\n" + method(answer), False)
    assert [text for text, supervised in segments if supervised] == [method(answer), "<|im_end|>"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_text_equals_transformers_for_contents_with_outer_white_space(name):
    tokenizer, _ = byte_level(name, "llama3")
    messages = conversation(random.Random(4), 6, FAMILIES[name][4],
                            lambda draw: "".join(draw.choices(" \n\t\u2003", k=3)) + content(draw) + "\n\u2003 ")
    text = "".join(text for text, _ in render_chat_template(messages, spec_of(tokenizer)))
    assert text == apply(messages, tokenizer, tokenize=False)


def test_a_thousand_conversations_of_one_kind_are_rendered_once():
    render_roles.cache_clear()
    for number in range(1000):
        messages = [Message("user", {"content": f"q{number}"}), Message("assistant", {"content": "a"})]
        render_chat_template(messages, chatml())
    assert render_roles.cache_info().misses == 1


LOST = "it hides, changes, repeats or moves a message of"
SYSTEM = "leave out the system prompt, or prepare with --template=chat"
REFUSED = {  # template, roles, what is said
    "hides the system prompt": (CHATML.replace("messages %}", "messages if message.role != 'system' %}", 1),
                                "system user", f"{LOST} system + user; {SYSTEM}"),
    "hides earlier turns": (CHATML.replace("in messages", "in messages[-2:]"), "user assistant user assistant",
                            f"{LOST} user + assistant + user + assistant; prepare with --template=chat"),
    "repeats": (CHATML + "{{ messages[0].content }}", "user assistant", f"{LOST} user + assistant; prepare"),
    "moves": (CHATML.replace("in messages", "in messages | reverse"), "system user", f"{LOST} system + user; {SYSTEM}"),
    "upper": (CHATML.replace("message['content']", "message['content'] | upper"), "user", f"{LOST} user; prepare"),
    "tojson": (CHATML.replace("message['content']", "message['content'] | tojson"), "user", f"{LOST} user; prepare"),
    "lines": (CHATML.replace("message['content']", "message['content'].replace('\\n', ' ')"), "user", "changes"),
    "system raises": (GEMMA, "system user", f"fails on system + user: System role not supported; {SYSTEM}"),
    "two of a role": (GEMMA, "user user", "fails on user + user: Roles must alternate; prepare with --template=chat"),
    "no question": (LLAMA.replace("<|eot_id|>", "<|im_end|>"), "assistant",
                    "fails on an answer without a question: list object has no element 0; prepare with"),
    "no end": (CHATML.replace("<|im_end|>", ""), "user assistant", "no special token after an answer"),
    "no beginning": (CHATML.replace("assistant\\n", "bot\\n"), "user assistant",
                     "its prompt is not the beginning of user + assistant; prepare with --tem"),
    "syntax": ("{% for m in messages %}{{ m.content }", "user", "fails on user: unexpected '}'"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "user", "access to attribute '__class__' of 'str' object is unsafe"),
    "immutable": ("{{ messages.clear() }}", "user", "access to attribute 'clear' of 'list' object is unsafe"),
    "import": ("{% include '/etc/passwd' %}", "user", "no loader for this environment specified"),
    "range": ("{{ range(10 ** 9) | list }}", "user", "Range too big"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "user", "maximum recursion depth exceeded"),
    "clock": ("{{ strftime_now('%Y') }}", "user", "'strftime_now' is undefined"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_template_cannot_hold_is_refused_in_one_line(case):
    source, roles, said = REFUSED[case]
    with pytest.raises(UserError) as error:
        render_chat_template([Message(role, {"content": role}) for role in roles.split()], chatml(source))
    line = str(error.value)
    assert said in line and "\n" not in line and line.endswith("with --template=chat"), line


def test_read_chat_template_finds_each_home(tmp_path):
    assert read_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for name, values, expected in [("tokenizer_config.json", {}, None),
                                   ("tokenizer_config.json", {"chat_template": named[:1]}, None),
                                   ("tokenizer_config.json", {"chat_template": named}, "D"),
                                   ("tokenizer_config.json", {"chat_template": ["D", {"template": "E"}]}, None),
                                   ("tokenizer_config.json", {"chat_template": "C"}, "C")]:
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
        assert read_chat_template(tmp_path) == expected
    for damaged in (5, {"default": "D"}, [{"name": "default", "template": ["D"]}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": damaged}), encoding="utf-8")
        with pytest.raises(UserError, match="tokenizer_config.json: its chat_template is no text; download it again"):
            read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("é\n", encoding="utf-8")
    assert read_chat_template(tmp_path) == "é\n"
