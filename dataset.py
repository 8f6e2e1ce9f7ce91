"""What train.py reads of what prepare_data.py wrote, and which examples a step takes.

A step is a pure function of (data, seed, step): there is no sampler whose state could be lost.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch

from console import UserError
from model import IGNORE
from prepare_data import FORMAT_VERSION, START, SUPERVISED, get_encoding


def examples_of_step(step, n_examples, batch_size, seed):
    """The examples of optimizer step `step` (from 0): every epoch is a new order of all, its last step what is left."""
    epoch, place = divmod(step, math.ceil(n_examples / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(n_examples)
    return order[place * batch_size:(place + 1) * batch_size]


def micro_batches(indices, lengths, budget):
    """Splits examples into groups of like length whose rows x longest stay within `budget` tokens, longest first."""
    groups = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


class Shards:
    """One split of a data_dir, memory-mapped: `len()` examples, each an array of (id, flags). UserError where the files
    are not as prepare_data.py wrote them."""

    def __init__(self, data_dir, meta, split, max_examples=0):
        self.files, ranges, supervised = [], [], 0
        for name in meta[split]["shards"]:
            tokens, starts, learned = self.read(Path(data_dir) / name, meta["vocab_size"])
            supervised += learned
            ranges.append(np.stack([np.full_like(starts, len(self.files)), starts,
                                    np.append(starts[1:], len(tokens))], axis=1))
            self.files.append(tokens)
        self.ranges = np.concatenate(ranges) if ranges else np.zeros((0, 3), np.int64)
        counts = {"examples": len(self.ranges), "tokens": sum(map(len, self.files)), "supervised_tokens": supervised}
        for name, count in counts.items():
            if count != meta[split][name]:
                raise UserError(f"{data_dir}: the {split} shards and meta.json disagree, {count:,} against "
                                f"{meta[split][name]:,} {name}; run prepare_data.py again")
        self.lengths = self.ranges[:, 2] - self.ranges[:, 1] - 1  # inputs: the last token has nothing to predict
        if not ((0 < self.lengths) & (self.lengths <= meta["block_size"])).all() or split == "train" and not len(self):
            raise UserError(f"{data_dir}: the {split} split has no examples, or some that are no 2 to "
                            f"{meta['block_size'] + 1:,} tokens long; run prepare_data.py again")
        self.ranges, self.lengths = self.ranges[:max_examples or None], self.lengths[:max_examples or None]

    @staticmethod
    def read(path, vocab_size, size=1 << 16):
        """(a shard's tokens, where its examples start, how many are supervised), checked in parts of this size."""
        def check(true, message):
            if not true:
                raise UserError(f"{path} {message}: run prepare_data.py again")

        check(path.is_file(), "is missing")
        try:
            tokens = np.lib.format.open_memmap(path, mode="r")
        except OSError:
            raise
        except Exception as error:  # numpy raises many kinds for a damaged header
            raise UserError(f"{path} is damaged ({error}): run prepare_data.py again") from None
        dtypes = [np.dtype([("id", kind), ("flags", "u1")]) for kind in ("<u2", "<u4")]
        check(tokens.ndim == 1 and tokens.dtype in dtypes,
              f"is damaged (it holds {tokens.dtype} of shape {tokens.shape}, no tokens)")
        starts, supervised = [np.zeros(0, np.int64)], 0
        for first in range(0, len(tokens), size):
            ids, flags = tokens["id"][first:first + size], tokens["flags"][first:first + size]
            check(ids.max() < vocab_size, f"is damaged (the token id {ids.max()} is past a vocabulary of {vocab_size})")
            check(flags.max() <= SUPERVISED | START, f"is damaged ({flags.max()} are no flags of a token)")
            starts.append(first + np.flatnonzero(flags & START))
            supervised += int(np.count_nonzero(flags & SUPERVISED))
        starts = np.concatenate(starts)
        check(len(starts) and starts[0] == 0, "is damaged (it does not begin with an example)")
        return tokens, starts, supervised

    def __len__(self):
        return len(self.ranges)

    def __getitem__(self, i):
        file, start, stop = self.ranges[i]
        return self.files[file][start:stop]

    def batch(self, indices):
        """Packs examples end to end: (ids (N,), targets (N,), lengths), the targets IGNORE where unsupervised."""
        examples = [self[i] for i in indices]
        idx = np.concatenate([tokens["id"][:-1] for tokens in examples]).astype(np.int64)
        targets = np.concatenate([np.where(tokens["flags"][1:] & SUPERVISED, tokens["id"][1:].astype(np.int64), IGNORE)
                                  for tokens in examples])
        return torch.from_numpy(idx), torch.from_numpy(targets), self.lengths[indices]

    def batches(self, indices, budget, rank=0, processes=1):
        """One process's share of a step as micro-batches: from `rank` on every `processes`-th example by length; at
        least one, perhaps of nothing to learn, since all must take part."""
        mine = sorted(indices, key=lambda i: -self.lengths[i])[rank::processes]
        if len(mine):
            return [self.batch(group) for group in micro_batches(mine, self.lengths, budget)]
        idx, targets, lengths = self.batch(indices[:1])
        return [(idx, targets.fill_(IGNORE), lengths)]

    def supervised(self, indices):
        """How many targets of these examples the loss counts."""
        return sum(int(np.count_nonzero(self[i]["flags"][1:] & SUPERVISED)) for i in indices)


def load_meta(data_dir):
    """What prepare_data.py wrote in meta.json."""
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        raise UserError(f"--data_dir: no prepared data in {data_dir}; run python prepare_data.py first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; run prepare_data.py again") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT_VERSION}; run prepare_data.py again")
    counts = dict(examples=int, tokens=int, supervised_tokens=int, longest=int, shards=list)
    kinds = {"": dict(encoding=str, vocab_size=int, block_size=int, seed=int, source_sha256=str, prompt=dict,
                      train=dict, val=dict),
             "prompt.": dict(template=str, prompt_format=str, response_format=str), "train.": counts, "val.": counts}
    for group, names in kinds.items():
        for name, kind in names.items():
            value = (meta[group[:-1]] if group else meta).get(name)
            if type(value) is not kind or kind is list and value != [
                    f"{group[:-1]}_{i:05d}.npy" for i in range(len(value))]:
                raise UserError(f"{path} is damaged: {group}{name} is {value!r}; run prepare_data.py again")
    try:
        n_vocab = get_encoding(meta["encoding"]).n_vocab
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if meta["vocab_size"] != n_vocab:
        raise UserError(f"{path} is damaged: vocab_size is {meta['vocab_size']}, {meta['encoding']} has {n_vocab} "
                        "tokens; run prepare_data.py again")
    return meta


def identity(meta):
    """What must not change between the parts of a run."""
    return {name: meta[name] for name in ("source_sha256", "encoding", "prompt", "block_size", "seed", "train", "val")}
