"""A model's own tokenizer.json: the ids of `tokenizers` for every text, special tokens, and one line for what it cannot
be."""
import csv
import json
import os
import random
import re
import tempfile
import unicodedata
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from conftest import ROOT, SHARED
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from nanosft.console import UserError
from nanosft.tokenizer import BYTES, read_tokenizer

SMOLLM2 = Path(os.getenv("NANOSFT_SMOLLM2") or Path(tempfile.gettempdir()) / "smollm2")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN = LLAMA3.replace("{1,3}", "")
SPECIAL = ["<|begin_of_text|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
GPT2_STEP = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES_ONLY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
STEPS = {
    "GPT-2": GPT2_STEP,
    "SmolLM2": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), GPT2_STEP]),
    "Llama 3": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES_ONLY]),
    "Qwen": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), BYTES_ONLY]),
    "words": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("([a-z])+|[0-9]+"), "isolated"), BYTES_ONLY]),
}

# ---- texts ----------------------------------------------------------------------------------------------------------

WORDS = """the The THE of and to cat's CAT'S don't DON'T we've We'LL I'm I'M they're THEY'RE she'd it'S ſ'ſ 'K k'ſ ''
    rock'n'roll naïve Ünïcödé straße ǅungla İstanbul e\u0301te\u0301 H₂O x² ½ Ⅷ ①② ٣٤٥ १२३ 一二三 你好，世界 深度学习
    今日は カタカナ 한국어 สวัสดี שלום مرحبا नमस्ते Привет мир Ελληνικά ქართული 😀 😀😃 👩‍👩‍👧 🇫🇷🇩🇪 👍🏽 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 def f(x):
    return x**2 != 0x1F; // http://a.b/c?d=e#f a_b-c... !!! ?! -- «» “” ‘’ ’s …… <|endoftext|>
    <|im_start|>user <|im_end|> <tool_call> </tool_call> \ufffd \ufeff \u200b \u200d \u00ad""".split()
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\n ", "\v", "\f", "\x1c", "\x85", "\xa0",
          "\u200a", "\u2028", "\u2029", "\u3000"]


def random_texts(count, seed=0):
    """`count` texts of words of many scripts, numbers, runs of white space, control and random characters."""
    draw = random.Random(seed)

    def fragment():
        kind = draw.random()
        if kind < 0.35:
            return draw.choice(WORDS)
        if kind < 0.6:
            return "".join(draw.choices(SPACES, weights=[20] + [1] * (len(SPACES) - 1), k=draw.choice([1, 1, 1, 2, 5])))
        if kind < 0.7:
            return str(draw.randrange(10 ** draw.randrange(1, 12)))
        if kind < 0.8:
            return "".join(draw.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=draw.randrange(1, 9)))
        if kind < 0.88:
            return "".join(draw.choices("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", k=draw.randrange(1, 5)))
        if kind < 0.93:
            return chr(draw.choice([*range(32), *range(127, 160)]))
        if kind < 0.98:
            while True:  # one that every version of Unicode has
                char = chr(draw.choice([draw.randrange(0x3000), draw.randrange(0x30000)]))
                if unicodedata.category(char) not in ("Cn", "Cs"):
                    return char
        if kind < 0.99:
            return draw.choice(WORDS + SPACES) * draw.randrange(1, 300)
        return chr(draw.randrange(0x40000, 0x110000))

    return ["".join(fragment() for _ in range(draw.choice([1, 2, 3, 5, 8, 13]))) for _ in range(count)]


def sentences():
    """The lines of the bundled records."""
    return (ROOT / "data" / "demo.jsonl").read_text(encoding="utf-8").splitlines()[:1000]


