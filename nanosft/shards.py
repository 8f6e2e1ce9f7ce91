"""Prepared data on disk: written by prepare_data.py, read by train.py.

A shard is a numpy file of (id, flags), one entry a token; examples lie end to end and never span two shards. meta.json
holds what was prepared, a checksum of every shard, and one of itself. A training step is a pure function of (data,
seed, step): no sampler has a state that could be lost.
"""
import functools
import json
import math
from pathlib import Path

import numpy as np

from nanosft.console import UserError
from nanosft.files import crc32_of, crc32_of_json, write_json

FORMAT_VERSION = 3
SUPERVISED, START = 1, 2  # bits of a token's flags: the loss counts its prediction; an example starts here


# ---- writing --------------------------------------------------------------------------------------------------------

class ShardWriter:
    """Writes one split's examples as shards, each of up to `shard_tokens` or one longer example, and counts them."""

    def __init__(self, directory, split, n_vocab, shard_tokens):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.dtype = np.dtype([("id", "<u2" if n_vocab <= 2**16 else "<u4"), ("flags", "u1")])
        self.counts = {"examples": 0, "tokens": 0, "supervised_tokens": 0, "longest": 0, "shards": {}}
        self.file, self.in_shard = None, 0
        self.ids, self.flags = [], bytearray()  # tokens that wait to be written together

    def add(self, ids, flags):
        """Appends one example: a list of token ids and as many bytes of flags."""
        if self.in_shard and self.in_shard + len(ids) > self.shard_tokens:
            self.close()
        self.ids += ids
        self.flags += flags
        self.in_shard += len(ids)
        self.counts["examples"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["longest"] = max(self.counts["longest"], len(ids))
        if len(self.ids) > 1 << 16:
            self.flush()

    def write_header(self, n_tokens):
        np.lib.format.write_array_header_1_0(self.file, {
            "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (n_tokens,)})

    def flush(self):
        if not self.file:
            self.file = open(self.directory / f"{self.split}_{len(self.counts['shards']):05d}.npy", "wb")
            self.write_header(0)  # numpy pads it, so that the true number fits in its place at the end
        tokens = np.empty(len(self.ids), self.dtype)
        tokens["id"], tokens["flags"] = self.ids, self.flags
        self.counts["supervised_tokens"] += int(np.count_nonzero(tokens["flags"] & SUPERVISED))
        self.file.write(tokens.tobytes())
        self.ids, self.flags = [], bytearray()

    def close(self):
        """Completes the shard that is open, if one is."""
        if self.in_shard:
            self.flush()
            self.file.seek(0)
            self.write_header(self.in_shard)
            self.file.close()
            self.counts["shards"][Path(self.file.name).name] = crc32_of(self.file.name)
        self.file, self.in_shard = None, 0


def write_meta(directory, meta):
    """Writes meta.json with its checksum, and returns what it holds."""
    meta = {**meta, "checksum": checksum_of(meta)}
    write_json(Path(directory) / "meta.json", meta)
    return meta


def checksum_of(meta):
    """The CRC-32 of all that meta.json holds but its checksum."""
    return crc32_of_json({name: value for name, value in meta.items() if name != "checksum"})


# ---- reading --------------------------------------------------------------------------------------------------------

def load_meta(data_dir):
    """What meta.json holds, after its checksum is verified."""
    path = Path(data_dir) / "meta.json"
    if not path.is_file():
        raise UserError(f"--data_dir: no prepared data in {data_dir}; run python prepare_data.py first")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        version, whole = meta["format_version"], meta.get("checksum") == checksum_of(meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # no JSON, or not such an object
        version, whole = FORMAT_VERSION, False
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format {version}, this program reads {FORMAT_VERSION}; run prepare_data.py again")
    if not whole:
        raise UserError(f"{path} is damaged: run prepare_data.py again")
    return meta


class Shards:
    """The examples of one split, memory-mapped: `len()`, and `[i]`, an array with the fields `id` and `flags`.

    `lengths`: (len,) int64, each example's number of inputs: its tokens but the last, which has nothing to predict.
    UserError where a file is not as prepare_data.py wrote it. max_examples: only the first so many; 0 = all.
    """

    def __init__(self, data_dir, meta, split, max_examples=0):
        self.files, ranges = [], [np.zeros((0, 3), np.int64)]
        for name, checksum in meta[split]["shards"].items():
            path = Path(data_dir) / name
            if not path.is_file() or crc32_of(path) != checksum:
                raise UserError(f"{path} is {'damaged' if path.is_file() else 'missing'}: run prepare_data.py again")
            tokens = np.load(path, mmap_mode="r")
            starts = np.flatnonzero(tokens["flags"] & START)
            stops = np.append(starts[1:], len(tokens))
            ranges.append(np.stack([np.full_like(starts, len(self.files)), starts, stops], axis=1))
            self.files.append(tokens)
        self.ranges = np.concatenate(ranges)  # (len, 3): the example's file, its first token, the one after its last
        if max_examples:
            self.ranges = self.ranges[:max_examples]
        self.lengths = self.ranges[:, 2] - self.ranges[:, 1] - 1

    def __len__(self):
        return len(self.ranges)

    def __getitem__(self, i):
        file, start, stop = self.ranges[i]
        return self.files[file][start:stop]

    def batch(self, indices):
        """These examples end to end: (idx (N,), targets (N,), lengths), int64 tensors and a list of int. A target is
        the next token, or IGNORE_INDEX where that is not supervised."""
        import torch  # here: prepare_data.py does without, and starts in a quarter of the time

        from model import IGNORE_INDEX
        examples = [self[i] for i in indices]
        ids = [example["id"].astype(np.int64) for example in examples]
        targets = [np.where(example["flags"][1:] & SUPERVISED, own[1:], IGNORE_INDEX)
                   for example, own in zip(examples, ids, strict=True)]
        idx = np.concatenate([own[:-1] for own in ids])
        return torch.from_numpy(idx), torch.from_numpy(np.concatenate(targets)), [len(own) - 1 for own in ids]

    def batches(self, indices, max_tokens, rank=0, world_size=1):
        """The micro-batches of one process, longest first: of these examples, ordered by length, it takes every
        `world_size`-th from `rank` on. [] where none is left for it."""
        mine = sorted(indices, key=lambda i: -self.lengths[i])[rank::world_size]
        return [self.batch(group) for group in micro_batches(mine, self.lengths, max_tokens)]

    def supervised(self, indices):
        """How many targets of these examples the loss counts."""
        return sum(int(np.count_nonzero(self[i]["flags"][1:] & SUPERVISED)) for i in indices)


# ---- which examples a step takes ------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=1)
def order_of_epoch(n_examples, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n_examples)


def examples_of_step(step, n_examples, batch_size, seed):
    """The examples of optimizer step `step`, from 0. Every epoch takes all of them in a new order; its last step takes
    what is left."""
    epoch, place = divmod(step, math.ceil(n_examples / batch_size))
    return order_of_epoch(n_examples, seed, epoch)[place * batch_size:(place + 1) * batch_size]


def micro_batches(indices, lengths, max_tokens):
    """Splits examples into groups of like length, longest first. A group's size times its longest example stays within
    `max_tokens`; one that is longer than that is a group by itself."""
    groups = []
    for i in sorted(indices, key=lambda i: -lengths[i]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
