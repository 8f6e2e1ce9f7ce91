"""Instruction records in any common format -> token shards on disk, ready for train.py.

    python prepare_data.py                                  # the bundled demo, byte-level, nothing to download
    python prepare_data.py --input=instruction-data.json    # your records, GPT-2's encoding
    python prepare_data.py --input=chats.jsonl --model=HuggingFaceTB/SmolLM2-135M-Instruct  # a model's own tokens

A record is one of (its keys tell which):
    {"instruction": ..., "input": optional, "output": ...}                 Alpaca
    {"prompt": ..., "completion" or "response": ...}                       rendered as it is
    {"messages": [{"role": "user", "content": ...}, ...]}                  chat (--template=chat)
    {"conversations": [{"from": "human", "value": ...}, ...]}              ShareGPT's chat
    {"text": ...}                                                          plain text, every token is learned
    any columns, with --prompt_format="Title: {title}\\nCategory:" --response_format=" {category}"
"""
import json
import os
import re
import shlex
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path

from nanosft.chat_template import read_chat_template
from nanosft.console import UserError, status
from nanosft.files import sha256_of
from nanosft.flags import check, run
from nanosft.hub import TOKENIZER
from nanosft.records import UNREADABLE, batched, open_text, pair_of, read_records, to_messages, whole
from nanosft.shards import FORMAT_VERSION, SUPERVISED, ShardWriter, write_meta
from nanosft.templates import (
    as_rendered,
    blocks,
    bring_tokenizer,
    copy_tokenizer,
    encode,
    encode_all,
    fingerprints,
    get_encoding,
    render,
    stop_token,
    tokenise,
)
from nanosft.weights import base_of, locate, read_config

# what an out_dir may hold to be written anew
OURS = re.compile("|".join([r"meta\.json", r"test\.jsonl", r"(train|val)_\d{5}\.npy", *map(re.escape, TOKENIZER)]))
SEVERAL = "conversations of several turns"
CHUNK = 2048  # records rendered and encoded at a time
PIECE = 1_000_000  # characters of a document tokenised at a time
CUT = re.compile(r"(?<=\S)\n(?=\S)")  # where a document may be cut: no token of GPT-2's spans this place


@dataclass(frozen=True)
class PrepareConfig:
    # data
    input: str = ""  # path of the records: .json .jsonl .csv .tsv .txt, also .gz; '' = the bundled demo
    out_dir: str = ""  # where the shards go; '' = data/NAME-OF-INPUT
    val_fraction: float = 0.05  # share of the prompts held out to watch the loss
    test_fraction: float = 0.10  # share of the prompts held out as test.jsonl, to answer and score with sample.py
    seed: int = 38  # decides which prompts are held out
    # rendering
    template: str = ""  # how a conversation becomes text: alpaca | chat | text | model; '' = the model's, else alpaca
    prompt_format: str = ""  # for other columns: "Title: {title}\nCategory:"
    response_format: str = ""  # for other columns: " {category}"
    train_on_prompt: bool = False  # learn to predict the prompts too
    # tokens
    model: str = ""  # the model to train, by name or path: its tokenizer, context and chat template are used
    encoding: str = ""  # without a model: tiktoken's name, or bytes; '' = gpt2, for the demo bytes
    block_size: int = 0  # the longest example in tokens; 0 = the context, 1,024 without a model and for texts
    shard_tokens: int = 100_000_000  # tokens in one file
    # report
    show: int = 1  # print this many rendered examples, supervised tokens in colour

    def __post_init__(self):
        problems = []
        if self.prompt_format and not self.response_format:
            problems.append("--response_format: needed with --prompt_format")
        if self.block_size == 1:
            problems.append("--block_size: 1 is below 2")
        if self.model and self.encoding:
            problems.append("--encoding: the model brings its own; give it or --model")
        if self.template == "model" and not self.model:
            problems.append("--template: model needs --model")
        check(self, at_least={"block_size": 0, "shard_tokens": 1, "show": 0},
              fractions=("val_fraction", "test_fraction"), problems=problems,
              choices={"template": ("", "alpaca", "chat", "text", "model")})
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError(f"--test_fraction: {self.test_fraction} beside --val_fraction={self.val_fraction} leaves "
                            "nothing to train on")


