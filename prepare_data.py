"""Instruction records in any common format -> token shards, ready for train.py.

    python prepare_data.py                                       # the demo
    python prepare_data.py --input=mine.json                     # for GPT-2
    python prepare_data.py --input=mine.json --model=owner/name  # for others

A record is one of (its keys tell which):
    {"instruction": ..., "input": optional, "output": ...}  Alpaca, Dolly, Q & A
    {"prompt": ..., "completion" or "response": ...}        without a template, if alone
    {"messages": [{"role": ..., "content": ...}, ...]}      chat, ShareGPT
    {"text": ...}                                           all of it is learned
    any columns: --prompt_format="{title}\\nIt is" --response_format=" {kind}"
"""
import contextlib
import gc
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path

from nanosft import templates
from nanosft.chat_template import read_chat_template
from nanosft.console import UserError, status
from nanosft.files import sha256_of
from nanosft.flags import check, run
from nanosft.hub import TOKENIZER, base_of, locate
from nanosft.records import NAME, Unusable, is_missing, to_messages
from nanosft.shards import FORMAT_VERSION, SUPERVISED, ShardWriter, write_meta
from nanosft.sources import SEPARATOR, kind_of, paths_of, read_records
from nanosft.tokenizer import has_other_vocabulary
from nanosft.weights import read_config

# what an out_dir may hold to be written anew
OURS = re.compile("|".join([r"meta\.json", r"test\.jsonl", r"(train|val)_\d{5}\.npy", *map(re.escape, TOKENIZER)]))


@dataclass(frozen=True)
class PrepareConfig:
    # data
    input: str = ""  # .json .jsonl .csv .tsv .txt, also .gz; .parquet; a directory; hf:owner/name; several with commas
    val_input: str = ""  # records to watch the loss on; '' = a share of the input
    test_input: str = ""  # records for test.jsonl; '' = a share of the input
    text_encoding: str = ""  # of the files that are not UTF-8, say cp1252; UTF-16 is seen where it is
    separator: str = SEPARATOR  # what stands on a line of its own between two documents of a .txt file
    strict: bool = False  # end at the first record that cannot be used; else they are dropped and counted
    out_dir: str = ""  # where the shards go; '' = data/NAME-OF-INPUT
    val_fraction: float = 0.05  # share of the prompts held out to watch the loss
    test_fraction: float = 0.10  # share of the prompts held out as test.jsonl, to answer and score with sample.py
    seed: int = 38  # decides which prompts are held out
    # rendering
    template: str = ""  # alpaca | chat | text | model; '' = the model's; chat for turns, system, history; else alpaca
    prompt_format: str = ""  # for other columns: "Title: {title}\nCategory:"
    response_format: str = ""  # for other columns: " {category}"
    train_on_prompt: bool = False  # learn to predict the prompts too
    # tokens
    model: str = ""  # the model to train, by name or path: its tokenizer, context and chat template are used
    encoding: str = ""  # without a model: tiktoken's name, or bytes; '' = gpt2, for the demo bytes
    block_size: int = 0  # tokens of an example that a model reads; 0 = the context, 1,024 without a model and for .txt
    shard_tokens: int = 10_000_000  # tokens in one file; they wait in memory until it is full
    # report
    show: int = 1  # print this many rendered examples, supervised tokens in colour

    def __post_init__(self):
        problems = []
        if self.prompt_format and not self.response_format:
            problems.append("--response_format: needed with --prompt_format")
        if self.response_format and not NAME.search(self.response_format):
            problems.append(f"--response_format: {self.response_format!r} names no column, as {{label}} does")
        if self.prompt_format and self.template in ("alpaca", "text"):
            problems.append(f"--template: {self.template} leaves no place for --prompt_format; leave one of them out")
        if self.block_size == 1:
            problems.append("--block_size: 1 is below 2")
        if not self.input and (self.val_input or self.test_input):
            problems.append("--input: needed with --val_input and --test_input")
        if self.model and self.encoding:
            problems.append("--encoding: the model brings its own; give it or --model")
        if self.template == "model" and not self.model:
            problems.append("--template: model needs --model")
        if self.val_fraction + self.test_fraction >= 1:
            problems.append(f"--test_fraction: {self.test_fraction} with --val_fraction={self.val_fraction} leaves "
                            "nothing to train on")
        check(self, at_least={"shard_tokens": 1}, fractions=("val_fraction", "test_fraction"), problems=problems,
              choices={"template": ("", "alpaca", "chat", "text", "model")})


