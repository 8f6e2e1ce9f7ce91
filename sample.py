"""Uses a trained model: answers a prompt, chats, or answers and scores a file of records.

    python sample.py                                          # chat with the model in out/
    python sample.py --prompt="Name three colours."           # one answer
    python sample.py --file=data/instruction-data/test.jsonl  # answer the held-out records and count exact matches
    python sample.py --model=gpt2 --prompt="Once upon a time" # a plain GPT-2 goes on with the text
"""
import codecs
import json
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from config import UserError, require, run, status
from model import GPT, atomic_file, locate
from prepare_data import NAME, encode, get_encoding, read_records, render, to_messages
from train import load_meta, pick_device, pick_dtype


@dataclass(frozen=True)
class SampleConfig:
    # model
    model: str = "out"  # an out_dir of train.py, a Hugging Face directory, or gpt2 | gpt2-medium | gpt2-large | gpt2-xl
    data_dir: str = ""  # prepared data whose template to use; '' = the one stored with the model, else plain text
    # what to answer
    prompt: str = ""  # one prompt, or a JSON object for records of several columns; '' = chat
    input: str = ""  # Alpaca's input to the prompt
    system: str = ""  # system prompt, for the chat template
    file: str = ""  # records to answer (as prepare_data.py reads them) and, where they hold an answer, to score
    output: str = "answers.jsonl"  # where --file writes its records, each with its response
    # how
    temperature: float = 0.0  # 0 = always the most likely token
    top_k: int = 0  # draw from the k most likely tokens; 0 = all
    top_p: float = 1.0  # draw from the smallest set of tokens with this probability
    max_new_tokens: int = 256  # longest answer
    num_samples: int = 1  # answers to one prompt
    seed: int = 1337  # of the draws
    # machine
    batch_size: int = 16  # records answered at a time
    device: str = ""  # cpu | cuda | mps; '' = the best there is
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16

    def __post_init__(self):
        require(**{name: getattr(self, name) < 1 and f"{getattr(self, name)} is below 1"
                   for name in ("max_new_tokens", "num_samples", "batch_size")},
                temperature=self.temperature < 0 and f"{self.temperature} is below 0",
                top_k=self.top_k < 0 and f"{self.top_k} is below 0",
                top_p=not 0 < self.top_p <= 1 and f"{self.top_p} is not in (0, 1]",
                dtype=self.dtype not in ("auto", "float32", "bfloat16", "float16", "float64")
                and f"{self.dtype!r} is none of auto, float32, bfloat16, float16")


def load(config):
    """(model, encoding, spec): the spec words prompts as in training; None: the model goes on with plain text."""
    if not Path(config.model).exists() and config.model == SampleConfig.model:
        raise UserError("--model=out: nothing is trained there yet; run python train.py first, or name a model")
    stored = locate(config.model).parent / "prompt.json"
    if config.data_dir:
        meta = load_meta(config.data_dir)
        spec = {**meta["prompt"], "encoding": meta["encoding"]}
    else:
        spec = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else None
    encoding = get_encoding(spec["encoding"] if spec else "gpt2")
    model = GPT.from_pretrained(config.model)
    if model.config.vocab_size < encoding.n_vocab:
        raise UserError(f"--model={config.model} has {model.config.vocab_size} token ids, the {encoding.name} encoding "
                        f"{encoding.n_vocab}: give the --data_dir that it was trained on")
    device = pick_device(config.device)
    return model.to(device, pick_dtype(config.dtype, device)).eval(), encoding, spec


def prompt_messages(text, given, spec):
    """What a person types, as the messages of a record that lacks its answer."""
    columns = NAME.findall(spec["prompt_format"]) if spec else []
    if spec and spec["template"] == "text":
        return [("opening", {"text": text})]
    if not columns:
        return [("user", {"content": text, "input": given})]
    if len(columns) == 1 and not text.lstrip().startswith("{"):
        return to_messages({columns[0]: text}, spec, answered=False)
    try:
        record = json.loads(text)
    except ValueError:
        raise UserError(f"--prompt: this model reads the columns {', '.join(columns)}; give a JSON object, "
                        f"""'{{{", ".join(f'"{name}": "..."' for name in columns)}}}'""") from None
    return to_messages(record, spec, answered=False)


def stream(model, encoding, prompt, config, generator):
    """Prints the answer to one prompt as it is made, whole characters only; returns its ids without the stop."""
    decoder, answer = codecs.getincrementaldecoder("utf-8")(errors="replace"), []
    for (token,) in model.generate([prompt], config.max_new_tokens, config.temperature, config.top_k, config.top_p,
                                   encoding.eot_token, encoding.n_vocab, generator):
        if token != encoding.eot_token:
            answer.append(token)
            print(decoder.decode(encoding.decode_single_token_bytes(token)), end="", flush=True)
    print(decoder.decode(b"", final=True), flush=True)
    return answer


def prompt_ids(messages, encoding, spec):
    """The ids that stand before the answer, by the renderer that made the training data; plain text without a spec."""
    if spec is None:
        return encoding.encode_ordinary(messages[-1][1]["content"]) or [encoding.eot_token]
    return encode(render(messages, spec), encoding)[0]