# ---- input ----------------------------------------------------------------------------------------------------------

def input_of(config):
    """The path of the records."""
    path = Path(config.input) if config.input else Path(__file__).parent / "data" / "demo.jsonl"
    if not path.is_file():
        raise UserError(f"--input: {config.input!r} is {'a directory' if path.is_dir() else 'not there'}; give a file")
    if path.name.lower().removesuffix(".gz").rpartition(".")[2] not in ("json", "jsonl", "csv", "tsv", "txt"):
        raise UserError(f"--input: {path.name} is none of .json .jsonl .csv .tsv .txt or one of them .gz; save it so")
    return path


def tokens_of(config):
    """(encoding, spec, directory, context): how text becomes tokens, by the flags or as the model that --model names
    has it; the directory with the model's tokenizer, or ''; its context in tokens."""
    directory, context, template = "", 1024, "alpaca"
    name = config.encoding or ("gpt2" if config.input else "bytes")
    if not config.input:
        template = "chat"
    if config.model:
        name = "gpt2"
        path = locate(config.model)
        directory = path.parent
        if path.name == "adapter_config.json":
            path = locate(base_of(path))
        family, values = read_config(path.parent / "config.json")
        context = values["block_size"]
        if (directory / "tokenizer.json").is_file():
            name = "tokenizer.json"
        elif family != "gpt2":
            raise UserError(f"--model={config.model} has no tokenizer.json; put the model's beside its weights")
        if read_chat_template(directory):
            template = "model"
    spec = {"template": config.template or template}
    for field in ("prompt_format", "response_format"):  # a shell leaves \n as two characters
        spec[field] = getattr(config, field).replace("\\n", "\n").replace("\\t", "\t")
    return get_encoding(name, directory), spec, directory, context


# ---- encoding -------------------------------------------------------------------------------------------------------