# ---- input ----------------------------------------------------------------------------------------------------------

@dataclass
class Report:
    """What became of the records."""
    records: int = 0
    dropped: dict = field(default_factory=dict)  # reason: [how many, where the first one is and what it has]
    unused: Counter = field(default_factory=Counter)  # names of fields: how many records have one
    text: str = "text"  # the name of the field that is learned
    classes: dict = field(default_factory=dict)  # fields beside it: their values, while these are few
    answers: Counter = field(default_factory=Counter)  # how often each, while these are few
    cut: int = 0  # conversations with turns at the end that nobody answered
    several: bool = False  # some conversation has several turns
    kind: str = ""  # of the first record, which all must have: text, prompt or conversation
    prompts: set = field(default_factory=set)  # hashes of those in training, where other splits have their own files
    seen_in_training: Counter = field(default_factory=Counter)  # prompts of val or test that stand there too

    def drop(self, reason, location, detail=""):
        self.dropped.setdefault(reason, [0, f"{location}{detail and ': '}{detail}"])[0] += 1

    def note_unused(self, record, rest, is_text):
        """Counts the fields that were not used; beside a text, their values too."""
        self.unused.update(rest.keys())
        if not is_text:
            return
        self.text = next((name for name in record if name not in rest and not is_missing(record[name])), self.text)
        for name, value in rest.items():
            values = self.classes.setdefault(name, set())
            if not isinstance(value, list | dict) and len(values) <= 50:
                values.add(value)

    def lines(self):
        """What is to be said about them, a line each."""
        lines = []
        if 2 <= len(self.answers) <= 50 and 3 * len(self.answers) <= self.answers.total():
            answers = Counter()
            for answer, count in self.answers.items():
                answers[answer.strip()] += count
            names = ", ".join(f"{answer} ({count:,})" for answer, count in answers.most_common())
            spaced = ", some with more white space" if len(answers) < len(self.answers) else ""
            lines.append(f"{len(answers)} different answers{spaced}: {names}")
        lines += [f"{count:,} dropped: {reason} (first: {first})" for reason, (count, first) in self.dropped.items()]
        if self.cut:
            lines.append(f"{self.cut:,} cut: turns at the end that nobody answered")
        for split, count in self.seen_in_training.items():
            lines.append(f"{count:,} prompts of {split} stand in training too")
        if self.unused:
            names = ", ".join(f"{name} ({count:,} records)" for name, count in self.unused.most_common())
            lines.append(f"not used: {names}")
        for name, values in self.classes.items():
            if 2 <= len(values) <= 50 and 3 * len(values) <= self.unused[name] and not set(name) & set('{}"$`'):
                formats = f'--prompt_format="{{{self.text}}}\\n{name}:" --response_format=" {{{name}}}"'
                lines.append(f"to classify by {name}, add {formats}")
        return lines


def files_of(config):
    """{split: paths}: the files of the records; "" is the split that a hash of the prompt decides."""
    if not config.input:
        return {"": [Path(__file__).parent / "data" / "demo.jsonl"]}
    flags = {"": "input", "val": "val_input", "test": "test_input"}
    files = {split: paths_of(flag, getattr(config, flag)) for split, flag in flags.items() if getattr(config, flag)}
    held_out = {*files.get("val", ()), *files.get("test", ())}
    files[""] = [path for path in files[""] if path not in held_out] or files[""]
    named = [path.name for path in files[""] if re.match("(test|valid|validation|val|dev|eval)[^a-z]", path.name, re.I)]
    if named and len(files[""]) > 1:
        print(f"{', '.join(named)[:100]} is trained on, too; --test_input and --val_input hold out files")
    return files


