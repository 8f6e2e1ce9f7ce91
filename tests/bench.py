"""Times training and generation, every contender in a process of its own, one after the other.

    python tests/bench.py                                   # GPT-2 124M: full, float32, LoRA, and the floor
    python tests/bench.py --size=gpt2-medium --steps=12
    python tests/bench.py llama-lora llama-full             # SmolLM2-135M-Instruct on arXiv papers, where it is at hand
    python tests/bench.py generate                          # tokens a second, ours and transformers'
    python tests/bench.py --peers="ch07 trl-tuned trl-lora llama-trl-lora"  # what others take, where they are installed

The work on GPT-2: 935 Alpaca-style records (../shared/data/instruction-data.json), 8 a step, from one random
initialisation, since speed does not depend on the values of the weights. On the Llama: papers of
../shared/data/arxiv.csv, 8 a step. Every row is a whole run of train.py; seconds are the median over steps 3 and later;
ratios hold within one call only. The floor is a step's multiply-adds at the matrix rate measured in the same call, plus
AdamW's bytes at copy bandwidth (LoRA: two thirds of the multiply-adds and no AdamW). Generation's floor is the weights
read once a step at that bandwidth.
"""
import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LLAMA = os.getenv("NANOSFT_SMOLLM2", os.path.join(tempfile.gettempdir(), "smollm2"))
sys.path.insert(0, str(ROOT))
from nanosft.hub import SIZES  # noqa: E402

CONTENDERS = {"full": {}, "low-memory": {"low_memory": True}, "lora": {"lora_rank": 8},
              "float32": {"dtype": "float32"}, "lora-float32": {"lora_rank": 8, "dtype": "float32"}}
CONTENDERS |= {f"llama-{name}": CONTENDERS[name] for name in ("full", "lora")}


def make_gpt2(directory, size):
    """Random weights in Hugging Face's layout and the prepared records, made once for all contenders."""
    import prepare_data
    from model import GPT, GPTConfig
    n_layer, n_head, n_embd = SIZES[size]
    GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).save_pretrained(directory / "weights")
    records = json.loads((SHARED / "data" / "instruction-data.json").read_text(encoding="utf-8"))
    with open(directory / "records.jsonl", "w", encoding="utf-8") as file:
        for record in records[:int(len(records) * 0.85)]:
            prompt = ("Below is an instruction that describes a task. Write a response that appropriately completes "
                      f"the request.\n\n### Instruction:\n{record['instruction']}")
            prompt += f"\n\n### Input:\n{record['input']}" if record["input"] else ""
            prompt += "\n\n### Response:\n"
            file.write(json.dumps({"prompt": prompt, "completion": record["output"] or " "}) + "\n")
    prepare_data.main(prepare_data.PrepareConfig(
        input=str(directory / "records.jsonl"), out_dir=str(directory / "data"), encoding="gpt2", val_fraction=0,
        test_fraction=0, show=0))


def make_llama(directory):
    """The papers, in the words of the peers' benchmark."""
    import prepare_data
    with open(SHARED / "data" / "arxiv.csv", newline="", encoding="utf-8") as file:
        labels = ", ".join(sorted({row["category"] for row in csv.DictReader(file)}))
    prepare_data.main(prepare_data.PrepareConfig(
        input=str(SHARED / "data" / "arxiv.csv"), out_dir=str(directory / "papers"), model=LLAMA, val_fraction=0,
        test_fraction=0.15, show=0, response_format="{category}", prompt_format="Which category of arXiv does this "
        f"paper belong to: {labels}?\n\nTitle: {{title}}\n\n{{abstract}}"))


