"""What counting words reaches on a classification table: multinomial naive Bayes, on prepare_data.py's own split.

    python tests/baseline.py ../shared/data/arxiv.csv data/arxiv category
"""
import csv
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path


def words(record, label):
    return re.findall(r"[a-z]+", " ".join(text for name, text in record.items() if name != label).lower())


def naive_bayes(train, test, label, smoothing=0.1):
    """The share of `test` records whose `label` naive Bayes, fitted on `train`, gives right."""
    counts, documents = {}, Counter(record[label] for record in train)
    for record in train:
        counts.setdefault(record[label], Counter()).update(words(record, label))
    vocabulary = set().union(*counts.values())
    totals = {name: sum(count.values()) + smoothing * len(vocabulary) for name, count in counts.items()}

    def score(name, text):
        return math.log(documents[name]) + sum(
            math.log((counts[name][word] + smoothing) / totals[name]) for word in text if word in vocabulary)
    right = sum(max(counts, key=lambda name: score(name, words(record, label))) == record[label] for record in test)
    return right / len(test)


if __name__ == "__main__":
    table, data_dir, label = sys.argv[1:]
    with open(table, newline="", encoding="utf-8-sig") as file:
        records = list(csv.DictReader(file))
    test = [json.loads(line) for line in (Path(data_dir) / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = {json.dumps(record) for record in test}
    train = [record for record in records if json.dumps(record) not in held_out]
    print(f"naive Bayes on words, {len(train)} records: {naive_bayes(train, test, label):.1%} of {len(test)} right")
