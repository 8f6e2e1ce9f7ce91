"""Instruction records in any common format -> token shards on disk, ready for train.py.

    python prepare_data.py                                  # the bundled demo, byte-level, nothing to download
    python prepare_data.py --input=instruction-data.json    # your records, GPT-2's encoding

A record is one of (its keys tell which):
    {"instruction": ..., "input": optional, "output": ...}                 Alpaca
    {"prompt": ..., "completion" or "response": ...}                       rendered as it is
    {"messages": [{"role": "user", "content": ...}, ...]}                  chat (--template=chat)
    {"conversations": [{"from": "human", "value": ...}, ...]}              ShareGPT's chat
    {"text": ...}                                                          plain text, every token is learned
    any columns, with --prompt_format="Title: {title}\\nCategory:" --response_format=" {category}"
"""
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np
import tiktoken

from config import parse_config
from console import UserError, require, run, status, typed
from records import UNREADABLE, fetch, fill, open_text, read_records, sha256_of, to_messages, whole

FORMAT_VERSION = 1
SUPERVISED, START = 1, 2  # bits of a token's flags: the loss counts its prediction; an example starts here
EOT = None  # in a rendered segment: the end-of-text token, which no text can become
OURS = re.compile(r"meta\.json|test\.jsonl|(train|val)_\d{5}\.npy")  # what an out_dir may hold to be written anew
KINDS = {"text": "text", "prompt": "prompt"}  # by the role of the first message; all others are conversations
SEVERAL = "conversations of several turns"
CHUNK = 2048  # records rendered and encoded at a time
PIECE = 1_000_000  # characters of a document read at a time


@dataclass(frozen=True)
class PrepareConfig:
    # data
    input: str = ""  # path or URL of the records: .json .jsonl .csv .tsv .txt, also .gz; '' = the bundled demo
    out_dir: str = ""  # where the shards go; '' = data/NAME-OF-INPUT
    val_fraction: float = 0.05  # share of the prompts held out to watch the loss
    test_fraction: float = 0.10  # share of the prompts held out as test.jsonl, to answer and score with sample.py
    seed: int = 38  # decides which prompts are held out
    # rendering
    template: str = ""  # how a conversation becomes text: alpaca | chat | text; '' = alpaca, for the demo chat
    prompt_format: str = ""  # for other columns: "Title: {title}\nCategory:"
    response_format: str = ""  # for other columns: " {category}"
    train_on_prompt: bool = False  # learn to predict the prompts too
    # tokens
    encoding: str = ""  # tiktoken's name, or bytes; '' = gpt2, for the demo bytes
    block_size: int = 1024  # the longest example in tokens (GPT-2's context)
    overlong: str = "drop"  # longer examples: drop | truncate (shortens the longest user field, never the answer)
    shard_tokens: int = 100_000_000  # tokens in one file
    # report
    show: int = 1  # print this many rendered examples, supervised tokens in colour

    def __post_init__(self):
        typed(self)
        require(
            val_fraction=not 0 <= self.val_fraction < 1 and f"{self.val_fraction} is not in [0, 1)",
            test_fraction=not 0 <= self.test_fraction < 1 - self.val_fraction
            and f"{self.test_fraction} leaves nothing to train on",
            template=self.template not in ("", "alpaca", "chat", "text") and f"{self.template!r}: alpaca, chat or text",
            response_format=bool(self.prompt_format) > bool(self.response_format) and "needed with --prompt_format",
            block_size=self.block_size < 2 and f"{self.block_size} is below 2",
            overlong=self.overlong not in ("drop", "truncate") and f"{self.overlong!r}: drop or truncate",
            shard_tokens=self.shard_tokens < 1 and f"{self.shard_tokens} is below 1",
            show=self.show < 0 and f"{self.show} is below 0")


# ---- rendering: messages become segments (text or EOT, supervised); the one place for wording and loss mask ----------

def alpaca_prompt(instruction, given):
    """The prompt of Stanford Alpaca (Taori et al. 2023), with or without an input."""
    context = ", paired with an input that provides further context" if given else ""
    given = f"### Input:\n{given}\n\n" if given else ""
    return (f"Below is an instruction that describes a task{context}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{instruction}\n\n{given}### Response:\n")