def pieces_of(text):
    """Yields a document in pieces of at least PIECE characters, each but the first from a newline on."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE)
        stop = cut.start() if cut else len(text)
        yield text[start:stop]
        start = stop


def encode_document(path, spec, config, encoding, pool):
    """Yields (split, record, examples) of a .txt file, which is one document: its end is held out."""
    try:
        with open_text(path, newline=None) as file:
            text = file.read()
    except UNREADABLE as error:
        raise UserError(f"{path.name}: {error}; save or download it again as UTF-8 text") from None
    n_test, n_val = round(len(text) * config.test_fraction), round(len(text) * config.val_fraction)
    n_train = len(text) - n_val - n_test
    begin, end = encode(render([("text", {"text": ""})], spec), encoding)[0]
    for split, part in (("train", text[:n_train]), ("val", text[n_train:n_train + n_val])):
        # a few pieces at a time: the ids of a text need ten times its memory
        groups = batched((whole(piece, path.name) for piece in pieces_of(part)), 8)
        encoded = chain.from_iterable(tokenise(group, encoding, pool) for group in groups)
        if part:
            yield split, None, blocks(chain([[begin]], encoded, [[end]]), config.block_size)
    if n_test:
        yield "test", {"text": text[n_train + n_val:]}, []


def answered_part(messages, report):
    """The messages up to the last answer, or [] where nothing is asked or answered; `report` counts what goes."""
    asked = [fields for role, fields in messages if role == "user"]
    kept = list(messages)
    while kept and kept[-1][0] in ("system", "user"):
        kept.pop()
    if asked and not any(value.strip() for fields in asked for value in fields.values()):
        report["dropped: no question"] += 1
        return []
    report[SEVERAL] += len(asked) > 1
    if not kept or not any(value.strip() for value in kept[-1][1].values()):
        report["dropped: no answer, or empty"] += 1
        return []
    report["cut: turns at the end that nobody answered"] += len(messages) - len(kept)
    return kept


def render_all(path, spec, report):
    """Yields (record, messages, segments) for each record that has something to learn. All must be of one kind."""
    first_kind = None
    for location, record in read_records(path):
        report["records"] += 1
        try:
            messages = to_messages(record, spec)
            kind = messages[0][0] if messages[0][0] in ("text", "prompt") else "conversation"
            if kind == "prompt" and not spec["response_format"]:
                kind = " and ".join(pair_of(record))
            first_kind = first_kind or kind
            if kind != first_kind:
                raise UserError(f"a {kind} record among {first_kind} records; prepare each kind by itself")
            messages = answered_part(messages, report)
            if messages:
                yield record, messages, render(messages, spec)
        except UserError as error:
            raise UserError(f"{path.name}, {location}: {error}") from None


def encode_records(records, config, encoding, pool, report):
    """Yields (split, record, examples) for each of `render_all`'s that stays; `report` counts the others."""
    seen, max_tokens = set(), config.block_size + 1
    for chunk in batched(records, CHUNK):
        status(f"{report['records']:,} records")
        encoded = encode_all([segments for *_, segments in chunk], encoding, pool, config.train_on_prompt)
        for (record, messages, segments), (ids, flags) in zip(chunk, encoded, strict=True):
            share, digest = fingerprints(segments, config.seed)
            is_text, is_long = messages[0][0] == "text", len(ids) > max_tokens
            if is_long and not is_text:
                report[f"dropped: longer than --block_size={config.block_size}"] += 1
            elif digest in seen:
                report["dropped: exact duplicates"] += 1
            else:
                seen.add(digest)
                split = "train"
                if share < config.test_fraction + config.val_fraction:
                    split = "test" if share < config.test_fraction else "val"
                yield split, record, blocks([ids], config.block_size) if is_text else [(ids, flags)]


# ---- output ---------------------------------------------------------------------------------------------------------

def write_shards(parts, work, config, encoding):
    """Writes the shards and test.jsonl of `parts`, (split, record, examples). Returns the counts of each split, the
    examples to show and the first record."""
    writers = {split: ShardWriter(work, split, encoding.n_vocab, config.shard_tokens) for split in ("train", "val")}
    shown, first, n_test = [], None, 0
    # half a surrogate pair, which a field that is not used may hold, stays the escape that it was
    with open(work / "test.jsonl", "w", encoding="utf-8", errors="backslashreplace") as test_file:
        for split, record, examples in parts:
            first = first or record
            if split == "test":
                test_file.write(json.dumps(record, ensure_ascii=False) + "\n")
                n_test += 1
                continue
            for ids, flags in examples:
                writers[split].add(ids, flags)
                if split == "train" and len(shown) < config.show:
                    shown.append((ids, flags))
    for writer in writers.values():
        writer.close()
    return {"train": writers["train"].counts, "val": writers["val"].counts, "test": {"examples": n_test}}, shown, first


def publish(work, out_dir):
    """Renames the finished directory into place. An older one of ours goes once the new one stands there; what somebody
    else put there meanwhile stays."""
    old = work.with_name(work.name + ".old")
    if out_dir.exists():
        out_dir.rename(old)
    work.rename(out_dir)
    for path in old.glob("*"):
        if not OURS.fullmatch(path.name):
            path.rename(out_dir / path.name)
    shutil.rmtree(old, ignore_errors=True)


def check_out_dir(out_dir, path):
    """UserError where the shards cannot replace what stands at `out_dir`; `path` is the input."""
    if out_dir.is_file():
        raise UserError(f"--out_dir={out_dir} is a file; name a directory")
    for file in out_dir.glob("*"):
        if not OURS.fullmatch(file.name):
            raise UserError(f"--out_dir={out_dir} holds files that are not ours ({file.name}); name another directory")
    if path.resolve().parent == out_dir.resolve():
        raise UserError(f"--out_dir={out_dir} holds --input itself and is written anew; name another directory")


