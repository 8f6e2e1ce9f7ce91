"""Breaks the code in ways that other trainers were broken, one at a time, and runs the tests: every break must be found.

    python tests/mutations.py            # all of them, a table at the end
    python tests/mutations.py shift      # those whose name holds a word
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: (the code, which stands once in one file, the broken code)
MUTATIONS = {
    "targets shifted twice": ('''tokens["id"][1:].astype(np.int64), IGNORE)''',
                              '''np.roll(tokens["id"], -2)[1:].astype(np.int64), IGNORE)'''),
    "mask ignored": ('''np.where(tokens["flags"][1:] & SUPERVISED,''', '''np.where(tokens["flags"][1:] < 9,'''),
    "stop not supervised": ('''return segments + ([(EOT, True)] if stops''',
                            '''return segments + ([(EOT, False)] if stops'''),
    "prompt supervised": ('''else [(f"{role}\\n{content}", False)]''',
                          '''else [(f"{role}\\n{content}", True)]'''),
    "mean of micro-batch means": ('''model(*batch) / supervised''', '''model(*batch) / int((batch[1] != IGNORE).sum())'''),
    "layer norms swapped": ('''x = x + self.attn(self.ln_1(x), layout, cache)
        return x + self.mlp(self.ln_2(x))''', '''x = x + self.attn(self.ln_2(x), layout, cache)
        return x + self.mlp(self.ln_1(x))'''),
    "biases dropped": ('''return linear(x, self.weight, self.bias, self.kept)''', '''return linear(x, self.weight, self.bias * 0, self.kept)'''),
    "gradient overwritten, not added": ('''weight.grad.add_(product)''', '''weight.grad.copy_(product)'''),
    "a second gradient added to the first one's room": ('''weight.grad = kept.room("sum", weight, weight.dtype).copy_(weight.grad)''', '''pass'''),
    "a cast used after its weight has changed": ('''if self.get("holds") != (state := (dtype, weight.data_ptr(), weight._version)):''',
                                                 '''if self.get("holds") is None and (state := 1):'''),
    "a cast used after autograd's step": ('''        kept["holds"] = None  # the weight is about to change''', '''        kept  # the weight is about to change'''),
    "a step that a graph does not see": ('''                torch.autograd.graph.increment_version(p)''', '''                p.data'''),
    "the gradient left where the new weight belongs": ('''parts[0].copy_(part)''', '''pass'''),
    "gradient of the logits not scaled": ('''part.copy_(probability.mul_(scale))''', '''part.copy_(probability)'''),
    "the tail seen by the examples": ('''torch.cat([taken.nonzero(), (~taken).nonzero()[:tail]]).squeeze(1)''', '''torch.cat([taken.nonzero() + (tail > 0), taken.nonzero()[:tail]]).squeeze(1) % (B * T)'''),
    "unsupervised rows counted": ('''(log_sum - right).masked_fill(targets == IGNORE, 0)''', '''log_sum - right'''),
    "means of bfloat16 never written back": ('''rest.copy_(moment)''', '''pass'''),
    "embedding's rows forgotten": ('''    x.register_hook(add_rows)''', '''    x.requires_grad'''),
    "bfloat16 logits far from zero": ('''if x.element_size() == 2:''', '''if False:'''),
    "LoRA scaled by alpha alone": ('''alpha / rank, dropout''', '''alpha, dropout'''),
    "label's stop not scored": ('''encode_ordinary(label) + [voice.encoding.eot_token]''', '''encode_ordinary(label)'''),
    "exact GELU": (''', approximate="tanh")''', ''')'''),
    "packed examples see each other": ('''lengths = torch.as_tensor(lengths)
        B, T''', '''lengths = torch.as_tensor(lengths).sum()[None]
        B, T'''),
    "positions do not restart": ('''send(index % T, device)''', '''send(torch.arange(len(index)) % 64, device)'''),
    "packed examples see each other on a GPU": ('''torch.cat([lengths, torch.tensor([tail])]).cumsum(0)''', '''(lengths.sum() + tail)[None]'''),
    "few rows without their bias": ('''columns).t()[:len(x)] + start''', '''columns).t()[:len(x)]'''),
    "attention sees the future": ('''dtype=dtype).triu(1)''', '''dtype=dtype).triu(2)'''),
    "cache written one place late": ('''keys[rows, :, layout.position], values[rows, :, layout.position] =''',
                                     '''late = (layout.position + 1) % keys.size(2)
                keys[rows, :, late], values[rows, :, late] ='''),
    "cached position one late": ('''position = cache.lengths.clamp(max=''',
                                 '''position = (cache.lengths + 1).clamp(max='''),
    "padding seen while generating": ('''<= position[:, None]''', '''<= position.max()'''),
    "split by record, not by prompt": ('''f"{seed} {prompt}".encode()''',
                                       '''f"{seed} {marked}".encode()'''),
    "special text encoded as special": ('''encoding.encode_ordinary(text) for text, _ in segments''',
                                        '''encoding.encode(text, allowed_special="all") for text, _ in segments'''),
    "stop cut by truncation": ('''            if len(ids) > limit and not is_text:''',
                               '''            ids, flags = (ids, flags) if is_text else (ids[:limit], flags[:limit])
            if len(ids) > limit and not is_text:'''),
    "partial last step dropped": ('''math.ceil(n_examples / batch_size))
    order''', '''max(1, n_examples // batch_size))
    order'''),
    "one order for every epoch": ('''default_rng([seed, epoch])''', '''default_rng([seed, 0])'''),
    "evaluation as a mean of means": ('''        loss[group] = np.bincount(owner, each, len(group))
        supervised[group] = np.bincount(owner, minlength=len(group))''', '''        loss[group] = each.mean()
        supervised[group] = 1'''),
    "a process's share counted twice": ('''[rank::processes], shards.lengths''', '''[0::processes], shards.lengths'''),
    "gradients averaged over the processes": ('''scaler.scale(loss * processes)''', '''scaler.scale(loss)'''),
    "an update of NaN": ('''~(norm + loss).isfinite()''', '''torch.tensor(False)'''),
    "resume repeats a step": ('''save_checkpoint(out_dir / "ckpt.pt", step=step,''',
                              '''save_checkpoint(out_dir / "ckpt.pt", step=step - 1,'''),
    "resume forgets the optimizer": ('''{"state": checkpoint["optimizer"]["state"],''', '''{"state": {},'''),
    "two runs in one directory": ('''            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)''', '''            pass'''),
    "an adapter over any base": ('''locate(base or base_of(path))''', '''locate(base_of(path))'''),
    "dropout differs after resume": ('''torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + rank)''', '''pass'''),
    "best overwritten by worse": ('''better = val_loss < best_val_loss''', '''better = not val_loss == 4.0'''),
    "biases decay": ('''{"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}''',
                     '''{"params": [p for p in parameters if p.dim() < 2], "weight_decay": weight_decay}'''),
    "clipping left out": ('''(grad_clip or math.inf)''', '''math.inf'''),
    "a norm in bfloat16": ('''torch.linalg.vector_norm(p.grad, dim=-1).float() if p.grad.dtype == torch.bfloat16 else p.grad''', '''p.grad'''),
    "padded vocabulary drawn": ('''[:, :n_vocab]''', ''''''),
    "characters broken while streaming": ('''codecs.getincrementaldecoder("utf-8")(errors="replace"), []''',
                                          '''type("D", (), {"decode": lambda s, b, final=0: b.decode(errors="replace")})(), []'''),
    "a bug hidden from its owner": ('''except (UserError, OSError) as error:''', '''except Exception as error:'''),
}

TESTS = {"prepare_data.py": ["prepare_data"], "records.py": ["prepare_data"], "sample.py": ["sample", "lora"],
         "score.py": ["sample"], "checkpoint.py": ["train"],
         "config.py": ["train"], "console.py": ["train"], "dataset.py": ["train"], "train.py": ["train"], "watch.py": ["train"],
         "model.py": ["model", "lora", "train"], "cpu.py": ["model", "lora", "train"], "weights.py": ["model", "lora"]}


def found(name):
    """Whether the tests fail on the code so broken; the last line of what they said."""
    code, broken = MUTATIONS[name]
    files = [path.name for path in ROOT.glob("*.py") for _ in range(path.read_text(encoding="utf-8").count(code))]
    assert len(files) == 1, f"{name}: its code stands in {files}"
    file = files[0]
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "nanosft"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out*", "__pycache__", "demo"))
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace(code, broken), encoding="utf-8")
        if (ROOT.parent / "shared").exists():
            (Path(work) / "shared").symlink_to(ROOT.parent / "shared")
        tests = [f"tests/test_{test}.py" for test in TESTS[file] + ["processes"] * ("process" in name)]
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-n0", *tests, "-k", "not full_size and not large and not xl"
                               " and not compil"], cwd=copy, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return done.returncode == 1, lines[0].split("::")[1].split(" - ")[0] if lines else done.stdout[-300:]


if __name__ == "__main__":
    wanted = [name for name in MUTATIONS if all(word in name for word in sys.argv[1:])]
    missed = 0
    for name in wanted:
        caught, by = found(name)
        missed += not caught
        print(f"| {name} | {'found by ' + by if caught else 'NOT FOUND ' + by} |", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} found")
    sys.exit(missed > 0)