def render(messages, spec):
    """Segments (text or EOT, supervised), each to be tokenised by itself.

    Messages that end with an answer give a whole training example; others give the prompt for sampling, which is the
    training example's beginning, token for token.
    """
    roles = [role for role, _ in messages]
    answer = [(text, True) for role, fields in messages[-1:] if role in ("assistant", "completion")
              for text in fields.values()]
    if roles[0] in ("text", "opening"):  # an opening is the beginning of a text that sample.py goes on with
        whole = roles[0] == "text"
        return [(EOT, False), (messages[0][1]["text"], whole)] + [(EOT, True)] * whole
    if roles[0] == "prompt":
        prompt = fill(spec["prompt_format"] or ("" if spec["response_format"] else "{prompt}"), messages[0][1],
                      "prompt_format")
        return [(prompt or EOT, False)] + [*answer, (EOT, True)] * bool(answer)
    if spec["template"] == "alpaca":
        if roles not in (["user"], ["user", "assistant"]):
            raise UserError(f"the alpaca template holds one question and one answer, not {' + '.join(roles)}; "
                            "--template=chat holds conversations")
        prompt = alpaca_prompt(messages[0][1]["content"], messages[0][1].get("input", ""))
        return [(prompt, False)] + [*answer, (EOT, True)] * bool(answer)
    if spec["template"] == "chat":
        segments, stops = [], False  # stops: the end-of-text that opens this turn closes an assistant's
        for role, fields in messages:
            content = "\n\n".join(filter(None, fields.values())) or ""
            segments.append((EOT, stops))
            stops = role == "assistant"
            segments += [("assistant\n", False), (content, True)] if stops else [(f"{role}\n{content}", False)]
        return segments + ([(EOT, True)] if stops else [(EOT, False), ("assistant\n", False)])
    raise UserError(f"--template=text holds records with 'text', or --response_format; not {' + '.join(roles)}")


def shorten(messages, excess, encoding):
    """`messages` with up to `excess` tokens less in the longest field of the user's, or None where all are empty."""
    fields = [(encoding.encode_ordinary(value), index, key) for index, (role, fields) in enumerate(messages)
              if role in ("user", "prompt") for key, value in fields.items() if isinstance(value, str)]
    ids, index, key = max(fields, key=lambda field: len(field[0]), default=([], 0, ""))
    if not ids:
        return None
    role, values = messages[index]
    text = encoding.decode_bytes(ids[:-excess]).decode("utf-8", errors="ignore")
    return [*messages[:index], (role, {**values, key: text}), *messages[index + 1:]]


# ---- encoding: segments become ids and flags ------------------------------------------------------------------------

def get_encoding(name):
    """tiktoken's encoding of that name, or `bytes`: 256 bytes and end-of-text, with no vocabulary to download."""
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