def preview(ids, flags, encoding):
    """The example as text: supervised tokens green on a terminal, between >>> and <<< elsewhere."""
    on, off, texts = ">>>", "<<<", []
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        on, off = "\033[32m", "\033[0m"
    for supervised, tokens in groupby(zip(ids, flags, strict=True), key=lambda token: token[1] & SUPERVISED):
        text = encoding.decode([token for token, _ in tokens])
        texts.append(on + text + off if supervised else text)
    return "".join(texts)


def print_report(meta, report, out_dir):
    status("")
    for split in ("train", "val"):
        counts = meta[split]
        share = counts["supervised_tokens"] / max(counts["tokens"], 1)
        print(f"{split:6s}{counts['examples']:10,} examples {counts['tokens']:12,} tokens, {share:6.1%} supervised, "
              f"longest {counts['longest']:,}")
    print(f"test  {meta['test']['examples']:10,} records in {out_dir / 'test.jsonl'}")
    for reason, count in report.items():
        if count and reason not in ("records", SEVERAL):
            print(f"{count:,} {reason}")
    if not meta["val"]["examples"]:
        print("warning: the validation split is empty; train.py then keeps the last weights, not the best "
              "(--val_fraction, or more records)")
    template = f"{meta['prompt']['template']} template"
    if meta["prompt"]["response_format"] and template != "model template":
        template = "your formats"
    flags = [f"--data_dir={out_dir}", f"--out_dir=out-{out_dir.name}"]
    command = shlex.join(["python", "train.py", *([] if out_dir == Path("data/demo") else flags)])
    print(f"wrote {out_dir} ({meta['model'] or meta['encoding'] + ' encoding'}, {template}); next: {command}")


def main(config):
    """Prepares config.input into config.out_dir and returns what meta.json holds."""
    report = Counter()
    path = input_of(config)
    stem, kind = os.path.splitext(path.name.removesuffix(".gz"))
    out_dir = Path(config.out_dir or Path("data") / stem)
    check_out_dir(out_dir, path)
    encoding, spec, directory, context = tokens_of(config)
    full_spec = bring_tokenizer(spec, encoding, directory)
    if not config.block_size:
        config = replace(config, block_size=min(context, 1024) if kind.lower() == ".txt" else context)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if kind.lower() == ".txt":
            parts = encode_document(path, full_spec, config, encoding, pool)
        else:
            records = render_all(path, full_spec, report)
            parts = encode_records(records, config, encoding, pool, report)
        # all is written beside out_dir (where that is a link, or ".", beside what it stands for) and renamed at the end
        place = out_dir.resolve()
        work = place.with_name(f".{place.name}.{os.getpid()}.tmp")
        work.mkdir(parents=True)
        try:
            counts, shown, first = write_shards(parts, work, config, encoding)
            if not counts["train"]["examples"]:
                why = ", ".join(f"{count} {reason}" for reason, count in report.items() if count) or "it is empty"
                raise UserError(f"--input: {path.name} leaves nothing to train on ({why})")
            prompt = {**as_rendered(first, spec), "turns": "several" if report[SEVERAL] else "one"}
            model = config.model
            if model and Path(model).exists():
                model = str(Path(model).resolve())
            if encoding.name == "tokenizer.json":
                copy_tokenizer(directory, work, full_spec)
            meta = write_meta(work, {
                "format_version": FORMAT_VERSION, "encoding": encoding.name, "vocab_size": encoding.n_vocab,
                "stop": stop_token({**full_spec, **prompt}, encoding), "block_size": config.block_size, "model": model,
                "seed": config.seed, "source": path.name, "source_sha256": sha256_of(path), "prompt": prompt, **counts})
            publish(work, place)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    print_report(meta, report, out_dir)
    for ids, flags in shown:
        print(f"\n{preview(ids, flags, encoding)}")
    return meta


if __name__ == "__main__":
    run(main, PrepareConfig)
