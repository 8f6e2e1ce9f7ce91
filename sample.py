"""Uses a trained model: answers a prompt, chats, scores a file, or exports.

    python sample.py                                 # chat with out/
    python sample.py --prompt="Name three colours."  # one answer
    python sample.py --file=data/mine/test.jsonl     # answer and score records
    python sample.py --model=gpt2,out --file=...     # two models side by side
    python sample.py --export=my-model               # for transformers
"""
import contextlib
import copy
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import tiktoken
import torch

from model import GPT
from nanosft import llamacpp, templates
from nanosft.chat_template import read_chat_template
from nanosft.console import UserError, status
from nanosft.device import keep_freed_memory, pick_device, pick_dtype
from nanosft.files import atomic_file, read_json, write_json
from nanosft.flags import check, run
from nanosft.hub import base_of, base_trained_on, locate
from nanosft.records import NAME, Message, columns_of, take, text_of, to_messages, whole
from nanosft.score import classify, label_set, score, summary
from nanosft.shards import load_meta
from nanosft.sources import UNREADABLE, open_text, paths_of, read_records
from nanosft.tokenizer import has_other_vocabulary
from nanosft.weights import PADDING


@dataclass(frozen=True)
class SampleConfig:
    # model
    model: str = "out"  # an out_dir of train.py, a Hugging Face directory, owner/name, or gpt2 ...; several with commas
    data_dir: str = ""  # prepared data whose template to use; '' = the model's: stored with it, or its own, or none
    # what to answer
    prompt: str = ""  # one prompt, or a JSON object for records of several columns; of a text: how it begins; '' = chat
    prompt_file: str = ""  # a file that holds the prompt
    input: str = ""  # Alpaca's input to the prompt
    system: str = ""  # system prompt, for a template that has one
    answer: str = ""  # a half-written answer to go on with
    file: str = ""  # records to answer (as prepare_data.py reads them) and, where they hold an answer, to score
    text_encoding: str = ""  # of those files that are not UTF-8, say cp1252; UTF-16 is seen where it is
    labels: str = ""  # for classification: classes, with commas ("a, b" is one); '' = its answers, where they are few
    output: str = "answers.jsonl"  # where --file writes its records as JSON lines, each with its response
    export: str = ""  # write the model, LoRA merged: a directory for transformers, or a file.gguf for llama.cpp, Ollama
    gguf_type: str = "f16"  # of matrices in a .gguf: f16 | f32 | bf16 | q8_0
    # how
    temperature: float = 0.0  # 0 = always the most likely token; 1 = drawn as the model has it
    top_k: int = 0  # draw from the k most likely tokens; 0 = all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability
    repetition_penalty: float = 1.0  # above 1: tokens that have been there become less likely
    stop: str = ""  # text that ends an answer, too, such as "\n"
    max_new_tokens: int = 256  # longest answer in tokens; by default a class has 4 more than the longest label at most
    num_samples: int = 1  # answers to one prompt
    seed: int = 1337  # of the draws
    # machine
    batch_size: int = 32  # records answered at a time; more take more memory
    device: str = ""  # cpu | cuda | mps; '' = the best there is
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16

    def __post_init__(self):
        problems = []
        if not (self.temperature == 0 or 1e-6 <= self.temperature < math.inf):
            problems.append(f"--temperature: {self.temperature} is neither 0 nor a number from 1e-6 on")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p: {self.top_p} is not in (0, 1]")
        if not 0.01 <= self.repetition_penalty <= 100:
            problems.append(f"--repetition_penalty: {self.repetition_penalty} is not in [0.01, 100]; 1 changes nothing")
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.num_samples > 1):
            problems.append("--temperature: at 0 the likeliest token is taken; give 1 with --top_k, --top_p or "
                            "--num_samples")
        if self.file and (self.prompt or self.prompt_file or self.input or self.answer or self.num_samples > 1):
            problems.append("--file: gets one whole answer a record; leave out --prompt, --prompt_file, --input, "
                            "--answer and --num_samples")
        if self.prompt and self.prompt_file:
            problems.append("--prompt_file: holds the prompt; leave out --prompt")
        if self.labels and not self.file:
            problems.append("--labels: for the records of --file; give that")
        if self.export and len(names_of(str(self.model))) > 1:
            problems.append("--export: writes one model; name one with --model")
        object.__setattr__(self, "stop", str(self.stop).replace("\\n", "\n").replace("\\t", "\t"))
        check(self, at_least={"max_new_tokens": 1, "num_samples": 1, "batch_size": 1}, fractions=(),
              choices={"dtype": ("auto", "float32", "bfloat16", "float16", "float64"), "gguf_type": llamacpp.TYPES},
              problems=problems)