def encode_all(encoding, texts, pool):
    """Yields the ids of each text, in order. A thread takes a run of texts: handing over single short ones costs more
    than encoding them."""
    size = max(1, -(-len(texts) // (2 * pool._max_workers)))
    runs = [texts[start:start + size] for start in range(0, len(texts), size)]
    yield from chain.from_iterable(pool.map(lambda run: [encoding.encode_ordinary(text) for text in run], runs))


def join(segments, encoded, eot, train_on_prompt=False):
    """(ids, flags) of one example, with the next of `encoded` for each segment that is text."""
    ids, flags = [], bytearray()
    for text, supervised in segments:
        part = [eot] if text is EOT else next(encoded)
        ids += part
        flags += bytes([SUPERVISED * (supervised or train_on_prompt)]) * len(part)
    flags[0] = START  # nothing comes before the first token, so nothing can predict it
    return ids, flags


def encode(segments, encoding, train_on_prompt=False):
    """(ids, flags) of one example or prompt."""
    encoded = (encoding.encode_ordinary(text) for text, _ in segments if text is not EOT)
    return join(segments, encoded, encoding.eot_token, train_on_prompt)


def blocks(parts, block_size):
    """The token lists of one long text as (ids, flags) of at most block_size + 1 tokens each. All but the first begin
    with the last token of the one before, so that every token but the very first is predicted exactly once."""
    buffer, flags = [], bytes([START]) + bytes([SUPERVISED]) * block_size
    for ids in parts:
        buffer += ids
        start = 0
        while len(buffer) - start > block_size + 1:
            yield buffer[start:start + block_size + 1], flags
            start += block_size
        del buffer[:start]
    yield buffer, flags[:len(buffer)]


# ---- splitting ------------------------------------------------------------------------------------------------------

def fingerprints(segments, seed):
    """(a number in [0, 1) that depends on the prompt and the seed alone, a digest of the whole example)."""
    marked = ["|" if text is EOT else f"{len(text)}:{text}" for text, _ in segments]
    asked = [text is not EOT and not supervised and text != "assistant\n" and not text.startswith("system\n")
             for text, supervised in segments]  # a greeting before the first question is no prompt
    first = next((index for index, (_, supervised) in enumerate(segments) if supervised and any(asked[:index])), 0)
    prompt = "".join(marked[:first] or marked)
    share = int.from_bytes(hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest(), "big") / 2**64
    return share, hashlib.blake2b("".join(marked).encode(), digest_size=16).digest()


def document_pieces(file, length):
    """The next `length` characters of a text file in pieces of about a million, cut between a word and a newline before
    another word: no token of GPT-2's spans that place."""
    rest = ""
    while length > 0 and (text := file.read(min(length, PIECE))):
        length -= len(text)
        rest += text
        cut = max((match.start() + 1 for match in re.finditer(r"\S\n(?=\S)", rest[-10_000:])), default=0)
        if cut and length > 0:
            cut += max(0, len(rest) - 10_000)
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


# ---- shards ---------------------------------------------------------------------------------------------------------

class ShardWriter:
    """Writes one split's examples as .npy shards of (id, flags) and counts them. An example never spans two shards."""

    def __init__(self, directory, split, dtype, shard_tokens):
        self.directory, self.split, self.dtype, self.shard_tokens = directory, split, dtype, shard_tokens
        self.examples = self.tokens = self.supervised = self.longest = 0
        self.shards, self.ids, self.flags, self.file, self.in_shard = [], [], bytearray(), None, 0

    def add(self, ids, flags):
        if self.in_shard and self.in_shard + len(ids) > self.shard_tokens:
            self.close()
        self.ids += ids
        self.flags += flags
        self.in_shard += len(ids)
        self.examples += 1
        self.tokens += len(ids)
        self.longest = max(self.longest, len(ids))
        if len(self.ids) > 1 << 16:
            self.flush()

    def header(self, tokens):
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (tokens,)})

    def flush(self):
        if not self.file:
            self.shards.append(f"{self.split}_{len(self.shards):05d}.npy")
            self.file = open(self.directory / self.shards[-1], "w+b")
            self.header(0)  # numpy pads it, so that the true length fits in its place
        array = np.empty(len(self.ids), self.dtype)
        array["id"], array["flags"] = self.ids, np.frombuffer(bytes(self.flags), np.uint8)
        self.supervised += int(np.count_nonzero(array["flags"] & SUPERVISED))
        self.file.write(array.tobytes())
        self.ids, self.flags = [], bytearray()

    def close(self):
        if self.in_shard:
            self.flush()
            self.file.seek(0)
            self.header(self.in_shard)
            self.file.close()
        self.file, self.in_shard = None, 0

    def counts(self):
        return {"examples": self.examples, "tokens": self.tokens, "supervised_tokens": self.supervised,
                "longest": self.longest, "shards": self.shards}


# ---- the whole job --------------------------------------------------------------------------------------------------

def encode_document(path, config, encoding, pool):
    """Yields (split, record, examples) of a .txt file, which is one document: its end is held out, and each part is cut
    into blocks. The text is kept for the test part alone; nothing else stays in memory."""
    try:
        with open_text(path, newline=None) as file:
            length = sum(len(text) for text in iter(lambda: file.read(1 << 20), ""))
    except UNREADABLE as error:
        raise UserError(f"{path.name}: {error}; save or download it again as UTF-8 text") from None
    test, val = round(length * config.test_fraction), round(length * config.val_fraction)
    eot = [[encoding.eot_token]]
    with open_text(path, newline=None) as file:
        for split, part in (("train", length - val - test), ("val", val), ("test", test)):
            pieces = (whole(piece, path.name) for piece in document_pieces(file, part))
            if part and split == "test":
                yield split, {"text": "".join(pieces)}, []
            elif part:
                groups = iter(lambda pieces=pieces: list(islice(pieces, 8)), [])
                encoded = chain.from_iterable(encode_all(encoding, group, pool) for group in groups)
                yield split, None, blocks(chain(eot, encoded, eot), config.block_size)