def tokens_of(config, head):
    """(encoding, spec, directory, context): how text becomes tokens, by the flags or as the model that --model names
    has it; the directory with the model's tokenizer, or ''; its context in tokens. `head`: the first records."""
    name, template, directory, context = config.encoding or "gpt2", "alpaca", "", 1024
    if config.model:
        path = locate(config.model)
        base = base_of(path) if path.name == "adapter_config.json" else path
        family, values = read_config(base.parent / "config.json")
        context = values["block_size"]
        directory = path.parent if (path.parent / "tokenizer.json").is_file() else base.parent  # peft leaves it there
        if (directory / "tokenizer.json").is_file():
            name = "tokenizer.json"
            template = "model" if read_chat_template(directory) else "alpaca"
        elif family != "gpt2" or has_other_vocabulary(directory):
            raise UserError(f"--model={config.model} has no tokenizer.json; put the model's beside its weights")
    elif not config.input:
        name, template = config.encoding or "bytes", "chat"
    if config.template == "model" != template:
        raise UserError(f"--template=model: {config.model} brings no chat template; take alpaca or chat")
    spec = {"template": config.template or template}
    for flag in ("prompt_format", "response_format"):  # a shell leaves \n as two characters
        spec[flag] = getattr(config, flag).replace("\\n", "\n").replace("\\t", "\t")
    if spec["template"] == "alpaca" and not config.template and hold_conversations(head, spec):
        spec["template"] = "chat"
    return templates.get_encoding(name, directory), spec, directory, context


def hold_conversations(records, spec):
    """Whether the first of these located records that can be used needs chat: turns, a system prompt or a history."""
    for _, record in records:
        with contextlib.suppress(Unusable):
            messages, _ = to_messages(record, spec)
            return messages[-1].role in ("user", "assistant") and len(messages[0].fields) == 1
    return False


# ---- encoding -------------------------------------------------------------------------------------------------------

def parts_of(location, text, config):
    """{split: located records} of a single document: its end is held out."""
    n_test, n_val = round(len(text) * config.test_fraction), round(len(text) * config.val_fraction)
    n_train = len(text) - n_val - n_test
    parts = {"train": text[:n_train], "val": text[n_train:n_train + n_val], "test": text[n_train + n_val:]}
    return {split: [(location, {"text": part})] for split, part in parts.items() if part}


def answered_part(messages):
    """The messages up to the last answer; Unusable where nothing is asked or answered."""
    asked, answers, stop = [], [], 0
    for number, (role, fields, learned) in enumerate(messages, 1):
        if role in ("user", "prompt"):
            asked += fields.values()
        elif role != "system":
            stop = number
            if learned:
                answers += fields.values()
    if asked and all(map(is_missing, asked)):
        raise Unusable("no question")
    if not answers or any(map(is_missing, answers)):
        remedy = "if its field has another name, give --prompt_format and --response_format"
        raise Unusable("no answer", "it is empty" if answers else remedy)
    return messages[:stop]


def share_of(messages, seed):
    """A number in [0, 1) that depends on the seed and on what is asked, and not on its wording: on all texts before the
    first learned answer to a question or, where nothing is asked, on the text itself."""
    asked, texts = False, [str(seed)]
    for message in messages:
        if asked and message.learned and message.role in ("assistant", "completion"):
            break
        texts.append(message.text())
        asked |= message.role in ("user", "prompt") and texts[-1] != ""
    share = hashlib.blake2b("\0".join(texts).encode(), digest_size=8).digest()
    return int.from_bytes(share, "big") / 2**64