def names_of(models):
    """The models that --model names; a path may have a comma."""
    return [models] if Path(models).exists() else list(filter(None, map(str.strip, models.split(",")))) or [models]


@dataclass
class LoadedModel:
    """A model with what it needs to be asked. `spec`: the wording that it was trained with; template "": none."""
    name: str
    model: GPT
    encoding: tiktoken.Encoding
    spec: dict
    directory: Path | str  # of its tokenizer, if it has one of its own

    def __post_init__(self):
        self.stop = templates.stop_token(self.spec, self.encoding)

    def is_chat(self):
        return self.spec["template"] in ("chat", "model") and not self.spec["response_format"]

    def keeps_turns(self):
        return self.is_chat() and (self.spec["template"] == "model" or self.spec.get("turns") != "one")

    def prompt(self, messages):
        """The segments that stand before the answer, by the renderer that made the training data."""
        return templates.render(as_trained(messages, self.spec), self.spec)

    def prompt_ids(self, messages):
        return templates.encode(self.prompt(messages), self.encoding)[0]

    def generate(self, prompts, config):
        """Yields, step by step, a list with the next id of each row's answer; None after its end."""
        return self.model.generate(prompts, config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                                   self.stop, self.encoding.n_vocab, config.repetition_penalty)

    def read(self, ids, stop_text):
        """(text, ended) of an answer's ids so far: what stands before stop_text, and whether that or the stop came."""
        made = templates.decode([token for token in ids if token not in (None, self.stop)], self.encoding)
        text = made.partition(stop_text)[0] if stop_text else made
        return text, self.stop in ids or text != made


def stored_spec(path):
    """What prompt.json beside a weights file says, or None."""
    stored = path.parent / "prompt.json"
    if not stored.exists():
        return None
    spec = read_json(stored)
    for name in ("template", "prompt_format", "response_format", "encoding"):
        if not isinstance(spec.get(name), str):
            raise UserError(f"{stored}: {name} is {spec.get(name)!r}, no text; remove it and give --data_dir")
    if spec["template"] not in ("", "alpaca", "chat", "text", "model"):
        raise UserError(f"{stored}: no template is called {spec['template']!r}; remove it and give --data_dir")
    return spec


def load_model(path, dtype, bases):
    """The model of a weights file. `bases` keeps those that are loaded: adapters over one base share its memory."""
    if path.name != "adapter_config.json":
        bases[path] = bases.get(path) or GPT.from_pretrained(path, dtype=dtype)
        return bases[path]
    model = load_model(base_trained_on(path), dtype, bases)
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared).load_adapter(path.parent)