def encode_records(path, name, config, spec, encoding, pool, report):
    """Yields (split, record, examples) for each record that stays; `report` counts those that do not, and why."""
    records, seen, first_kind = read_records(path, name), set(), None
    limit, eot = config.block_size + 1, encoding.eot_token
    while chunk := list(islice(records, CHUNK)):
        kept = []
        for place, record in chunk:
            report["records"] += 1
            try:
                messages = to_messages(record, spec)
                kind = KINDS.get(messages[0][0], "conversation") + " with 'response'" * (
                    messages[0][0] == "prompt" and not spec["response_format"] and "completion" not in record)
                if kind != (first_kind := first_kind or kind):
                    raise UserError(f"a {kind} record among {first_kind} records; prepare each kind by itself")
                said, asked = len(messages), [fields for role, fields in messages if role == "user"]
                if asked and not any(value.strip() for fields in asked for value in fields.values()):
                    report["dropped: no question"] += 1
                    continue
                report[SEVERAL] += len(asked) > 1
                while messages and messages[-1][0] in ("system", "user"):
                    messages.pop()
                if messages and any(value.strip() for value in messages[-1][1].values()):
                    kept.append((record, messages, render(messages, spec)))
                    report["cut: turns at the end that nobody answered"] += said - len(messages)
                else:
                    report["dropped: no answer, or empty"] += 1
            except UserError as error:
                raise UserError(f"{name}, {place}: {error}") from None
        encoded = encode_all(encoding, [text for *_, segments in kept for text, _ in segments if text is not EOT], pool)
        for record, messages, segments in kept:
            ids, flags = join(segments, encoded, eot, config.train_on_prompt)
            long, is_text = len(ids) > limit, messages[0][0] == "text"
            share, digest = fingerprints(segments, config.seed)
            while config.overlong == "truncate" and messages and len(ids) > limit and not is_text:
                if messages := shorten(messages, len(ids) - limit, encoding):
                    segments = render(messages, spec)
                    ids, flags = encode(segments, encoding, config.train_on_prompt)
            if len(ids) > limit and not is_text:
                report[f"dropped: longer than --block_size={config.block_size}"] += 1
                continue
            if long:  # by its whole prompt it is split, by what is left of it told from others
                digest = fingerprints(segments, config.seed)[1]
            if digest in seen:
                report["dropped: exact duplicates"] += 1
                continue
            seen.add(digest)
            report[f"truncated to --block_size={config.block_size}"] += long and not is_text
            split = "test" if share < config.test_fraction else (
                "val" if share < config.test_fraction + config.val_fraction else "train")
            yield split, record, blocks([ids], config.block_size) if is_text else [(ids, flags)]


def write_shards(parts, work, config, encoding, report):
    """Writes the shards and test.jsonl of `parts`, (split, record, examples); returns the two writers, the examples to
    show and the first record."""
    dtype = np.dtype([("id", "<u2" if encoding.n_vocab <= 2**16 else "<u4"), ("flags", "u1")])
    writers = {split: ShardWriter(work, split, dtype, config.shard_tokens) for split in ("train", "val")}
    shows, first, started, shown = [], None, time.perf_counter(), 1.0
    with open(work / "test.jsonl", "w", encoding="utf-8", errors="backslashreplace") as test_file:
        for split, record, examples in parts:
            first = first or record
            if split == "test":
                test_file.write(json.dumps(record, ensure_ascii=False) + "\n")
                report["held out for test"] += 1
            for ids, flags in examples if split != "test" else ():
                writers[split].add(ids, flags)
                if split == "train" and len(shows) < config.show:
                    shows.append((ids, flags))
            if (seconds := time.perf_counter() - started) > shown:
                shown = seconds + 0.5
                tokens = sum(writer.tokens for writer in writers.values())
                status(f"{report['records']:,} records, " * bool(report["records"])
                       + f"{tokens:,} tokens, {tokens / seconds:,.0f} a second")
    for writer in writers.values():
        writer.close()
    return writers["train"], writers["val"], shows, first


