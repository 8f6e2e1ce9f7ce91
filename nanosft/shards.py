"""Prepared data on disk: written by prepare_data.py, read by train.py.

A shard is a numpy file of (id, flags), one entry a token; examples lie end to end and never span two shards. meta.json
holds what was prepared, a checksum of every shard, and one of itself. A training step is a pure function of (data,
seed, step): no sampler has a state that could be lost.
"""
import contextlib
import functools
import math
from array import array
from pathlib import Path

import numpy as np
import torch

from model import IGNORE_INDEX
from nanosft.console import UserError
from nanosft.files import crc32_of, crc32_of_json, read_json, write_json

FORMAT_VERSION = 3
SUPERVISED, START = 1, 2  # bits of a token's flags: the loss counts its prediction; an example starts here


# ---- writing --------------------------------------------------------------------------------------------------------

class ShardWriter:
    """Writes one split's examples as shards, each of up to `shard_tokens` or one longer example, and counts them."""

    def __init__(self, directory, split, n_vocab, shard_tokens):
        self.directory, self.split, self.shard_tokens = directory, split, shard_tokens
        self.dtype = np.dtype([("id", "<u2" if n_vocab <= 2**16 else "<u4"), ("flags", "u1")])
        self.counts = {"examples": 0, "tokens": 0, "supervised_tokens": 0, "longest": 0, "shards": {}}
        self.ids, self.flags = array("I"), bytearray()  # of the shard that is open

    def add(self, ids, flags):
        """Appends one example: a list of token ids and as many bytes of flags."""
        if len(self.ids) + len(ids) > self.shard_tokens:
            self.close()
        self.ids.extend(ids)
        self.flags += flags
        self.counts["examples"] += 1
        self.counts["longest"] = max(self.counts["longest"], len(ids))

    def close(self):
        """Writes the shard that is open, if one is."""
        if self.ids:
            path = self.directory / f"{self.split}_{len(self.counts['shards']):05d}.npy"
            tokens = np.empty(len(self.ids), self.dtype)
            tokens["id"], tokens["flags"] = self.ids, self.flags
            np.save(path, tokens)
            self.counts["tokens"] += len(tokens)
            self.counts["supervised_tokens"] += int(np.count_nonzero(tokens["flags"] & SUPERVISED))
            self.counts["shards"][path.name] = crc32_of(path)
            self.ids, self.flags = array("I"), bytearray()


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
    path, meta = Path(data_dir) / "meta.json", {}
    if not path.is_file():
        others = sorted(str(other.parent) for other in Path(data_dir).parent.glob("*/meta.json"))
        raise UserError(f"--data_dir: no prepared data in {data_dir}; run python prepare_data.py first"
                        + (f", or name {', '.join(others)}" if others else ""))
    with contextlib.suppress(UserError):  # no JSON
        meta = read_json(path)
    if (meta.get("format_version"), meta.get("checksum")) != (FORMAT_VERSION, checksum_of(meta)):
        raise UserError(f"{path} is damaged, or of another version: run prepare_data.py again")
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
        the next token, or IGNORE_INDEX where that is not supervised. Those that begin alike follow each other: the
        model computes their beginning once."""
        examples = sorted((self[i] for i in indices), key=lambda example: example["id"].tobytes())
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
def order_of_epoch(data, batch_size, seed, epoch):
    """The examples of an epoch, (len(data),). The first epoch begins with the batch of the longest one: if that does
    not fit into memory, a run fails at once."""
    order = np.random.default_rng([seed, epoch]).permutation(len(data))
    if epoch == 0:
        order = np.roll(order, -(data.lengths[order].argmax() // batch_size * batch_size))
    return order


def examples_of_step(step, data, batch_size, seed):
    """The examples of a step, from 0. Every epoch takes all in a new order; its last step takes what is left."""
    epoch, place = divmod(step, math.ceil(len(data) / batch_size))
    return order_of_epoch(data, batch_size, seed, epoch)[place * batch_size:(place + 1) * batch_size]


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
