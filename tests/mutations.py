"""Breaks the code in ways that other trainers were broken, one at a time, and runs the tests: every break must be found.

    python tests/mutations.py            # all of them, a line each
    python tests/mutations.py shift      # those whose name holds every word
"""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# name: (the code, which stands once in one file, the broken code)
MUTATIONS = {
    # data
    "targets shifted twice": ('''& SUPERVISED, own[1:], IGNORE_INDEX)''', '''& SUPERVISED, np.roll(own, -1)[1:], IGNORE_INDEX)'''),
    "mask ignored": ('''np.where(example["flags"][1:] & SUPERVISED,''', '''np.where(example["flags"][1:] < 9,'''),
    "stop not supervised": ('''    segments.append((EOT, learned))\n    return segments''', '''    segments.append((EOT, False))\n    return segments'''),
    "stop of alpaca not supervised": ('''(EOT, messages[1].learned)]''', '''(EOT, False)]'''),
    "prompt supervised": ('''(f"{message.role}\\n{message.text()}", False)''', '''(f"{message.role}\\n{message.text()}", True)'''),
    "prompt of a model\'s template supervised": ('''learned = [False, *(''', '''learned = [True, *('''),
    "special text encoded as special": ('''part = encoding.encode_ordinary(text)''', '''part = encoding.encode(text, allowed_special="all")'''),
    "split by record, not by prompt": ('''if asked and message.learned and message.role in ("assistant", "completion"):''', '''if False:'''),
    "duplicates told by their tokens alone": ('''.tobytes() + flags, digest_size''', '''.tobytes(), digest_size'''),
    "checksum of a shard not verified": ('''or crc32_of(path) != checksum:''', '''or not crc32_of(path):'''),
    "checksum of meta.json not verified": ('''!= (FORMAT_VERSION, checksum_of(meta)):''', '''!= (FORMAT_VERSION, meta.get("checksum", 0)):'''),
    "partial last step dropped": ('''divmod(step, math.ceil(len(data) / batch_size))''', '''divmod(step, max(1, len(data) // batch_size))'''),
    "one order for every epoch": ('''default_rng([seed, epoch])''', '''default_rng([seed, 0])'''),
    "a process's share counted twice": ('''-self.lengths[i])[rank::world_size]''', '''-self.lengths[i])[0::world_size]'''),
    # files and records
    "weight 0 is learned": ('''{"content": text}, weight != 0))''', '''{"content": text}, True))'''),
    "TRL's earlier answers learned": ('''message._replace(learned=False) for''', '''message for'''),
    "system prompt beside messages lost": ('''*messages] if name else messages''', '''*messages] if False else messages'''),
    "rows that the viewer has cut are learned": ('''if record.get(CUT):''', '''if False:'''),
    "unused fields not named": ('''self.unused.update(rest.keys())''', '''pass'''),
    "columns paired by their order": ('''{key: column[row] for key, column in value.items()} for row in first''', '''dict(zip(value, row, strict=True)) for row in zip(*map(dict.values, columns), strict=True)'''),
    "quotes in tabs swallow rows": ('''ways.append({"quoting": csv.QUOTE_NONE})''', '''pass'''),
    "UTF-16 without a mark not seen": ('''seen = json.detect_encoding(head)''', '''seen = "utf-16" if head[:2] in (b"\\xff\\xfe", b"\\xfe\\xff") else "utf-8-sig"'''),
    "strict drops": ('''            if config.strict:\n                raise UserError(f"{location}: {error}")''', '''            if False:\n                raise UserError(f"{location}: {error}")'''),
    "prompts of val in training not seen": ('''elif split and share in report.prompts:''', '''elif False:'''),
    "part of the stop text shown": ('''- max(0, len(config.stop) - 1))''', ''')'''),
    "rope pairs of a GGUF not neighbours": ('''.transpose(1, 2).reshape(tensor.shape)''', '''.reshape(tensor.shape)'''),
    "any state dict turned": ('''widths[1] == 3 * widths[0]:''', '''True:'''),
    "loss scale forgotten at resume": ('''for name in ("steps", "loss_scale", "good_steps"):''', '''for name in ("steps", "good_steps"):'''),
    "evaluation keeps its graph": ('''with torch.no_grad(), torch.compiler''', '''with torch.enable_grad(), torch.compiler'''),
    "a class worded twice": ('''name.removeprefix(before).removesuffix(after)''', '''name'''),
    "split by a greeting": ('''if asked and message.learned and''', '''if message.learned and'''),
    "split by the fields, not by what they say": ('''texts.append(message.text())''', '''texts.append(repr(message.fields))'''),
    "prompts that are learned counted as plain text": ('''counts["supervised_tokens"] == counts["tokens"] - counts["examples"]''', '''run.meta["prompt"]["template"] == "text"'''),
    "saving not reckoned with": ('''pace.saving_seconds = 4 / 3 * save_seconds''', '''pace.saving_seconds = 0'''),
    "another model's label": ('''[label.strip() for label in likeliest])''', '''[labels[0].strip() for label in likeliest])'''),
    "patience never ends": ('''state.waited = 0 if better else state.waited + 1''', '''state.waited = 0'''),
    # model
    "layer norms swapped": ('''self.attn(self.ln_1(x), packing, cache)\n        return x + self.mlp(self.ln_2(x))''', '''self.attn(self.ln_2(x), packing, cache)\n        return x + self.mlp(self.ln_1(x))'''),
    "exact GELU": (''', approximate="tanh")''', ''')'''),
    "packed examples see each other": ('''lengths = torch.as_tensor(lengths)''', '''lengths = torch.as_tensor(lengths).sum()[None]'''),
    "keys shared in another order": ('''.triu(start + 1).repeat(shared, 1)''', '''.triu(start + 1).repeat_interleave(shared, 0)'''),
    "positions do not restart": ('''to_device(rounded % T, device)''', '''to_device(torch.arange(len(rounded)) % 64, device)'''),
    "a token shared after another one": ('''(grid[1:] == grid[:-1]).cumprod(1) == 0''', '''grid[1:] != grid[:-1]'''),
    "a shared token taken from the first": ('''number.cummax(0).values.flatten()''', '''number.flatten()'''),
    "nothing is shared": ('''.cumprod(1) == 0''', '''.cumprod(1) >= 0'''),
    "examples in any order": ('''key=lambda example: example["id"].tobytes())''', '''key=len)'''),
    "attention sees the future": ('''.triu(start + 1)''', '''.triu(start + 2)'''),
    "bfloat16 logits far from zero": ('''if x.dtype.itemsize > 2:''', '''if True:'''),
    "LoRA scaled by alpha alone": ('''alpha / rank, dropout''', '''alpha, dropout'''),
    "cache written one place late": ('''keys[rows, :, packing.position_ids] =''', '''keys[rows, :, (packing.position_ids + 1) % keys.size(2)] ='''),
    "cached position one late": ('''position = lengths.clamp(max=''', '''position = (lengths + 1).clamp(max='''),
    "padding seen while generating": ('''<= position[:, None]''', '''<= position.max()'''),
    "padded vocabulary drawn": ('''self.logits(x)[:, :n_vocab]''', '''self.logits(x)'''),
    "rotary positions not scaled": ('''speeds * (kept + (1 - kept) / scaling["factor"])''', '''speeds'''),
    "gate and value swapped": ('''F.silu(gate) * x''', '''F.silu(x) * gate'''),
    "keys shared by the wrong queries": ('''q = q.reshape(B, n_kv_head, -1, D)''', '''q = q.view(B, -1, n_kv_head, D).transpose(1, 2)'''),
    "queries not normalised": ('''[self.q_norm(qk[:, :n_head]),''', '''[qk[:, :n_head],'''),
    # files
    "texts not composed": ('''if self.is_composed:''', '''if False:'''),
    "added tokens not found in texts": ('''if self.added:''', '''if False:'''),
    "thinking not off": (''', enable_thinking=False)''', ''')'''),
    "token sent to another host": ('''if token.strip() and url.startswith(f"{endpoint()}/"):''', '''if token.strip():'''),
    "damaged download kept": ('''if len(digest) == 64 and sha256_of(file.name) != digest:''', '''if False:'''),
    "tokenizer left behind": ('''    copy_tokenizer(run.tokenizer, directory, run.spec)''', '''    pass'''),
    # optimizer
    "a parameter its own master in 16 bits": ('''        self.masters = {name: p.detach()''', '''        model.to(dtype)\n        self.masters = {name: p.detach()'''),
    "weights follow no master": ('''weight.copy_(master)''', '''pass'''),
    "micro-batches not added up in float32": ('''in_float32=len(batches) > 1 or rank_and_world_size()[1] > 1''', '''in_float32=False'''),
    "loss scale not undone": ('''scale, found_inf = scale / self.loss_scale, skipped''', '''scale, found_inf = scale, skipped'''),
    "norm of the scaled loss": ('''.sum().sqrt() / self.loss_scale''', '''.sum().sqrt()'''),
    "skipped step counted by AdamW": ('''self.steps += 1 - found_inf''', '''self.steps += 1'''),
    "an update of NaN": ('''~(norm + loss).isfinite()''', '''(norm + loss) == 0.125'''),
    "low-memory moments not written back": ('''mean.copy_(wide[1])''', '''pass'''),
    "biases decay": ('''self.weight_decay if parameter.dim() >= 2 else 0.0''', '''self.weight_decay'''),
    "clipping left out": ('''.clamp(max=1) if grad_clip''', '''.clamp(min=1, max=1) if grad_clip'''),
    "norm summed in the gradients' dtype": ('''torch.dot(part, part)''', '''torch.dot(part.bfloat16(), part.bfloat16()).float()'''),
    "resume forgets the moments": ('''for kind in ("masters", "means", "squares"):''', '''for kind in ("masters",):'''),
    "resume leaves old weights": ('''parameter.copy_(self.masters[name])''', '''pass'''),
    # training
    "mean of micro-batch means": ('''model(*batch) / supervised''', '''model(*batch) / int((batch[1] >= 0).sum())'''),
    "evaluation as a mean of means": ('''            loss += model(*shards.batch(group)).item()''', '''            loss += model(*shards.batch(group)).item() / shards.supervised(group) * shards.supervised(range(len(shards))) * len(group) / len(shards)'''),
    "gradients averaged over the processes": ('''        exchange.wait()''', '''        exchange.wait()\n    for parameter in parameters:\n        parameter.grad /= dist.get_world_size()'''),
    "learning rate not at its end in time": ('''state.step, total_steps, run.learning_rate''', '''state.step, run.steps, run.learning_rate'''),
    "evaluation not kept back from the time": ('''return self.limit - self.now - self.evaluation_seconds''', '''return self.limit - self.now'''),
    "evaluations at any price": ('''self.now - self.evaluated >= 10 * self.evaluation_seconds''', '''True'''),
    "no save between evaluations": ('''save_seconds) if evaluated_now else 600)''', '''save_seconds) if evaluated_now else math.inf)'''),
    "time left in steps": ('''left = (total_steps - step) * self.step_seconds()''', '''left = total_steps - step'''),
    "evaluations to come not in the time left": ('''+ evaluations * self.evaluation_seconds''', '''+ self.evaluation_seconds'''),
    "the start of a run replaced": ('''start.exists() and is_ours:''', '''False:'''),
    "a compiling step in the pace": ('''(0 if self.compiles else self.step_seconds())''', '''self.step_seconds()'''),
    "the last evaluation kept back by one step alone": ('''self.steps < 2 and not self.earlier and second < self.limit''', '''self.steps < 1 and not self.earlier and second < self.limit'''),
    "a resumed run as fast as it was planned": ('''self.steps < 2 and not self.earlier and''', '''self.steps < 2 and'''),
    "dropout after a failed attempt": ('''            torch.manual_seed((run.config.seed * 1_000_003 + run.state.step) * 1009 + rank)  # for dropout
            return''', '''            if run.compiles == (run.config.compile == "on"):
                torch.manual_seed((run.config.seed * 1_000_003 + run.state.step) * 1009 + rank)
            return'''),
    "NaN the best by answers": ('''reached > best and not math.isnan(state.val_loss)''', '''reached > best'''),
    "another vocabulary for GPT-2's": ('''if init_from != meta["model"] and has_other''', '''if False and has_other'''),
    "the token of a netrc": ('''session.trust_env = False''', '''pass'''),
    "a platform without a compiler": ('''            if not run.compiles:
                raise''', '''            raise'''),
    "an evaluation into the time of the last": ('''and self.time_for_steps() >= self.evaluation_seconds''', ''''''),
    "rows lost where a log was edited": ('''if not kept or (number.isdigit() and int(number) <= step):''', '''if len(kept) <= step:'''),
    "a capital hides a field": ('''{str(name).lower().strip(): name for name in record}''', '''{name: name for name in record}'''),
    "duplicates counted among the answers": ('''            report.drop("same prompt and answer as before", location)
            continue''', '''            report.drop("same prompt and answer as before", location)
            report.answers.update(kept[-1].fields.values())
            continue'''),
    "dropout differs after resume": ('''torch.manual_seed((run.config.seed * 1_000_003 + run.state.step) * 1009 + rank)''', '''pass'''),
    "best overwritten by worse": ('''better = reached > best and''', '''better = state.val_loss != 4.0 and'''),
    "rounded weights saved, not masters": ('''Path(run.config.out_dir) / name, run.base, run.state.optimizer.masters''', '''Path(run.config.out_dir) / name, run.base, {n: p.detach().float() for n, p in run.state.optimizer.parameters.items()}'''),
    "weights saved in 16 bits": ('''Path(run.config.out_dir) / name, run.base, run.state.optimizer.masters''', '''Path(run.config.out_dir) / name, run.base, {n: p.detach() for n, p in run.state.optimizer.parameters.items()}'''),
    "resume repeats a step": ('''    save_checkpoint(Path(run''', '''    state["step"] -= 1\n    save_checkpoint(Path(run'''),
    "resume with other data": ('''if values and values["data"] != meta["checksum"]:''', '''if False:'''),
    "end-of-text the last id of the vocabulary": ('''model.config.eos_token_id = meta["stop"]''', '''model.config.eos_token_id = model.config.vocab_size - 1'''),
    "the compiler is imported for nothing": ('''if is_compiled(model) else''', '''if True else'''),
    "evaluation runs compiled": ('''torch.compiler.set_stance("force_eager")''', '''torch.compiler.set_stance("default")'''),
    "gradients left by an attempt": ('''            p.grad = None
            p.grad_dtype =''', '''            p.grad_dtype ='''),
    "the longest example anywhere": ('''    if epoch == 0:
        order''', '''    if False:
        order'''),
    "a run cleared before another fits": ('''    if config.resume:
        clear(out_dir, ())
        report.cut_rows''', '''    clear(out_dir, () if config.resume else RESULTS)
    if config.resume:
        clear(out_dir, ())
        report.cut_rows'''),
    "a first step that makes kernels in the pace": ('''if self.steps < 2 else''', '''if self.steps < 1 else'''),
    "two runs in one directory": ('''            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)''', '''            pass'''),
    "losses of three digits": ('''f"{value:.8g}"''', '''f"{value:.3g}"'''),
    # sampling
    "an adapter over any base": ('''sha256_of(*weight_files(base)) != trained_on''', '''sha256_of(*weight_files(base)) == ""'''),
    "export rounds": ('''pick_dtype("float32" if config.export else config.dtype, device)''', '''pick_dtype(config.dtype, device)'''),
    "label's stop not scored": ('''encode(render_answer(label, loaded.spec), loaded''', '''encode(render_answer(label, loaded.spec)[:-1], loaded'''),
    "labels without what the template writes before them": ('''    if spec["template"] != "model":\n        return [(text, True)''', '''    if True:\n        return [(text, True)'''),
    "a space of the template twice in a chat": ('''answer.removeprefix(before)''', '''answer'''),
    "a line end of the template twice in a chat": ('''.removesuffix(after)})]''', '''})]'''),
    "half an answer with the end of a whole one": ('''half = half.removesuffix(''', '''half = half.removeprefix('''),
    "thoughts taken apart": ('''if rewrites and any(''', '''if False and any('''),
    "a chat that ends at a thought": ('''rewrites = roles[-1] == "assistant" and''', '''rewrites ='''),
    "files of two commits": ('''fetch(repository, weights, commit) and''', '''fetch(repository, weights) and'''),
    "more answers expected than there are": ('''self.scored = len(self.prompts) if by else 0''', '''self.scored = scored'''),
    "turns forgotten for a prompt that cannot fit": ('''if len(prompt) <= context:''', '''if True:'''),
    "characters broken while streaming": ('''text.rstrip("\\ufffd")''', '''text'''),
    "answers cut by another's prompt": ('''model.generate(prompts, limit, stop''', '''model.generate(prompts, min(limit, model.config.block_size - max(map(len, prompts))), stop'''),
    "a label scored past the context": ('''prompt[longest - self.config.block_size - 1:]''', '''prompt[:]'''),
    "the star on the lowest loss alone": ('''-scores[i] if best_by != "loss" else 0''', '''0'''),
    "a pair as a text": ('''if roles[0] == "prompt" and template != "text":''', '''if roles[0] == "prompt":'''),
    "formats before a chat's turns": ('''    if template == "chat":\n''', '''    if template == "chat" and prompt is None:\n'''),
    "a bare model without its beginning": ('''[(begin, False), *segments] if spec.get("starts_with_bos") else''', ''''''),
    "no wording in Ollama's prompt": ('''segments = loaded.prompt([*before,''', '''segments = [(USER, False)] or loaded.prompt([*before,'''),
    # what a hunt by hand found that no test noticed
    "a relative base not found from elsewhere by LoRA": ('''        changes.setdefault("init_from", values["base"]["name"])''', '''        pass'''),
    "a penalty by another row's ids": ('''seen = seen[left]''', '''seen = seen[:len(left)]'''),
    "skipped steps add up": ('''state.skipped = 0 if''', '''state.skipped = state.skipped if'''),
    "broken steps saved": ('''    if state.skipped:\n        return False\n''', ''''''),
    "ids of large vocabularies wrap": ('''"<u2" if n_vocab <= 2**16''', '''"<u2" if n_vocab <= 2**18'''),
    "the seed leaves the order": ('''.default_rng([seed, epoch])''', '''.default_rng([0, epoch])'''),
    "a held-out file of a directory is trained on": ('''held_out = {*files.get("val", ()), ''', '''held_out = {'''),
    "half an answer learned": ('''is_empty = any(name in record''', '''is_empty = bool(answers) and all(name in record'''),
    "a foreign vocabulary asked": ('''if path.parent != vocabulary and has_other_vocabulary(path.parent, vocabulary):''', '''if False:'''),
    "a column named twice is two": ('''return list(dict.fromkeys(NAME.findall(wording)))''', '''return NAME.findall(wording)'''),
    "UTF-8 read as something else": (''' or is_utf8(head):''', ''':'''),
    "a row is where it ends": ('''line, stop = stop + 1, rows.line_num + skipped''', '''line = stop = rows.line_num + skipped'''),
    "Ollama's answers end without their end": ('''TURN.format("assistant", answered)''', '''TURN.format("assistant", "")'''),
    "Ollama keeps turns that were never learned": ('''    if loaded.keeps_turns():\n        with contextlib''', '''    if loaded.is_chat():\n        with contextlib'''),
    "a link replaced": ('''path = Path(os.path.realpath(path))''', '''path = Path(path)'''),
    "a device replaced": ('''if Path(config.output).exists() and not Path(config.output).is_file():''', '''if Path(config.output).is_dir():'''),
    "a bug hidden from its owner": ('''    except UserError as error:\n        fail(error, code)''', '''    except Exception as error:\n        fail(error, code)'''),
}