def chat(model, encoding, spec, config, generator):
    """Answers prompts until the input ends. The chat template keeps the conversation, as token ids, and drops its
    oldest turns when the context is full; other templates answer every prompt by itself."""
    keeps = spec is not None and spec["template"] == "chat" and not spec["prompt_format"]
    system, exchanges, context = [], [], model.config.block_size
    if keeps and config.system:
        nothing = ("user", {"content": ""})
        system = prompt_ids([("system", {"content": config.system}), nothing], encoding, spec)
        system = system[:-len(prompt_ids([nothing], encoding, spec))]
    print("Type a prompt; Ctrl-D (Windows: Ctrl-Z) ends the chat.", flush=True)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            continue
        turn = prompt_ids(prompt_messages(text, config.input, spec), encoding, spec)
        dropped = len(exchanges)
        while exchanges and len(system) + sum(map(len, exchanges)) + len(turn) + min(config.max_new_tokens,
                                                                                     context // 4) > context:
            exchanges.pop(0)
        if dropped > len(exchanges):
            print(f"(the context is full: the oldest {dropped - len(exchanges)} turns are forgotten)")
        try:
            answer = stream(model, encoding, [*system, *chain.from_iterable(exchanges), *turn], config, generator)
        except UserError as error:
            print(error)
            continue
        exchanges += [turn + answer] if keeps else []


def read_prompts(path, encoding, spec):
    """(records, prompts as ids, reference answers, None where a record has none) of a file."""
    records, prompts, references = [], [], []
    if not path.is_file():
        raise UserError(f"--file: {path} is not there; prepare_data.py leaves the held-out records in test.jsonl")
    for place, record in read_records(path, path.name):
        try:
            messages, reference = to_messages(record, spec, answered=False), None
            if messages[-1][0] in ("assistant", "completion"):
                reference = next(iter(messages.pop()[1].values()))
            prompts.append(prompt_ids(messages, encoding, spec))
        except UserError as error:
            raise UserError(f"{path.name}, {place}: {error}") from None
        records.append(record)
        references.append(reference)
    return records, prompts, references


def answer_file(model, encoding, spec, config, generator):
    """Answers a file of records in batches, writes them with their responses and counts exact matches."""
    records, prompts, references = read_prompts(Path(config.file), encoding, spec)
    too_long = [i for i, prompt in enumerate(prompts) if len(prompt) > model.config.block_size]
    if too_long:
        print(f"{len(too_long)} of {len(prompts)} prompts are longer than the context of "
              f"{model.config.block_size} tokens and get no response")
    order = sorted(set(range(len(prompts))) - set(too_long), key=lambda i: len(prompts[i]))
    responses, done, started = [None] * len(records), 0, time.perf_counter()
    for start in range(0, len(order), config.batch_size):
        batch = order[start:start + config.batch_size]
        ids = [[] for _ in batch]
        for step in model.generate([prompts[i] for i in batch], config.max_new_tokens, config.temperature, config.top_k,
                                   config.top_p, encoding.eot_token, encoding.n_vocab, generator):
            for answer, token in zip(ids, step, strict=True):
                answer += [token] if token not in (None, encoding.eot_token) else []
        for i, answer in zip(batch, ids, strict=True):
            responses[i] = encoding.decode(answer)
            done += len(answer)
        seconds = time.perf_counter() - started
        status(f"{start + len(batch):,} of {len(order):,} answered, {done / seconds:,.0f} tokens/s",
               end=start + len(batch) == len(order))
    with atomic_file(config.output) as file:
        for record, response in zip(records, responses, strict=True):
            file.write((json.dumps({**record, "response": response}, ensure_ascii=False) + "\n").encode())
    scored = [(response, reference) for response, reference in zip(responses, references, strict=True)
              if reference is not None]
    exact = sum(response is not None and response.strip() == reference.strip() for response, reference in scored)
    print(f"wrote {config.output}")
    if scored:
        print(f"exact match {exact}/{len(scored)} ({exact / len(scored):.1%})".replace("%", " %"))
    return {"records": len(records), "scored": len(scored), "exact": exact}


def main(config):
    """Answers config.prompt, config.file or a chat; returns the answers' texts, or the score of a file."""
    model, encoding, spec = load(config)
    if config.system and (spec is None or spec["template"] != "chat"):
        raise UserError("--system: only the chat template has a system prompt")
    generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed)
    if config.file:
        if spec is None:
            raise UserError(f"--file: {config.model} has no template of its own; give --data_dir, which has one")
        return answer_file(model, encoding, spec, config, generator)
    if not config.prompt:
        return chat(model, encoding, spec, config, generator)
    messages = prompt_messages(config.prompt, config.input, spec)
    if config.system:
        messages = [("system", {"content": config.system}), *messages]
    prompt = prompt_ids(messages, encoding, spec)
    return [encoding.decode(stream(model, encoding, prompt, config, generator)) for _ in range(config.num_samples)]


if __name__ == "__main__":
    run(main, SampleConfig)