def preview(ids, flags, encoding):
    """The example as text: supervised tokens green on a terminal, between >>> and <<< elsewhere."""
    on, off = ("\033[32m", "\033[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else (">>>", "<<<")
    runs = groupby(zip(ids, flags, strict=True), key=lambda token: bool(token[1] & SUPERVISED))
    texts = ((supervised, encoding.decode([token for token, _ in run])) for supervised, run in runs)
    return "".join(on + text + off if supervised else text for supervised, text in texts)


def as_rendered(record, spec):
    """The spec by which sample.py words a prompt like this record's, whatever kind the record is."""
    role = to_messages(record, spec)[0][0] if record else "text"
    if role == "prompt" and not spec["response_format"]:
        answer = "completion" if "completion" in record else "response"
        return {**spec, "prompt_format": "{prompt}", "response_format": f"{{{answer}}}"}
    return {**spec, "template": "text"} if role == "text" else spec


def print_report(meta, report, out_dir):
    status("")
    for split, part in (("train", meta["train"]), ("val", meta["val"])):
        print(f"{split:6s}{part['examples']:10,} examples {part['tokens']:12,} tokens, "
              f"{part['supervised_tokens'] / max(part['tokens'], 1):6.1%} supervised, longest {part['longest']:,}")
    print(f"test  {meta['test']['examples']:10,} records in {out_dir / 'test.jsonl'}")
    for reason, count in report.items():
        if count and reason not in ("records", "held out for test", SEVERAL):
            print(f"{count:,} {reason}")
    if not meta["val"]["examples"]:
        print("warning: the validation split is empty; train.py then keeps the last weights, not the best "
              "(--val_fraction, or more records)")
    wording = "your formats" if meta["prompt"]["response_format"] else f"{meta['prompt']['template']} template"
    print(f"wrote {out_dir} ({meta['encoding']} encoding, {wording}); next: python train.py"
          + " ".join(["", *map(shlex.quote, (f"--data_dir={out_dir}", f"--out_dir=out-{out_dir.name}"))])
          * (out_dir != Path("data/demo")))


def publish(work, out_dir):
    """Renames the finished directory into place; an older one of ours is removed once the new one stands there, but for
    files that somebody put there meanwhile."""
    old = work.with_name(work.name + ".old")
    if out_dir.exists():
        out_dir.rename(old)
    work.rename(out_dir)
    for path in old.glob("*"):
        if not OURS.fullmatch(path.name):
            path.rename(out_dir / path.name)
    shutil.rmtree(old, ignore_errors=True)


def main(config):
    """Prepares config.input into config.out_dir and returns what meta.json holds."""
    report = Counter()
    with tempfile.TemporaryDirectory() as downloads, ThreadPoolExecutor(os.cpu_count()) as pool:
        path, name = fetch(config.input, downloads)
        stem, kind = os.path.splitext(name.removesuffix(".gz"))
        if kind.lower() not in (".json", ".jsonl", ".csv", ".tsv", ".txt"):
            raise UserError(f"--input: {name} is none of .json .jsonl .csv .tsv .txt or one of them .gz; save it so")
        out_dir = Path(config.out_dir or Path("data") / stem)
        if out_dir.is_file():
            raise UserError(f"--out_dir={out_dir} is a file; name a directory")
        if foreign := [file.name for file in out_dir.glob("*") if not OURS.fullmatch(file.name)]:
            raise UserError(f"--out_dir={out_dir} holds files that are not ours ({foreign[0]}); name another directory")
        if path.resolve().parent == out_dir.resolve():
            raise UserError(f"--out_dir={out_dir} holds --input itself and is written anew; name another directory")
        encoding = get_encoding(config.encoding or ("gpt2" if config.input else "bytes"))
        spec = {"template": config.template or ("alpaca" if config.input else "chat"), **{
            name: getattr(config, name).replace("\\n", "\n").replace("\\t", "\t")
            for name in ("prompt_format", "response_format")}}
        if kind.lower() == ".txt":
            spec["template"] = "text"
            parts = encode_document(path, config, encoding, pool)
        else:
            parts = encode_records(path, name, config, spec, encoding, pool, report)
        place = out_dir.resolve()  # the directory itself where out_dir is a link or "."
        work = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        work.mkdir(parents=True)
        try:
            train, val, shows, first = write_shards(parts, work, config, encoding, report)
            if not train.examples:
                why = ", ".join(f"{count} {reason}" for reason, count in report.items() if count)
                raise UserError(f"--input: {name} leaves nothing to train on ({why or 'it is empty'})")
            meta = {"format_version": FORMAT_VERSION, "encoding": encoding.name, "vocab_size": encoding.n_vocab,
                    "eot": encoding.eot_token, "block_size": config.block_size, "seed": config.seed, "source": name,
                    "source_sha256": sha256_of(path), "prompt": {
                        **as_rendered(first, spec), "turns": "several" if report[SEVERAL] else "one"},
                    "train": train.counts(), "val": val.counts(), "test": {"examples": report["held out for test"]}}
            (work / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            publish(work, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print_report(meta, report, out_dir)
    for ids, flags in shows:
        print(f"\n{preview(ids, flags, encoding)}")
    return meta


if __name__ == "__main__":
    run(main, parse_config, PrepareConfig)