# which tests are to find a break in a file; those of processes, which are slow, where the break's name says so
TESTS = {"prepare_data.py": ["sources", "prepare_data"], "model.py": ["model", "lora", "train"], "train.py": ["train", "kill", "sample", "lora"],
         "sample.py": ["sample", "lora", "train"], "checkpoint.py": ["train", "kill"], "device.py": ["train"],
         "distributed.py": ["processes"], "files.py": ["kill", "sample"], "flags.py": ["train", "bad_input"],
         "optimizer.py": ["optimizer", "train"], "records.py": ["sources", "prepare_data", "sample"], "sources.py": ["sources"], "llamacpp.py": ["llamacpp"],
         "report.py": ["train"], "pace.py": ["train"], "pictures.py": ["train"],
         "score.py": ["sample"], "shards.py": ["model", "prepare_data", "train", "bad_input"],
         "hub.py": ["weights", "sources", "lora"], "tokenizer.py": ["tokenizer"], "chat_template.py": ["chat_template"],
         "templates.py": ["prepare_data", "sources", "sample"], "weights.py": ["weights", "model", "lora"]}


def where(name):
    """The file that holds the code of this break."""
    code = MUTATIONS[name][0]
    paths = [path for path in [*ROOT.glob("*.py"), *(ROOT / "nanosft").glob("*.py")]
             for _ in range(path.read_text(encoding="utf-8").count(code))]
    if len(paths) != 1:
        sys.exit(f"{name}: its code stands in {[path.name for path in paths]}, not once")
    return paths[0].relative_to(ROOT)


def found(name):
    """Whether the tests fail on the code so broken, and the first that did, or the end of what they said."""
    file, (code, broken) = where(name), MUTATIONS[name]
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "nanosft"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out*", "__pycache__", "demo"))
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(text.replace(code, broken), encoding="utf-8")
        if (ROOT.parent / "shared").exists():
            (Path(work) / "shared").symlink_to(ROOT.parent / "shared")
        names, chosen = list(TESTS[file.name]), "not slow"
        if "process" in name:
            names, chosen = ["processes"], "slow or not slow"
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-n0", "-m", chosen,
                               *(f"tests/test_{test}.py" for test in names)], cwd=copy, capture_output=True, text=True)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return done.returncode == 1, failed[0].split("::")[1].split(" - ")[0] if failed else done.stdout[-300:]


if __name__ == "__main__":
    wanted = [name for name in MUTATIONS if all(word in name for word in sys.argv[1:])]
    for name in wanted:
        where(name)  # all are looked up before the hours of work
    missed = 0
    for name in wanted:
        caught, by = found(name)
        missed += not caught
        print(f"| {name} | {'found by ' + by if caught else 'NOT FOUND ' + by} |", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} found")
    sys.exit(missed > 0)