def load(config):
    """A LoadedModel for every model that is named."""
    if config.model == SampleConfig.model and not Path(config.model).exists():
        raise UserError("--model=out: nothing is trained there yet; run python train.py first, or name a model")
    # an export is written as it was trained, whatever this machine computes in
    device = pick_device("cpu" if config.export else config.device)
    dtype = pick_dtype("float32" if config.export else config.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    names = names_of(config.model)
    paths = [locate(name) for name in names]
    if config.data_dir:
        meta = load_meta(config.data_dir)
        words = [({**meta["prompt"], "encoding": meta["encoding"]}, Path(config.data_dir))] * len(names)
    else:
        words = [(stored_spec(path), path.parent) for path in paths]
    # a plain model beside a trained one is asked in the trained one's words
    trained = next((pair for pair in words if pair[0]), None)
    models, bases = [], {}
    for name, path, pair in zip(names, paths, words, strict=True):
        spec, directory = pair if pair[0] else trained or pair
        is_foreign = directory != path.parent  # the words are another model's, or come with data
        if path.name == "adapter_config.json" and not (directory / "tokenizer.json").is_file():
            directory = base_of(path).parent  # peft leaves the tokenizer with the base
        if spec is None:  # a model of others', asked in its own words, or raw
            own = "tokenizer.json" if (directory / "tokenizer.json").is_file() else "gpt2"
            template = "model" if own != "gpt2" and read_chat_template(directory) else ""
            spec = {"template": template, "prompt_format": "", "response_format": "", "encoding": own}
        encoding = templates.get_encoding(spec["encoding"], directory)
        model = load_model(path, dtype, bases)
        if not spec["template"] and encoding.name == "gpt2" and model.config.rope_theta:
            raise UserError(f"--model={name} has no tokenizer.json; put the model's into {directory}")
        spec = templates.bring_tokenizer(spec, encoding, directory)
        # one in foreign words that has far more tokens has others
        if not 0 <= model.config.vocab_size - encoding.n_vocab < (PADDING if is_foreign else math.inf):
            remedy = "ask it alone, without one" if is_foreign else f"put the model's tokenizer.json into {directory}"
            raise UserError(f"--model={name} has {model.config.vocab_size} token ids, the {encoding.name} encoding "
                            f"{encoding.n_vocab}: give the --data_dir that it was trained on, or {remedy}")
        vocabulary = directory if encoding.name == "tokenizer.json" else ""
        if path.parent != vocabulary and has_other_vocabulary(path.parent, vocabulary):
            raise UserError(f"--model={name} has a vocabulary of its own, not that of {directory}: ask it alone, with "
                            "its tokenizer.json beside its weights")
        models.append(LoadedModel(name, model.to(device, dtype).eval(), encoding, spec, directory))
        if config.system and not models[-1].is_chat():
            raise UserError(f"--system: {name} ({templates.title_of(spec)}) was trained without one; leave it out")
    return models


# ---- prompts and chat -----------------------------------------------------------------------------------------------

def prompt_messages(text, config, spec):
    """What a person types, as the messages of a record that lacks its answer."""
    columns = columns_of(spec["prompt_format"])
    if len(columns) < 2:
        system = [Message("system", {"content": whole(config.system, "--system")})] if config.system else []
        fields = {"content": whole(text, "--prompt"), "input": whole(config.input, "--input")}
        return [*system, Message("user", fields)]
    try:
        return to_messages(json.loads(text), spec, answered=False)[0][:1]
    except (ValueError, RecursionError):
        example = ", ".join(f'"{name}": "..."' for name in columns)
        raise UserError(f"--prompt: this model reads the columns {', '.join(columns)}; give a JSON object, "
                        f"'{{{example}}}'") from None


def stream(loaded, prompt, config, opening=""):
    """Prints the answer to one prompt as it is made, after `opening`, whole characters only; returns its text."""
    if len(names_of(config.model)) > 1:
        print(f"{loaded.name}: ", end="")
    ids, text, shown, ended = [], "", 0, False
    if config.answer:  # half an answer, to go on with
        *before, (half, _), _ = templates.render_answer(whole(config.answer, "--answer"), loaded.spec)
        half = half.removesuffix(templates.around_answer(loaded.spec)[1])
        prompt = prompt + templates.encode([*before, (half, True)], loaded.encoding)[0]
    print(opening + config.answer, end="", flush=True)
    for (token,) in loaded.generate([prompt], config):
        ids.append(token)
        text, ended = loaded.read(ids, config.stop)
        # half a character waits, and so does what may be the beginning of --stop
        sure = len(text) if ended else max(shown, len(text.rstrip("\ufffd")) - max(0, len(config.stop) - 1))
        print(text[shown:sure], end="", flush=True)
        shown = sure
        if ended:
            break
    print(text[shown:], flush=True)
    if not ended and len(ids) < config.max_new_tokens:
        print(f"(cut: the context of {loaded.model.config.block_size:,} tokens is full)")
    elif not ended and "max_new_tokens" not in config.given:
        print(f"(cut after {config.max_new_tokens} tokens: --max_new_tokens)")
    return config.answer + text


def reply(loaded, text, turns, config):
    """Prints the answer to `text`. `turns`: the earlier messages. A model that learned conversations of several turns
    goes on with them; the oldest are dropped when the context is full."""
    context, messages = loaded.model.config.block_size, prompt_messages(text, config, loaded.spec)
    system, turn = messages[:-1], messages[-1:]
    longest = context - min(config.max_new_tokens, context // 4)
    prompt = loaded.prompt_ids(messages)
    if len(prompt) <= context:  # else it is refused, and nothing is forgotten for it
        while turns and len(loaded.prompt_ids([*system, *turns, *turn])) > longest:
            del turns[:2]
            print("(the context is full: the oldest turn is forgotten)")
        prompt = loaded.prompt_ids([*system, *turns, *turn])
    answer = stream(loaded, prompt, config)
    if loaded.keeps_turns():
        before, after = templates.around_answer(loaded.spec)  # what the template writes there, it will write again
        turns += [*turn, Message("assistant", {"text": answer.removeprefix(before).removesuffix(after)})]


def chat(models, config):
    """Answers prompts until the input ends."""
    with contextlib.suppress(ImportError):  # Windows edits lines by itself
        import readline  # noqa: F401
    alone = "" if any(loaded.keeps_turns() for loaded in models) else ", each answered by itself"
    for loaded in models:
        context = loaded.model.config.block_size
        print(f"{loaded.name}: {templates.title_of(loaded.spec)}, a context of {context:,} tokens")
        columns = columns_of(loaded.spec["prompt_format"])
        if len(columns) > 1:
            print(f"It reads JSON objects with the columns {', '.join(columns)}.")
    print(f"Type a prompt{alone}; Ctrl-D (Windows: Ctrl-Z) ends the chat.", flush=True)
    turns = [[] for _ in models]
    while True:
        try:
            text = input("> ")
        except EOFError:
            return print()
        if not text.strip():
            continue
        for loaded, earlier in zip(models, turns, strict=True):
            try:
                reply(loaded, text, earlier, config)
            except UserError as error:  # a prompt that is too long
                print(error)


# ---- files of records -----------------------------------------------------------------------------------------------

def as_trained(messages, spec):
    """Messages that ask for an answer, in the words that the model was trained on."""
    columns, asked = columns_of(spec["prompt_format"]), messages[-1]
    if spec["template"] in ("alpaca", "chat", "model") and not spec["response_format"]:
        return [*messages[:-1], Message("user", {"content": asked.text()})] if asked.role == "prompt" else messages
    if len(messages) > 1:
        raise UserError("this model answers one question, without a system prompt or earlier turns")
    if spec["template"] == "text":
        return [Message("opening", {"text": asked.text()})]
    if list(asked.fields) == columns:
        return messages
    if len(columns) > 1:
        raise UserError(f"this model reads the columns {', '.join(columns)}; give records that have them")
    return [Message("prompt", dict.fromkeys(columns or ["text"], asked.text()))]


def read_prompts(records, loaded, config):
    """(prompts as ids, reference answers, None where a record has none) of located records."""
    prompts, references, spec = [], [], loaded.spec
    for location, record in records:
        try:
            messages, rest = to_messages(record, spec, answered=False)
            reference = None
            if messages[-1].role in ("assistant", "completion"):
                reference = next(iter(messages.pop().fields.values())) or None
            elif spec["response_format"]:  # its answer may stand under another name
                name, answer = take(rest, "answer")
                reference = text_of(answer, name) if name else None
            if not messages or messages[0].role == "text":
                raise UserError("nothing is asked before the answer; give each record a prompt")
            if config.system and messages[0].role != "system":
                messages.insert(0, Message("system", {"content": config.system}))
            prompts.append(loaded.prompt_ids(messages))
            references.append(reference)
        except UserError as error:
            by_data = "; or give the --data_dir that was made of such records" if "unknown kind" in str(error) else ""
            raise UserError(f"{location}: {error}{by_data}") from None
    return prompts, references


def answer_all(loaded, prompts, config):
    """The answers to all prompts as texts, in batches of like length; None where a prompt is too long."""
    context, answers, cut = loaded.model.config.block_size, [None] * len(prompts), Counter()
    order = sorted((i for i, prompt in enumerate(prompts) if len(prompt) <= context), key=lambda i: len(prompts[i]))
    if len(order) < len(prompts):
        print(f"{len(prompts) - len(order)} of {len(prompts)} prompts are longer than the context of {context} tokens")
    for start in range(0, len(order), config.batch_size):
        batch = order[start:start + config.batch_size]
        steps = []  # each a token a row, or None after its end
        for tokens in loaded.generate([prompts[i] for i in batch], config):
            steps.append(tokens)
            if config.stop and all(loaded.read(ids, config.stop)[1] for ids in zip(*steps, strict=True)):
                break
        for i, ids in zip(batch, zip(*steps, strict=True), strict=True):
            answers[i], ended = loaded.read(ids, config.stop)
            if not ended:
                is_full = len(steps) < config.max_new_tokens or None in ids
                cut["by the context" if is_full else f"after {config.max_new_tokens} tokens (--max_new_tokens)"] += 1
        done = start + len(batch)
        status(f"{done:,} of {len(order):,} answered", end=done == len(order))
    for limit, count in cut.items():
        print(f"{count:,} of {len(prompts):,} answers were cut {limit}")
    return answers


def put(records, key, values):
    """Gives each of the located records a field, under a name of its own."""
    if any(key in record for _, record in records):
        print(f"the records have a {key!r} of their own: the model's stands under \"model's {key}\"")
        key = f"model's {key}"
    for (_, record), value in zip(records, values, strict=True):
        record[key] = value


def answer_file(models, config):
    """Answers every record with every model, writes the records with their responses, and scores them."""
    if Path(config.output).exists() and not Path(config.output).is_file():  # a directory, /dev/null
        raise UserError(f"--output={config.output} is no plain file; name a file")
    paths = paths_of("file", config.file)
    if Path(config.output).resolve() in [path.resolve() for path in paths]:
        raise UserError(f"--output={config.output} is a file to read; name another")
    found = chain.from_iterable(read_records(path, config.text_encoding) for path in paths)
    records = [(location, {"messages": record} if isinstance(record, list) else record) for location, record in found]
    if not records:
        raise UserError(f"--file: {config.file} holds no records; give one that does")
    results = {}
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(config.output) as file:  # opened first: what cannot be written is known before the work
        for number, loaded in enumerate(models, 1):
            of, mark = "", ""
            if len(models) > 1:
                of, mark = f" of {loaded.name}", f"-{number}"
                print(f"{loaded.name}:")
            if not loaded.spec["template"]:
                print(f"{loaded.name} has no template of its own: the prompts go raw (--data_dir names one)")
            prompts, references = read_prompts(records, loaded, config)
            labels, likeliest, limit = label_set(references, config.labels, loaded), [], config.max_new_tokens
            if labels and "max_new_tokens" not in config.given:
                limit = min(limit, 3 + max(map(len, labels.values())))
            responses = answer_all(loaded, prompts, replace(config, max_new_tokens=limit))
            put(records, f"response{of}", responses)
            if labels:
                likeliest = classify(loaded, prompts, labels)
                put(records, f"likeliest label{of}", [label.strip() for label in likeliest])
            picture = Path(config.output).with_suffix(f".confusion{mark}.png")
            results[loaded.name] = score(responses, references, labels, likeliest, picture)
        for _, record in records:  # half a surrogate pair, which a field may hold, stays the escape that it was
            file.write((json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace"))
    print(f"wrote {config.output}")
    summary(results)
    return results if len(models) > 1 else results[models[0].name]


def export(loaded, directory, gguf_type):
    """Writes weights (LoRA merged), configurations and tokenizer for transformers; or one GGUF file with all that."""
    directory = Path(directory)
    if directory.suffix.lower() == ".gguf":
        return llamacpp.write_gguf(directory, loaded, gguf_type)
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"--export={directory} holds files already; name another directory")
    loaded.model.config.eos_token_id = loaded.stop  # of a padded vocabulary it is not the last id
    loaded.model.merge_lora().save_pretrained(directory)
    if loaded.spec["template"]:
        kept = loaded.spec.keys() & {"template", "prompt_format", "response_format", "turns", "encoding"}
        write_json(directory / "prompt.json", {name: loaded.spec[name] for name in sorted(kept)})
    templates.copy_tokenizer(loaded.directory, directory, loaded.spec)
    wording, has_tokenizer = loaded.spec["prompt_format"], (directory / "tokenizer.json").is_file()
    if has_tokenizer and loaded.spec["template"] in ("chat", "model") and wording and not NAME.fullmatch(wording):
        print(f"its chat template does not word questions: give each as in {wording!r}")
    print(f"wrote {directory}: {', '.join(sorted(path.name for path in directory.iterdir()))}")


def main(config):
    """Answers config.prompt, config.file or a chat, or exports; returns the answers' texts or a file's scores."""
    models = load(config)
    torch.manual_seed(config.seed)
    if config.export:
        return export(models[0], config.export, config.gguf_type)
    if config.file:
        return answer_file(models, config)
    prompt, answers = config.prompt, []
    if config.prompt_file:
        try:
            with open_text(Path(config.prompt_file), config.text_encoding, newline=None) as file:
                prompt = file.read().removesuffix("\n")
        except UNREADABLE as error:
            raise UserError(f"--prompt_file: {error}; save it as UTF-8, or give --text_encoding=cp1252") from None
        if not prompt:
            raise UserError(f"--prompt_file={config.prompt_file} is empty; write the prompt there")
    if not prompt and not all(loaded.spec["template"] == "text" for loaded in models):
        return chat(models, config)
    for loaded in models:
        ids = loaded.prompt_ids(prompt_messages(prompt, config, loaded.spec))
        opening = prompt if loaded.spec["template"] == "text" else ""  # a text is shown whole
        for number in range(1, config.num_samples + 1):
            if config.num_samples > 1:
                print(f"--- {number} of {config.num_samples} ---")
            answers.append(stream(loaded, ids, config, opening))
    return answers


if __name__ == "__main__":
    run(main, SampleConfig)
