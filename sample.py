"""Uses a trained model: answers a prompt, chats, answers and scores a file of records, or exports.

    python sample.py                                          # chat with the model in out/
    python sample.py --prompt="Name three colours."           # one answer
    python sample.py --file=data/instruction-data/test.jsonl  # answer the held-out records and count exact matches
    python sample.py --model=gpt2,out --file=...              # before against after, side by side
    python sample.py --export=my-model                        # plain weights and tokenizer for transformers
"""
import codecs
import contextlib
import copy
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from itertools import chain, compress
from pathlib import Path

import torch

from config import parse_config
from console import UserError, require, run, status, typed
from cpu import keep_freed_memory
from dataset import load_meta
from model import GPT
from prepare_data import alpaca_prompt, encode, get_encoding, render
from records import NAME, read_records, sha256_of, to_messages
from score import classify, confusion, label_set, score, summary
from train import pick_device, pick_dtype
from weights import atomic_file, base_of, locate, read_json, tokenizer_files


@dataclass(frozen=True)
class SampleConfig:
    # model
    model: str = "out"  # an out_dir of train.py, a Hugging Face directory, or gpt2 ... gpt2-xl; several with commas
    adapter: str = ""  # LoRA adapters over one --model, several with commas: each answers, side by side
    data_dir: str = ""  # prepared data whose template to use; '' = the one stored with the model, else plain text
    # what to answer
    prompt: str = ""  # one prompt, or a JSON object for records of several columns; '' = chat
    input: str = ""  # Alpaca's input to the prompt
    system: str = ""  # system prompt, for the chat template
    answer: str = ""  # a half-written answer to go on with
    file: str = ""  # records to answer (as prepare_data.py reads them) and, where they hold an answer, to score
    labels: str = ""  # for classification: the classes, with commas; '' = the file's answers, where they are few
    output: str = "answers.jsonl"  # where --file writes its records, each with its response
    export: str = ""  # write the model into this directory for transformers, LoRA merged
    # how
    temperature: float = 0.0  # 0 = always the most likely token
    top_k: int = 0  # draw from the k most likely tokens; 0 = all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability
    max_new_tokens: int = 256  # longest answer
    num_samples: int = 1  # answers to one prompt
    seed: int = 1337  # of the draws
    # machine
    batch_size: int = 32  # records answered at a time: memory, never the answers
    device: str = ""  # cpu | cuda | mps; '' = the best there is
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16

    def __post_init__(self):
        typed(self)
        require(**{name: getattr(self, name) < 1 and f"{getattr(self, name)} is below 1"
                   for name in ("max_new_tokens", "num_samples", "batch_size")},
                temperature=not (self.temperature == 0 or 1e-6 <= self.temperature < float("inf"))
                and f"{self.temperature} is neither 0 nor a number from 1e-6 on",
                seed=not 0 <= self.seed < 2**63 and f"{self.seed} is not in [0, 2^63)",
                top_k=self.top_k < 0 and f"{self.top_k} is below 0",
                top_p=not 0 < self.top_p <= 1 and f"{self.top_p} is not in (0, 1]",
                adapter=bool(self.adapter) and "," in self.model and "needs one --model, not several",
                dtype=self.dtype not in ("auto", "float32", "bfloat16", "float16", "float64")
                and f"{self.dtype!r} is none of auto, float32, bfloat16, float16")


# ---- models ---------------------------------------------------------------------------------------------------------

@dataclass
class Voice:
    """A model with what it needs to be asked. The spec words prompts as in training; None: it goes on with text."""
    name: str
    model: GPT
    encoding: object
    spec: dict | None

    def prompt_ids(self, messages):
        """The ids that stand before the answer, by the renderer that made the training data."""
        if self.spec is None:
            return self.encoding.encode_ordinary(messages[-1][1]["content"]) or [self.encoding.eot_token]
        return encode(render(messages, self.spec), self.encoding)[0]

    def generate(self, prompts, config):
        """Yields, step by step, a list with the next id of each row's answer; None from its stop on."""
        generator = torch.Generator(self.model.wte.weight.device).manual_seed(config.seed)
        for ids in self.model.generate(prompts, config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                                       self.encoding.eot_token, self.encoding.n_vocab, generator):
            yield [None if token == self.encoding.eot_token else token for token in ids]