def real_texts():
    """Lines and paragraphs of Shakespeare, abstracts, records: what lies beside the repository."""
    if not (SHARED / "data").is_dir():
        return sentences()
    plays = (SHARED / "data" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    with open(SHARED / "data" / "arxiv.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    return sentences() + plays.splitlines()[:8000] + plays.split("\n\n")[:3000] + cells


# ---- files ----------------------------------------------------------------------------------------------------------

def splits(ids):
    """All pairs of tokens that give a token, in the order of its id: how Llama 3's merges were made from ranks."""
    return [(token[:n], token[n:]) for token in sorted(ids, key=ids.get) for n in range(1, len(token))
            if token[:n] in ids and token[n:] in ids]


@cache
def trained(steps, ignore_merges=False, every_byte=True, every_split=False):
    """The text of a small tokenizer.json. Without `every_byte` its vocabulary lacks those that no sentence holds. With
    `every_split` its merges are all that its vocabulary allows. Qwen's puts texts into Unicode's form NFC and looks for
    tokens in them."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = STEPS[steps]
    if steps == "Qwen":
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if every_byte else []
    texts = sentences() + WORDS * 3 + (random_texts(2000, seed=1) if every_byte else [])
    texts = [text for text in texts if "|>" not in text]  # nor does a trainer see special tokens in its texts
    trainer = trainers.BpeTrainer(vocab_size=2500, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if steps == "Qwen" and every_byte:
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    values = json.loads(tokenizer.to_str())
    if every_split:
        values["model"]["merges"] = splits(values["model"]["vocab"])
    return json.dumps(values)


def saved(folder, values):
    path = folder / "tokenizer.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def tiny_file(*merges):
    """The values of a tokenizer.json whose tokens are the bytes, end-of-text and what the merges, "a b", give."""
    vocabulary = {letter: n for n, letter in enumerate([*BYTES, *(merge.replace(" ", "") for merge in merges)])}
    end = dict(id=len(vocabulary), content="<|endoftext|>", special=True, lstrip=False, rstrip=False,
               single_word=False, normalized=False)
    return {"version": "1.0", "added_tokens": [end], "normalizer": None, "post_processor": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": list(merges)}}


def assert_equal_ids(path, texts):
    """Ours are those of `tokenizers`, and give the text again but for the bytes that have no id."""
    tokenizer, theirs = read_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True  # ordinary text
    for text, encoded in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
        ids = tokenizer.encode_ordinary(text)
        assert ids == encoded.ids, ascii(text)
        kept = unicodedata.normalize("NFC", text) if tokenizer.is_composed else text
        assert tokenizer.decode_bytes(ids) == kept.encode().translate(None, tokenizer.lacking), ascii(text)
    return tokenizer


# ---- ids ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, dict(ignore_merges=True), dict(every_split=True, ignore_merges=True),
                                     dict(every_byte=False), dict(every_byte=False, ignore_merges=True)], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_ids_are_those_of_tokenizers(tmp_path, steps, options):
    tokenizer = assert_equal_ids(saved(tmp_path, trained(steps, **options)), random_texts(2500) + sentences())
    theirs, joined = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), "a</tool_call>\u0338=\u0338"
    assert tokenizer.encode_ordinary(joined) == theirs.encode(joined).ids  # a stroke through its last letter
    assert bool(tokenizer.lacking) != options.get("every_byte", True)


def test_ids_of_smollm2(tmp_path):
    if not (SMOLLM2 / "tokenizer.json").exists():
        pytest.skip(f"no SmolLM2 in {SMOLLM2}: hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir {SMOLLM2}, "
                    "or name its directory in NANOSFT_SMOLLM2")
    tokenizer = assert_equal_ids(SMOLLM2 / "tokenizer.json", random_texts(20_000) + real_texts())
    assert (tokenizer.n_vocab, tokenizer.eot_token, tokenizer.bos_token) == (49152, 2, "<|im_start|>")
    assert tokenizer.encode_ordinary("Hello world 2024") == [19556, 905, 216, 34, 32, 34, 36]


@pytest.mark.parametrize("steps", ["GPT-2", "Llama 3"])
def test_ids_with_the_vocabulary_of_gpt2(tmp_path, gpt2_encoding, steps):
    letters = {byte: letter for letter, byte in BYTES.items()}
    ids = {"".join(map(letters.get, token)): rank for token, rank in gpt2_encoding._mergeable_ranks.items()}
    theirs = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=splits(ids), ignore_merges=steps == "Llama 3"))
    theirs.pre_tokenizer = STEPS[steps]
    theirs.add_special_tokens(["<|endoftext|>"])
    texts = random_texts(20_000) + real_texts()
    tokenizer = assert_equal_ids(saved(tmp_path, theirs.to_str()), texts)
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)
    if steps == "GPT-2":
        assert all(tokenizer.encode_ordinary(text) == gpt2_encoding.encode_ordinary(text) for text in texts)


def test_a_byte_that_the_vocabulary_lacks_is_left_out_before_the_merges(tmp_path):
    values = tiny_file("! !", "a b")
    lacking = {letter for letter, byte in BYTES.items() if byte in b"\x04\xf1"}
    for letter in lacking:
        del values["model"]["vocab"][letter]
    texts = ["", "\x04", "!\x04!", "a\x04b", "!!ab", "\x04\U00040000\x04"]
    tokenizer = assert_equal_ids(saved(tmp_path, values), texts)
    assert tokenizer.encode_ordinary("!\x04!") == [256]  # one piece, in which they merge
    assert tokenizer.encode_ordinary("a\x04b") == [BYTES["a"] - 33, BYTES["b"] - 33]  # three pieces
    assert tokenizer.encode_ordinary("\x04") == []
    assert tokenizer.n_vocab == 259


def test_the_oldest_files(tmp_path):
    """They name no type of model and no use_regex, and spell a merge as one string."""
    values = tiny_file("t h", "th e", "Ġ the")
    del values["model"]["type"]
    assert assert_equal_ids(saved(tmp_path, values), ["the the", "  the"]).encode_ordinary("the the") == [257, 258]


# ---- special tokens -------------------------------------------------------------------------------------------------

def test_special_tokens_have_their_ids_and_no_text_becomes_one(tmp_path):
    tokenizer = read_tokenizer(saved(tmp_path, trained("Llama 3")))
    assert tokenizer.name == "tokenizer.json"
    assert tokenizer.special_tokens_set == set(SPECIAL)
    assert [tokenizer.encode_single_token(text) for text in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.decode_single_token_bytes(2) == b"<|im_end|>"
    assert tokenizer.n_vocab == 2500
    ids = tokenizer.encode_ordinary("".join(SPECIAL))
    assert min(ids) > 3
    assert tokenizer.decode([0, *ids, 3]) == "".join(["<|begin_of_text|>", *SPECIAL, "<|endoftext|>"])


def test_an_added_token_may_be_an_ordinary_one_or_lie_past_the_vocabulary(tmp_path):
    values = tiny_file("a b")
    end = values["added_tokens"][0]
    values["added_tokens"] += [{**end, "content": "!", "id": BYTES["!"] - 33}, {**end, "content": "<pad>", "id": 300}]
    tokenizer = assert_equal_ids(saved(tmp_path, values), ["ab!", "<pad>"])
    assert (tokenizer.encode_ordinary("!"), tokenizer.encode_single_token("!")) == ([0], 0)
    assert (tokenizer.encode_single_token("<pad>"), tokenizer.n_vocab) == (300, 301)


@pytest.mark.parametrize("config, mapped, eos, bos", [
    (None, None, "<|endoftext|>", ""),
    ({"eos_token": "<|im_end|>"}, None, "<|im_end|>", ""),
    ({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}, None, "<|im_end|>", "<|im_start|>"),
    (None, {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}, "<|im_end|>", "<|im_start|>"),
    ({"eos_token": "<|im_end|>"}, {"eos_token": "<|im_start|>"}, "<|im_end|>", ""),
    ({"eos_token": None, "bos_token": None}, {"eos_token": "<|im_end|>"}, "<|im_end|>", ""),
])
def test_the_files_beside_it_name_end_and_beginning(tmp_path, config, mapped, eos, bos):
    for name, names in (("tokenizer_config.json", config), ("special_tokens_map.json", mapped)):
        if names:
            (tmp_path / name).write_text(json.dumps(names))
    tokenizer = read_tokenizer(saved(tmp_path, trained("GPT-2")))
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.eot_token) == (eos, bos, SPECIAL.index(eos))


@pytest.mark.parametrize("template, expected", [("<|begin_of_text|> $A", True), ("$A", False), ("$A <|im_end|>", False),
                                                ("<|im_start|> $A", False), (None, False)])
@pytest.mark.parametrize("in_sequence", [False, True])
def test_whether_a_text_starts_with_the_begin_token(tmp_path, template, expected, in_sequence):
    theirs = tokenizers.Tokenizer.from_str(trained("Llama 3"))
    steps = [tokenizers.processors.ByteLevel(trim_offsets=True)]
    if template:
        names = [(text, number) for number, text in enumerate(SPECIAL)]
        steps.append(tokenizers.processors.TemplateProcessing(single=template, special_tokens=names))
    theirs.post_processor = tokenizers.processors.Sequence(steps) if in_sequence else steps[-1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))
    tokenizer = read_tokenizer(saved(tmp_path, theirs.to_str()))
    assert tokenizer.starts_with_bos == expected == (theirs.encode("a").ids[0] == 0)


# ---- one line for the others ----------------------------------------------------------------------------------------

TAKE = ".*; take a model with a byte-level BPE, such as GPT-2, Llama 3 or Qwen"
DIGIT_STEPS = [{"type": "Digits", "individual_digits": False}, {"type": "ByteLevel", "add_prefix_space": False}]
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}
BYTE_STEP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize("where, changes, message", [
    ("model", {"type": "Unigram"}, "has a model of type Unigram" + TAKE),
    ("model", {"type": "WordPiece"}, "has a model of type WordPiece" + TAKE),
    ("model", {"type": "WordLevel"}, "has a model of type WordLevel" + TAKE),
    ("model", {"byte_fallback": True}, "has byte_fallback=True" + TAKE),
    ("model", {"dropout": 0.1}, "has dropout=0.1" + TAKE),
    ("model", {"continuing_subword_prefix": "##"}, "has continuing_subword_prefix=##" + TAKE),
    ("model", {"end_of_word_suffix": "</w>"}, "has end_of_word_suffix=</w>" + TAKE),
    ("model", {"merges": ["th e", "t h"]}, "has merges in another order than their ids" + TAKE),
    ("model", {"vocab": {"a": 0, "b": 0}, "merges": []}, "or one id twice" + TAKE),
    ("", {"normalizer": {"type": "NFKC"}}, "has a normalizer, NFKC" + TAKE),
    ("", {"pre_tokenizer": None}, "has the pre-tokenizer .None" + TAKE),
    ("", {"pre_tokenizer": {"type": "Metaspace"}}, "has the pre-tokenizer .*Metaspace" + TAKE),
    ("", {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "has .*'add_prefix_space': True" + TAKE),
    ("", {"pre_tokenizer": BYTE_STEP}, "has the pre-tokenizer .*'use_regex': False" + TAKE),
    ("", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": DIGIT_STEPS}}, "'individual_digits': False" + TAKE),
    ("", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, *DIGIT_STEPS]}}, "'Split'.*'Digits'" + TAKE),
    ("", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT, "behavior": "Removed"}, BYTE_STEP]}},
     "'behavior': 'Removed'" + TAKE),
    ("", {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**SPLIT, "invert": True}, BYTE_STEP]}},
     "'invert': True" + TAKE),
    ("added", {"lstrip": True}, "an added token that depends on what is beside it: <.endoftext.>" + TAKE),
    ("added", {"content": "<|end|>"}, "no added token <.endoftext.>: name one as eos_token in tokenizer_config"),
])
def test_what_differs_is_refused_by_its_name(tmp_path, where, changes, message):
    values = tiny_file("t h", "th e")
    {"": values, "model": values["model"], "added": values["added_tokens"][0]}[where].update(changes)
    refused(saved(tmp_path, values), message)


def refused(path, message):
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_that_tokenizers_never_gives_are_refused(tmp_path):
    values = tiny_file("b c", "a b", "c d", "ab cd")  # of abcd's bytes, b and c merge first
    assert tokenizers.Tokenizer.from_str(json.dumps(values)).encode("abcd").tokens == ["a", "bc", "d"]
    refused(saved(tmp_path, values), "has the token .*abcd.*, which its bytes do not merge to" + TAKE)
    values["model"]["ignore_merges"] = True
    assert assert_equal_ids(saved(tmp_path, values), ["abcd", "abcde"]).encode_ordinary("abcd") == [259]
    values["model"]["vocab"]["abc"] = 300
    refused(saved(tmp_path, values), "has the token abc, which no merge makes" + TAKE)


def test_a_lacking_byte_that_has_the_unknown_token_is_refused(tmp_path):
    values = tiny_file()
    values["model"]["unk_token"] = "<|endoftext|>"
    assert_equal_ids(saved(tmp_path, values), ["abc"])  # nothing is unknown
    del values["model"]["vocab"]["z"]
    refused(saved(tmp_path, values), re.escape("or unk_token=<|endoftext|>, and not every byte") + TAKE)
    values["model"]["unk_token"], values["added_tokens"][0]["special"] = None, False
    refused(saved(tmp_path, values), "has added tokens that are not special, .*, and not every byte" + TAKE)


@pytest.mark.parametrize("where, changes", [
    *[("", {key: None}) for key in ("model", "added_tokens")], ("", {"model": []}), ("", {"added_tokens": [3]}),
    ("", {"pre_tokenizer": 3}), ("", {"pre_tokenizer": {"pretokenizers": 3}}), ("", {"post_processor": "x"}),
    ("", {"post_processor": {"single": []}}), ("", {"normalizer": True}),
    ("", {"pre_tokenizer": {"pretokenizers": [{**SPLIT, "pattern": {"Regex": "(a"}}, BYTE_STEP]}}),
    ("", {"pre_tokenizer": {"pretokenizers": [{**SPLIT, "pattern": {"Regex": 3}}, BYTE_STEP]}}),
    *[("model", {"vocab": vocab}) for vocab in (None, {}, [], {"a": "x"}, {"a": -1}, {"a": 0.5}, {"a": 1 << 40})],
    *[("model", {"merges": merges}) for merges in (None, 3, ["x y"], [3], [["a", 3]], [[["a"], "b"]])],
    *[("added", {"id": number}) for number in (None, "x", -1, 0.5)], ("added", {"content": None}),
    ("added", {"content": ["x"]}),
])
def test_a_damaged_file_is_one_line(tmp_path, where, changes):
    values = tiny_file()
    {"": values, "model": values["model"], "added": values["added_tokens"][0]}[where].update(changes)
    refused(saved(tmp_path, values), "has|is damaged")


@pytest.mark.parametrize("key", ["model", "added_tokens", "normalizer", "pre_tokenizer"])
def test_a_file_without_a_key_is_one_line(tmp_path, key):
    values = tiny_file()
    del values[key]
    refused(saved(tmp_path, values), f"is damaged .*{key}.*; download them again")


@pytest.mark.parametrize("text, message", [("[]", "no JSON object"), ('{"eos_token": ["x"]}', "is damaged"),
                                           ('{"eos_token": {"x": 1}}', "is damaged"),
                                           ('{"eos_token": "<x>"}', "no added token <x>: name one as eos_token"),
                                           ('{"bos_token": "<x>"}', "no added token <x>: name one as bos_token")])
def test_a_damaged_file_beside_it_is_one_line(tmp_path, text, message):
    (tmp_path / "tokenizer_config.json").write_text(text)
    saved(tmp_path, tiny_file())
    with pytest.raises(UserError, match=message):
        read_tokenizer(tmp_path / "tokenizer.json")