def run_one(directory, name, steps):
    """Trains once in this process and prints its row."""
    import train
    data, weights = ("papers", LLAMA) if name.startswith("llama") else ("data", str(directory / "weights"))
    train.main(train.TrainConfig(
        data_dir=str(directory / data), init_from=weights, out_dir=str(directory / name), max_steps=steps,
        overwrite=True, device="cpu", compile="off", eval_interval=0, **CONTENDERS[name]))
    with open(directory / name / "log.csv", newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    steady = sorted(seconds[2:])
    print(f"ROW {name} {steady[len(steady) // 2]:.3f} s/step peak RSS {getrusage(RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def generate(directory, bandwidth):
    """Prints tokens a second of ours and of transformers, 64 each, in the faster of float32 and --dtype=auto."""
    import torch
    import transformers

    from model import GPT
    from nanosft.device import keep_freed_memory, pick_dtype
    keep_freed_memory()
    dtypes = {torch.float32, pick_dtype("auto", torch.device("cpu"))}
    print("| | rows | ours | transformers | ratio | floor |\n|---|---|---|---|---|---|")
    for name, path in (("GPT-2 124M", str(directory / "weights")), ("SmolLM2-135M", LLAMA)):
        if not Path(path).exists():
            continue
        ours = {dtype: GPT.from_pretrained(path, dtype=dtype).eval() for dtype in dtypes}
        others = {dtype: transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval() for dtype in ours}
        size = min(sum(p.numel() * p.element_size() for p in model.parameters()) for model in ours.values())
        for rows in (1, 16):
            prompts = torch.randint(100, 5000, (rows, 60))

            def own(dtype, tokens, ours=ours, prompts=prompts):
                return list(ours[dtype].generate(prompts.tolist(), tokens))

            def theirs(dtype, tokens, others=others, prompts=prompts):
                with torch.no_grad():
                    return others[dtype].generate(
                        prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=tokens,
                        min_new_tokens=tokens, pad_token_id=0)
            best = {own: 0, theirs: 0}
            for _ in range(3):  # by turns
                for function in best:
                    for dtype in ours:
                        function(dtype, 2)
                        started = time.perf_counter()
                        function(dtype, 64)
                        best[function] = max(best[function], rows * 64 / (time.perf_counter() - started))
            print(f"| {name} | {rows} | {best[own]:.0f} | {best[theirs]:.0f} | {best[own] / best[theirs]:.2f} | "
                  f"{rows * bandwidth / size:.0f} |", flush=True)


def rows(command):
    """(name, seconds, peak in GB) for every result line that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if not found_in(done.stdout):
        print(f"{command[-3:]} gave no result:\n{done.stderr[-600:]}{done.stdout[-600:]}", file=sys.stderr)
    return found_in(done.stdout)


def found_in(text):
    lines = re.findall(r"^(?:ROW )?(\S+(?: (?:fp32|bf16|full|lora))?) +([\d.]+) s/step(?:.*peak RSS +([\d.]+) GB)?",
                       text, re.M)
    return [(name, float(seconds), float(peak or 0)) for name, seconds, peak in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=["full", "lora", "float32"])
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1, help="every contender so many times, by turns")
    parser.add_argument("--peers", default="", help="contenders of the peers' benchmark, where it is at hand")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has the peers")
    parser.add_argument("--keep-memory", action="store_true", help="the peers also with freed memory kept")
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.directory:
        return run_one(Path(flags.directory), flags.contenders[0], flags.steps)
    if not SHARED.is_dir():
        sys.exit("the benchmark needs ../shared/data/instruction-data.json")
    peers = [flags.peers_python, str(SHARED / "bench" / "peers.py"), f"--size={flags.size}", f"--steps={flags.steps}"]
    is_llama = any(name.startswith("llama") for name in flags.contenders)
    with tempfile.TemporaryDirectory() as directory:
        make_gpt2(Path(directory), flags.size)
        text = subprocess.run([*peers, "floor", *["llama-floor"][:is_llama]], capture_output=True, text=True).stdout
        bandwidth, floors = float(re.search(r"(\d+) GB/s", text)[1]), found_in(text)
        floor = {name: seconds for name, seconds, _ in floors}
        if "generate" in flags.contenders:
            generate(Path(directory), 1e9 * bandwidth)
        if is_llama:
            make_llama(Path(directory))
        n_layer, _, n_embd = SIZES[flags.size]
        adamw = 28 * (12 * n_layer * n_embd**2 + 50257 * n_embd) / 1e9 / bandwidth
        floors.append(("floor LoRA", (floor["floor bf16"] - adamw) * 2 / 3, 0))
        found = {}
        for _ in range(flags.rounds):
            for name in flags.contenders:
                if name != "generate":
                    command = [sys.executable, __file__, name, f"--steps={flags.steps}", f"--directory={directory}"]
                    for row in rows(command):
                        found.setdefault(row[0], []).append(row[1:])
            for name in flags.peers.split():
                for words in [[], ["--keep-memory"]][:1 + flags.keep_memory]:
                    for row in rows([*peers, name, *words]):
                        found.setdefault(", ".join([row[0], *words]), []).append(row[1:])
    print("| | s/step | peak memory |\n|---|---|---|")
    for name, seconds, _ in floors:
        print(f"| {name} | {seconds:.3f} | |")
    for name, results in found.items():
        seconds, peaks = zip(*sorted(results), strict=True)
        print(f"| {name} | {seconds[len(seconds) // 2]:.3f} | {max(peaks):.2f} GB |")


if __name__ == "__main__":
    main()