def stored_spec(path, base=None):
    """What prompt.json beside a weights file says, or None; UserError where an adapter was trained on other weights
    than the base, its own if none is given."""
    stored = path.parent / "prompt.json"
    spec = read_json(stored) if stored.exists() else None
    for name in ("template", "prompt_format", "response_format", "encoding") if spec is not None else ():
        if not isinstance(spec.get(name), str):
            raise UserError(f"{stored}: {name} is {spec.get(name)!r}, no text; put back the file that train.py wrote, "
                            "or remove it and give --data_dir")
    if path.name == "adapter_config.json" and spec and spec.get("base_sha256"):
        base = locate(base or base_of(path))
        if sha256_of(base) != spec["base_sha256"]:
            raise UserError(f"{path.parent} was trained on other weights than {base} holds; name those")
    return spec


def load(config):
    """One Voice for every model or adapter that is named; adapters share the weights of their base."""
    if config.model == SampleConfig.model and not config.adapter and not Path(config.model).exists():
        raise UserError("--model=out: nothing is trained there yet; run python train.py first, or name a model")
    device, voices = pick_device(config.device), []
    dtype = pick_dtype(config.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    names = config.adapter.split(",") if config.adapter else config.model.split(",")
    paths = [locate(name) for name in names]
    specs = [stored_spec(path, config.model if config.adapter and config.model != SampleConfig.model else None)
             for path in paths]
    if config.data_dir:
        meta = load_meta(config.data_dir)
        specs = [{**meta["prompt"], "encoding": meta["encoding"]}] * len(names)
    elif len(names) > 1:  # a plain model beside a trained one is asked in the trained one's words
        specs = [spec or next(filter(None, specs), None) for spec in specs]
    if config.adapter:
        for name in (name for name, path in zip(names, paths, strict=True) if path.name != "adapter_config.json"):
            raise UserError(f"--adapter: {name} holds no adapter; name it with --model")
        own = config.model if config.model != SampleConfig.model else base_of(paths[0])
        base = GPT.from_pretrained(own).to(device, dtype)
    for name, path, spec in zip(names, paths, specs, strict=True):
        if config.adapter:
            shared = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
            model = shared.load_adapter(path.parent)
        else:
            model = GPT.from_pretrained(name).to(device, dtype)
        encoding = get_encoding(spec["encoding"] if spec else "gpt2")
        if model.config.vocab_size < encoding.n_vocab:
            raise UserError(f"--model={name} has {model.config.vocab_size} token ids, the {encoding.name} encoding "
                            f"{encoding.n_vocab}: give the --data_dir that it was trained on")
        voices.append(Voice(name, model.eval(), encoding, spec))
    if config.system and any(voice.spec is None or voice.spec["template"] != "chat" for voice in voices):
        raise UserError("--system: only the chat template has a system prompt")
    return voices


# ---- prompts and chat -----------------------------------------------------------------------------------------------

def prompt_messages(text, given, spec):
    """What a person types, as the messages of a record that lacks its answer."""
    columns = NAME.findall(spec["prompt_format"]) if spec else []
    if spec and spec["template"] == "text":
        return [("opening", {"text": text})]
    if spec and spec["response_format"] and not columns:
        return [("prompt", {})]  # these answers have no prompt
    if not columns:
        return [("user", {"content": text, "input": given})]
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if len(columns) == 1 and not (isinstance(record, dict) and columns[0] in record):
        return to_messages({columns[0]: text}, spec, answered=False)
    if not isinstance(record, dict) or not set(columns) <= record.keys():
        raise UserError(f"--prompt: this model reads the columns {', '.join(columns)}; give a JSON object, "
                        f"""'{{{", ".join(f'"{name}": "..."' for name in columns)}}}'""")
    return to_messages(record, spec, answered=False)


def stream(voice, prompt, config):
    """Prints the answer to one prompt as it is made, whole characters only; returns its ids."""
    decoder, answer = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    print(config.answer, end="", flush=True)
    started = voice.encoding.encode_ordinary(config.answer)
    for (token,) in voice.generate([prompt + started], config):
        if token is not None:
            answer.append(token)
            print(decoder.decode(voice.encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    return started + answer


class Conversation:
    """The turns so far, as token ids. A model that learned conversations of several turns keeps them, and the oldest
    whole turns are dropped when the context is full; others answer every prompt by itself."""

    def __init__(self, voice, system):
        self.voice, self.system, self.exchanges = voice, [], []
        self.keeps = (voice.spec is not None and voice.spec["template"] == "chat" and not voice.spec["prompt_format"]
                      and voice.spec.get("turns") != "one")
        if system:
            nothing = ("user", {"content": ""})
            both = voice.prompt_ids([("system", {"content": system}), nothing])
            self.system = both[:-len(voice.prompt_ids([nothing]))]

    def reply(self, text, config):
        turn, context = self.voice.prompt_ids(prompt_messages(text, config.input, self.voice.spec)), (
            self.voice.model.config.block_size)
        room, before = min(config.max_new_tokens, context // 4), len(self.exchanges)
        while self.exchanges and len(self.system) + sum(map(len, self.exchanges)) + len(turn) + room > context:
            self.exchanges.pop(0)
        if len(self.exchanges) < before:
            print(f"(the context is full: the oldest {before - len(self.exchanges)} turns are forgotten)")
        answer = stream(self.voice, [*self.system, *chain.from_iterable(self.exchanges), *turn], config)
        self.exchanges += [turn + answer] if self.keeps else []


def chat(voices, config):
    """Answers prompts until the input ends."""
    conversations = [Conversation(voice, config.system) for voice in voices]
    with contextlib.suppress(ImportError):  # Windows edits lines by itself
        import readline  # noqa: F401
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    alone = ", each answered by itself" * (not any(conversation.keeps for conversation in conversations))
    print(f"Type a prompt{alone}; Ctrl-D (Windows: Ctrl-Z) ends the chat.", flush=True)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return print()
        for conversation in conversations if text.strip() else ():
            print(f"{conversation.voice.name}: " * (len(voices) > 1), end="")
            try:
                conversation.reply(text, config)
            except UserError as error:
                print(error)


# ---- files of records -----------------------------------------------------------------------------------------------

def read_prompts(path, voice, system):
    """(records, prompts as ids, reference answers, None where a record has none) of a file."""
    records, prompts, references = [], [], []
    if not path.is_file():
        raise UserError(f"--file: {path} is not there; prepare_data.py leaves the held-out records in test.jsonl")
    for place, record in read_records(path, path.name):
        try:
            messages, reference = to_messages(record, voice.spec, answered=False), None
            if messages[0][0] == "text":
                raise UserError("a plain text has no prompt to answer; --prompt goes on with one")
            if messages[-1][0] in ("assistant", "completion"):
                reference = next(iter(messages.pop()[1].values())) or None
            if not messages:
                raise UserError("nothing is asked before the answer; give each record a prompt")
            if system and messages[0][0] == "user":
                messages.insert(0, ("system", {"content": system}))
            prompts.append(voice.prompt_ids(messages))
        except UserError as error:
            raise UserError(f"{path.name}, {place}: {error}") from None
        records.append(record)
        references.append(reference)
    if not records:
        raise UserError(f"--file: {path} holds no records; give one that does")
    return records, prompts, references


def answer_all(voice, prompts, config):
    """The answers to all prompts as texts, in batches of like length; None where a prompt is too long."""
    context = voice.model.config.block_size
    order = sorted((i for i in range(len(prompts)) if len(prompts[i]) <= context), key=lambda i: len(prompts[i]))
    if len(order) < len(prompts):
        print(f"{len(prompts) - len(order)} of {len(prompts)} prompts are longer than the context of {context} tokens "
              "and get no response")
    responses, made, started = [None] * len(prompts), 0, time.perf_counter()
    for start in range(0, len(order), config.batch_size):
        batch = order[start:start + config.batch_size]
        ids = [[] for _ in batch]
        for step in voice.generate([prompts[i] for i in batch], config):
            for answer, token in zip(ids, step, strict=True):
                answer += [token] if token is not None else []
        for i, answer in zip(batch, ids, strict=True):
            responses[i] = voice.encoding.decode(answer)
            made += len(answer)
        rate = made / (time.perf_counter() - started)
        status(f"{start + len(batch):,} of {len(order):,} answered, {rate:,.0f} tokens/s",
               end=start + len(batch) == len(order))
    return responses


def answer_file(voices, config):
    """Answers every record with every voice, writes the records with their responses, and scores them."""
    if Path(config.output).is_dir():
        raise UserError(f"--output={config.output} is a directory; name a file")
    with atomic_file(config.output) as file:  # opened first: what cannot be written is known before the work
        written, results = answer_with(voices, config)
        for record in written:
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))
    print(f"wrote {config.output}")
    summary({name: result for name, result in results.items() if result["scored"]})
    return results if len(voices) > 1 else results[voices[0].name]


def answer_with(voices, config):
    """(the records with their responses, what each voice reached)."""
    results, written = {}, []
    for voice in voices:
        if voice.spec is None:
            raise UserError(f"--file: {voice.name} has no template of its own; give --data_dir, which has one")
        records, prompts, references = read_prompts(Path(config.file), voice, config.system)
        if len(voices) > 1:
            print(f"{voice.name}:")
        labels, scored = label_set(references, config.labels, voice), [truth is not None for truth in references]
        responses = answer_all(voice, prompts, config)
        written = written or [{**record} for record in records]
        key = "model's response" if any("response" in record for record in records) else "response"
        for record, response in zip(written, responses, strict=True):
            record[key if len(voices) == 1 else f"response of {voice.name}"] = response
        likeliest = classify(voice, list(compress(prompts, scored)), labels) if labels else []
        if labels:
            confusion(zip(compress(references, scored), likeliest, strict=True), labels)
        results[voice.name] = score(responses, references, labels, likeliest)
    return written, results


# ---- export ---------------------------------------------------------------------------------------------------------

def chat_template(spec):
    """The spec's wording as a Jinja template for transformers; None where it needs several columns."""
    columns = NAME.findall(spec["prompt_format"])
    if spec["template"] == "text" or len(columns) > 1:
        return None
    if columns or spec["template"] == "alpaca":
        mark = "\0"
        wording = spec["prompt_format"].replace(f"{{{columns[0]}}}", mark, 1) if columns else alpaca_prompt(mark, "")
        before, after = (json.dumps(part, ensure_ascii=False) for part in wording.split(mark))
        return (f"{{{{ {before} }}}}{{{{ messages[0]['content'] }}}}{{{{ {after} }}}}"
                "{% if messages|length > 1 %}{{ messages[1]['content'] + '<|endoftext|>' }}{% endif %}")
    return ("{% for m in messages %}{{ '<|endoftext|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
            "{{ '<|endoftext|>' }}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}")


def export(voice, directory):
    """Writes weights (LoRA merged), configurations and, for GPT-2's encoding, the tokenizer, for transformers."""
    directory, stop = Path(directory), voice.encoding.eot_token
    if (directory / "model.safetensors").exists() or (directory / "adapter_config.json").exists():
        raise UserError(f"--export={directory} holds a model already; name another directory")
    voice.model.merge_lora().save_pretrained(directory)
    files = {"generation_config.json": json.dumps({"eos_token_id": stop, "bos_token_id": stop, "pad_token_id": stop})}
    if voice.spec:
        files["prompt.json"] = json.dumps(voice.spec, indent=1)
    if voice.encoding.name == "gpt2":
        files["vocab.json"], files["merges.txt"] = tokenizer_files(voice.encoding)
        template = chat_template(voice.spec) if voice.spec else None
        special = {f"{name}_token": "<|endoftext|>" for name in ("bos", "eos", "unk", "pad")}
        files["tokenizer_config.json"] = json.dumps({
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": voice.model.config.block_size,
            "add_prefix_space": False, **special, **({"chat_template": template} if template else {})}, indent=1)
    for name, text in files.items():
        with atomic_file(directory / name) as file:
            file.write(text.encode())
    print(f"wrote {directory}: {', '.join(sorted(path.name for path in directory.iterdir()))}")


def main(config):
    """Answers config.prompt, config.file or a chat, or exports; returns the answers' texts or a file's scores."""
    voices = load(config)
    if config.export:
        if len(voices) > 1:
            raise UserError("--export writes one model; name one")
        return export(voices[0], config.export)
    if config.file:
        return answer_file(voices, config)
    if not config.prompt:
        return chat(voices, config)
    answers = []
    for voice in voices:
        messages = prompt_messages(config.prompt, config.input, voice.spec)
        prompt = voice.prompt_ids([("system", {"content": config.system})] * bool(config.system) + messages)
        for number in range(config.num_samples):
            print(f"{voice.name}: " * (len(voices) > 1), end="")
            seeded = dataclasses.replace(config, seed=config.seed + number)
            answers.append(voice.encoding.decode(stream(voice, prompt, seeded)))
    return answers


if __name__ == "__main__":
    run(main, parse_config, SampleConfig)