def encode_records(records, split, spec, config, encoding, report):
    """Yields (split, record, messages, examples) for each located record that stays."""
    seen, too_long = set(), f"longer than --block_size={config.block_size}"
    for location, record in records:
        report.records += 1
        if report.records % 2000 == 0:
            status(f"{report.records:,} records")
        try:
            messages, rest = to_messages(record, spec)
            if config.template in ("alpaca", "chat") and not spec["response_format"]:
                messages = templates.as_turns(messages)
            kept = answered_part(messages)
            kind = kept[0].role if kept[0].role in ("text", "prompt") else "conversation"
            report.kind = report.kind or kind
            if kind != report.kind:
                remedy = "" if "text" in (kind, report.kind) else "; --template=chat takes both"
                raise Unusable("not of the kind of the first", f"a {kind} among {report.kind} records{remedy}")
            if len(kept) > config.block_size:  # to render thousands of turns takes minutes
                raise Unusable(too_long)
            segments = templates.render(kept, spec)
            ids, flags = templates.encode(segments, encoding, config.train_on_prompt)
            if len(ids) > config.block_size + 1 and kind != "text":
                raise Unusable(too_long)
        except Unusable as error:
            if config.strict:
                raise UserError(f"{location}: {error}") from None
            report.drop(error.reason, location, error.detail)
            continue
        share = share_of(kept, config.seed)
        digest = hashlib.blake2b(array("I", ids).tobytes() + flags, digest_size=16).digest()
        if digest in seen:
            report.drop("same prompt and answer as before", location)
            continue
        seen.add(digest)
        if len(report.answers) <= 50 and kept[-1].role == "completion":
            report.answers.update(kept[-1].fields.values())
        report.note_unused(record, rest, kind == "text")
        report.cut += len(kept) < len(messages)
        report.several |= sum(message.role == "user" for message in kept) > 1
        own = split or "train"
        if not split and share < config.test_fraction + config.val_fraction:
            own = "test" if share < config.test_fraction else "val"
        if own == "train" and (config.val_input or config.test_input):
            report.prompts.add(share)
        elif split and share in report.prompts:
            report.seen_in_training[split] += 1
        yield own, record, kept, templates.blocks(ids, config.block_size) if kind == "text" else [(ids, flags)]


# ---- output ---------------------------------------------------------------------------------------------------------

def write_shards(parts, work, config, encoding):
    """Writes the shards and test.jsonl of `parts`, (split, record, messages, examples). Returns the counts of each
    split, the examples to show and the first messages."""
    writers = {split: ShardWriter(work, split, encoding.n_vocab, config.shard_tokens) for split in ("train", "val")}
    shown, first, n_test = [], None, 0
    # half a surrogate pair, which a field that is not used may hold, stays the escape that it was
    with open(work / "test.jsonl", "w", encoding="utf-8", errors="backslashreplace") as test_file:
        for split, record, messages, examples in parts:
            first = first or messages
            if split == "test":
                test_file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
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
    """Renames the finished directory into place of an older one. What is not ours there stays."""
    old = work.with_name(work.name + ".old")
    if out_dir.exists():
        out_dir.rename(old)
    work.rename(out_dir)
    for path in old.glob("*"):
        if not OURS.fullmatch(path.name):
            path.rename(out_dir / path.name)
    shutil.rmtree(old, ignore_errors=True)


def check_out_dir(out_dir, paths):
    """UserError where the shards cannot replace what stands at `out_dir`; `paths` are the input."""
    if out_dir.is_file():
        raise UserError(f"--out_dir={out_dir} is a file; name a directory")
    for file in out_dir.glob("*"):
        if not OURS.fullmatch(file.name):
            raise UserError(f"--out_dir={out_dir} holds files that are not ours ({file.name}); name another directory")
    if any(path.resolve().parent == out_dir.resolve() for path in paths):
        raise UserError(f"--out_dir={out_dir} holds the input itself and is written anew; name another directory")


def preview(ids, flags, encoding):
    """The example as text: supervised tokens green on a terminal, between >>> and <<< elsewhere. A backslash stands
    before text that only looks like a special token."""
    on, off, texts = ">>>", "<<<", []
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        on, off = "\033[32m", "\033[0m"
    special = re.compile("|".join(map(re.escape, encoding.special_tokens_set)))
    ids_of = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}

    for supervised, tokens in groupby(zip(ids, flags, strict=True), key=lambda token: token[1] & SUPERVISED):
        texts.append(on if supervised else "")
        for is_special, part in groupby((token for token, _ in tokens), key=ids_of.__contains__):
            text = encoding.decode(list(part))
            texts.append(text if is_special else special.sub(r"\\\g<0>", text))
        texts.append(off if supervised else "")
    return "".join(texts)


