"""A model's own tokenizer.json as a tiktoken encoding, where it is a byte-level BPE: GPT-2, Llama 3, SmolLM2, Qwen."""
import unicodedata
from pathlib import Path

import regex  # comes with tiktoken
import tiktoken

from nanosft.console import UserError
from nanosft.files import read_json

# How a text is cut into the pieces that are encoded one by one. DIGITS also cuts around every digit. The regex engine
# does not go back behind "++", which makes it faster.
GPT2 = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"
DIGITS = r"'(?:[sdmt]|ll|re|ve)| ?\p{L}++|\p{N}| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # what Llama 3's file says
QWEN = LLAMA3.replace("{1,3}", "")  # what those of Qwen 2 and 3 say: every digit by itself

# The file spells each byte as one letter: a visible one of Latin-1 as itself, the 68 others as U+0100 and what follows.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + n): byte for n, byte in enumerate(HIDDEN)}


class Tokenizer(tiktoken.Encoding):
    """An encoding with a model's own special tokens: `eos_token` and `bos_token` are the texts of those that end and
    begin a text; `starts_with_bos` says whether the file puts the latter first. `pattern`: how it cuts a text, as GPT2,
    DIGITS or its own. `lacking`: the bytes without an id. `added`: the tokens that texts are searched for, though no
    merge makes them; `added_pattern` finds them. `is_composed`: a text is put into Unicode's form NFC first."""
    eot_token = None  # the id of eos_token: an attribute, in the place of tiktoken's property

    def encode_ordinary(self, text):
        """The ids of a text; no special token is found in it. Lacking bytes go first: their neighbours may merge."""
        if self.is_composed:  # but for added tokens, which are looked for first
            text = "".join(part if part in self.added else unicodedata.normalize("NFC", part)
                           for part in self.added_pattern.split(text))
        if self.added:
            return self.encode(text, allowed_special=self.added, disallowed_special=())
        data = text.encode(errors="replace")
        if data.translate(None, self.lacking) == data:
            return super().encode_ordinary(text)
        pieces = (match[0].encode(errors="replace") for match in regex.finditer(self._pat_str, text))
        kept = filter(None, (piece.translate(None, self.lacking) for piece in pieces))
        return [token for piece in kept for token in self._encode_single_piece(piece)]


def has_other_vocabulary(directory, data_dir=""):
    """Whether a model's directory brings another vocabulary than prepared data have: their own, or GPT-2's."""
    def vocabulary(directory):  # {token: id}; an old GPT-2 has vocab.json alone
        path = Path(directory) / "tokenizer.json"
        if path.is_file():
            return (read_json(path).get("model") or {}).get("vocab")
        return read_json(path.with_name("vocab.json")) if path.with_name("vocab.json").is_file() else None

    theirs, ours = vocabulary(directory), data_dir and vocabulary(data_dir) or {"\u0120the": 262}
    return isinstance(theirs, dict) and any(theirs.get(token) != ours[token] for token in ours)


def read_tokenizer(path):
    """The Tokenizer of a tokenizer.json, with the ids of the library `tokenizers`; UserError for what would differ."""
    values = read_json(path)
    try:
        return convert(Path(path), values)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} or a file beside it is damaged ({error!r}); download them again") from None


def convert(path, values):
    def refuse(what):
        raise UserError(f"{path} has {what}; take a model with a byte-level BPE, such as GPT-2, Llama 3 or Qwen")

    model, vocabulary = values["model"], values["model"]["vocab"]
    if model.get("type", "BPE") != "BPE":  # the oldest files name none
        refuse(f"a model of type {model['type']}")
    for key in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"{key}={model[key]}")
    normalizer = (values["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        refuse(f"a normalizer, {normalizer}")
    for token in values["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            refuse(f"an added token that depends on what is beside it: {token['content']}")
    special = {token["content"]: token["id"] for token in values["added_tokens"]}

    steps = (values["pre_tokenizer"] or {}).get("pretokenizers", [values["pre_tokenizer"]])
    match [{"use_regex": True, **(step or {})} for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            cut = pattern = GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            cut = pattern = DIGITS
        case [{"type": "Split", "pattern": {"Regex": str(found)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            cut, pattern = found, f"{found}|(?:(?!{found})(?s:.))+"  # what lies between two matches is a piece too
        case _:
            refuse(f"the pre-tokenizer {steps}")

    # Ids are tiktoken's ranks. It merges two neighbours that give a token, the lowest id first; `tokenizers` merges two
    # that stand in its list, those that stand first.
    merged = ["".join(merge).replace(" ", "") for merge in model["merges"]]  # of "a b" or ["a", "b"]
    made = {*BYTES, *merged}
    for token in vocabulary.keys() - made - special.keys():
        refuse(f"the token {token}, which no merge makes")
    ranks = {bytes(map(BYTES.get, token)): vocabulary[token] for token in made & vocabulary.keys()}
    order = [vocabulary[token] for token in merged]
    if order != sorted(order) or len({*ranks.values()}) < len(ranks):
        refuse("merges in another order than their ids, or one id twice")
    tokenizer = Tokenizer("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokenizer.pattern, tokenizer.is_composed = cut, normalizer == "NFC"
    tokenizer.added = {token["content"] for token in values["added_tokens"] if not token["special"]}
    tokenizer.added_pattern = regex.compile(f"({'|'.join(map(regex.escape, tokenizer.added)) or '(?!)'})")
    tokenizer.lacking = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
    if tokenizer.lacking and (tokenizer.added or model.get("unk_token")):
        refuse(f"added tokens that are not special, or unk_token={model.get('unk_token')}, and not every byte")
    if not model.get("ignore_merges"):  # tiktoken takes a piece that is a token as it is, `tokenizers` merges its bytes
        mark = b"\xff"  # stands in no text, so that nothing merges with it, and no piece with it is a token
        probe = tiktoken.Encoding("", pat_str="", mergeable_ranks={mark: tokenizer.n_vocab, **ranks}, special_tokens={})
        for token, rank in ranks.items():
            if probe._encode_single_piece(mark + token)[1:] != [rank]:
                refuse(f"the token {token}, which its bytes do not merge to")

    names = {"eos_token": "<|endoftext|>"}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second counts more
        beside = read_json(path.parent / name) if (path.parent / name).exists() else {}
        for key in ("eos_token", "bos_token"):
            if token := beside.get(key):
                names[key] = token["content"] if isinstance(token, dict) else token
    for key, token in names.items():
        if token not in special:
            raise UserError(f"{path} has no added token {token}: name one as {key} in tokenizer_config.json")
    tokenizer.eos_token, tokenizer.eot_token = names["eos_token"], special[names["eos_token"]]
    tokenizer.bos_token = names.get("bos_token", "")
    processor = values["post_processor"] or {}
    first = [step["single"][0] for step in processor.get("processors", [processor]) if "single" in step]
    tokenizer.starts_with_bos = {"SpecialToken": {"id": tokenizer.bos_token, "type_id": 0}} in first
    return tokenizer
