"""Times training as whole runs of train.py, every contender in a process of its own, one after the other.

    python tests/bench.py                                   # GPT-2 124M: full, float32, LoRA, and the floor
    python tests/bench.py --size=gpt2-medium --steps=12
    python tests/bench.py --peers="ch07 trl-tuned trl-lora" # also what others take, where they are installed

The work: 935 Alpaca-style records (../shared/data/instruction-data.json), 8 a step, AdamW, from one random
initialisation, since speed does not depend on the values of the weights. Seconds are the median over steps 3 and later;
ratios hold within one call only. The floor is a step's multiply-adds at the matrix rate measured in the same call, plus
AdamW's bytes at copy bandwidth (LoRA: two thirds of the multiply-adds and no AdamW).
"""
import argparse
import csv
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
from nanosft.weights import SIZES  # noqa: E402

CONTENDERS = {"full": {}, "low-memory": {"low_memory": True}, "lora": {"lora_rank": 8},
              "float32": {"dtype": "float32"}, "lora-float32": {"lora_rank": 8, "dtype": "float32"}}


def make_work(directory, size):
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


def run_one(directory, name, steps):
    """Trains once in this process and prints its row."""
    import train
    train.main(train.TrainConfig(
        data_dir=str(directory / "data"), init_from=str(directory / "weights"), out_dir=str(directory / name),
        max_steps=steps, overwrite=True, device="cpu", compile="off", eval_interval=0, **CONTENDERS[name]))
    with open(directory / name / "log.csv", newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    steady = sorted(seconds[2:])
    print(f"ROW {name} {steady[len(steady) // 2]:.3f} s/step peak RSS {getrusage(RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def rows(command):
    """(name, seconds, peak in GB) for every result line that a command prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    if not found_in(done.stdout):
        print(f"{command[-3:]} gave no result:\n{done.stderr[-600:]}", file=sys.stderr)
    return found_in(done.stdout)


def found_in(text):
    lines = re.findall(r"^(?:ROW )?(\S+(?: (?:fp32|bf16))?) +([\d.]+) s/step(?:.*peak RSS +([\d.]+) GB)?", text, re.M)
    return [(name, float(seconds), float(peak or 0)) for name, seconds, peak in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=["full", "lora", "float32"])
    parser.add_argument("--size", default="gpt2")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--peers", default="", help="contenders of the peers' benchmark, where it is at hand")
    parser.add_argument("--keep-memory", action="store_true", help="the peers also with freed memory kept")
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.directory:
        return run_one(Path(flags.directory), flags.contenders[0], flags.steps)
    if not SHARED.is_dir():
        sys.exit("the benchmark needs ../shared/data/instruction-data.json")
    peers = [sys.executable, str(SHARED / "bench" / "peers.py"), f"--size={flags.size}", f"--steps={flags.steps}"]
    with tempfile.TemporaryDirectory() as directory:
        make_work(Path(directory), flags.size)
        text = subprocess.run([*peers, "floor"], capture_output=True, text=True, check=True).stdout
        table = found_in(text)
        floor = {name.removeprefix("floor "): seconds for name, seconds, _ in table}
        n_layer, _, n_embd = SIZES[flags.size]
        adamw = 28 * (12 * n_layer * n_embd**2 + 50257 * n_embd) / 1e9 / float(re.search(r"(\d+) GB/s", text)[1])
        table.append(("floor LoRA", (floor["bf16"] - adamw) * 2 / 3, 0))
        for name in flags.contenders:
            table += rows([sys.executable, __file__, name, f"--steps={flags.steps}", f"--directory={directory}"])
        for name in flags.peers.split():
            table += rows([*peers, name])
            if flags.keep_memory:
                table += [(f"{name}, memory kept", *row[1:]) for row in rows([*peers, name, "--keep-memory"])]
    print("| | s/step | of the bf16 floor | peak memory |\n|---|---|---|---|")
    for name, seconds, peak in table:
        print(f"| {name} | {seconds:.3f} | {seconds / floor['bf16']:.2f} | {f'{peak:.2f} GB' if peak else ''} |")


if __name__ == "__main__":
    main()