def print_report(meta, report, config, out_dir, replaced):
    status("")
    for split in ("train", "val"):
        counts = meta[split]
        share = counts["supervised_tokens"] / max(counts["tokens"], 1)
        print(f"{split:6s}{counts['examples']:10,} examples {counts['tokens']:12,} tokens, {share:6.1%} supervised, "
              f"longest {counts['longest']:,}")
    print(f"test  {meta['test']['examples']:10,} records in {out_dir / 'test.jsonl'}")
    for line in report.lines():
        print(line)
    if not meta["val"]["examples"]:
        remedy = "look at --val_input" if config.val_input else "raise --val_fraction"
        print(f"warning: no validation records, so that the last weights count as the best: {remedy}")
    flags = [f"--data_dir={out_dir}", f"--out_dir=out-{out_dir.name}"]
    command = shlex.join(["python", "train.py", *([] if out_dir == Path("data/demo") else flags)])
    tokens = meta["model"] or f"{meta['encoding']} encoding"
    if replaced:
        print(f"{out_dir} held other data: what was trained on them may have seen this test.jsonl")
    print(f"wrote {out_dir} ({tokens}, {templates.title_of(meta['prompt'])}); next: {command}")


def main(config):
    """Prepares config.input into config.out_dir and returns what meta.json holds."""
    gc.freeze()  # what is loaded by now is never garbage: to walk it again and again takes a fifth of the time
    report, files = Report(), files_of(config)
    paths = [path for own in files.values() for path in own]
    name = os.path.splitext(paths[0].name.removesuffix(".gz"))[0]
    if os.path.isdir(config.input):
        name = Path(config.input).resolve().name
    if config.input.startswith("hf:"):
        name = re.split("[/:,]", config.input)[2]
    out_dir = Path(config.out_dir or Path("data") / name)
    check_out_dir(out_dir, paths)
    config = replace(config, val_fraction=0 if config.val_input else config.val_fraction,
                     test_fraction=0 if config.test_input else config.test_fraction)
    sources = {split: chain.from_iterable(read_records(path, config.text_encoding, config.separator) for path in own)
               for split, own in files.items()}
    head = list(islice(sources[""], 20))
    sources[""] = chain(head, sources[""])
    encoding, spec, directory, context = tokens_of(config, head)
    full_spec = templates.bring_tokenizer(spec, encoding, directory)
    are_texts = all(kind_of(path) == "text" for path in paths)
    if are_texts and (config.response_format or config.template not in ("", "text")):
        raise UserError("--template, --response_format: a .txt file is plain text; leave them out, or name a table "
                        ".csv or .tsv")
    if are_texts and len(head) == 1:
        if "separator" in config.given:
            raise UserError(f"--separator: {config.separator!r} parts no documents in {paths[0].name}; leave it out")
        del sources[""]
        sources = parts_of(head[0][0], head[0][1]["text"], config) | sources
    if not config.block_size:
        config = replace(config, block_size=min(context, 1024) if are_texts else context)
    parts = chain.from_iterable(encode_records(records, split, full_spec, config, encoding, report)
                                for split, records in sources.items())
    # all is written beside out_dir (where that is a link, or ".", beside what it stands for) and renamed at the end
    place = out_dir.resolve()
    work = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        counts, shown, first = write_shards(parts, work, config, encoding)
        if not counts["train"]["examples"]:
            why = "; ".join([f"{report.records} records", *report.lines()]) if report.records else "it is empty"
            raise UserError(f"--input: {paths[0].name} leaves nothing to train on ({why})")
        prompt = {**templates.as_rendered(first, spec), "turns": "several" if report.several else "one"}
        if encoding.name == "tokenizer.json":
            templates.copy_tokenizer(directory, work, full_spec)
        meta = write_meta(work, {
            "format_version": FORMAT_VERSION, "encoding": encoding.name, "vocab_size": encoding.n_vocab,
            "stop": templates.stop_token({**full_spec, **prompt}, encoding), "block_size": config.block_size,
            "model": str(Path(config.model).resolve()) if os.path.exists(config.model) else config.model,
            "seed": config.seed, "source": ",".join(path.name for path in paths), "source_sha256": sha256_of(*paths),
            "prompt": prompt, **counts})
        held = place / "meta.json"
        replaced = held.is_file() and held.read_bytes() != (work / "meta.json").read_bytes()
        publish(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print_report(meta, report, config, out_dir, replaced)
    for ids, flags in shown:
        print(f"\n{preview(ids, flags, encoding)}")
    return meta


if __name__ == "__main__":
    run(main, PrepareConfig)
