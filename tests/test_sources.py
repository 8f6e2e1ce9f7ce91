"""The files and records that people have: what each becomes, what is said about it, and what is refused."""
import datetime
import gzip
import http.server
import json
import shlex
import threading

import pytest
from conftest import write_lines

import prepare_data
from nanosft.console import UserError
from nanosft.records import Unusable, to_messages
from nanosft.sources import paths_of, read_records
from prepare_data import PrepareConfig

PLAIN = {"template": "chat", "prompt_format": "", "response_format": ""}
NAN = float("nan")


def said(record, spec=PLAIN):
    """A record's messages as (role, text), with a - before the role of an answer that is not learned; and the names of
    the fields that were not used."""
    messages, rest = to_messages(record, spec)
    return [(role if learned or role != "assistant" else f"-{role}", "|".join(filter(None, map(str, fields.values()))))
            for role, fields, learned in messages], sorted(rest)


def turns(*pairs, role="role", content="content", **more):
    return [{role: who, content: what, **more} for who, what in pairs]


ASKED = [("user", "q"), ("assistant", "a")]
BRIEF = [("system", "s"), *ASKED]
TWICE = [("user", "q1"), ("assistant", "a1"), *ASKED]
OPENAI = turns(*BRIEF)
IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "q"}]
# what it is: the record, its messages, the fields that are not used
RECORDS = {
    "Alpaca": ({"instruction": "q", "input": "", "output": "a"}, ASKED, []),
    "Alpaca with an input": ({"instruction": "q", "input": "i", "output": "a"},
                             [("user", "q|i"), ("assistant", "a")], []),
    "Alpaca with its rendering": ({"instruction": "q", "output": "a", "text": "q a"}, ASKED, ["text"]),
    "Alpaca with nulls": ({"instruction": "q", "input": None, "system": NAN, "output": "a"}, ASKED, []),
    "Alpaca with a system prompt": ({"system": "s", "instruction": "q", "output": "a"}, BRIEF, []),
    "LLaMA-Factory's history": (
        {"instruction": "q", "input": "", "output": "a", "history": [["q1", "a1"]]}, TWICE, []),
    "LLaMA-Factory's empty history": ({"instruction": "q", "output": "a", "system": "", "history": []}, ASKED, []),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "open_qa"},
              [("user", "q|c"), ("assistant", "a")], ["category"]),
    "GSM8K": ({"question": "q", "answer": "a"}, ASKED, []),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"}, BRIEF, ["id"]),
    "MetaMath": ({"query": "q", "response": "a", "type": "GSM"}, ASKED, ["type"]),
    "input and output": ({"input": "q", "output": "a"}, ASKED, []),
    "an empty instruction": ({"instruction": "", "input": "q", "output": "a"}, ASKED, []),
    "an answer under the second name": ({"instruction": "q", "output": None, "response": "a"}, ASKED, []),
    "an instruction to a question": ({"instruction": "i", "question": "q", "answer": "a"},
                                     [("user", "i|q"), ("assistant", "a")], []),
    "two answers": ({"instruction": "q", "output": "a", "response": "b"}, ASKED, ["response"]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, [("prompt", "q"), ("completion", "a")], []),
    "prompt and response": ({"prompt": "q", "response": "a"}, [("prompt", "q"), ("completion", "a")], []),
    "a number and a truth": ({"question": 3, "answer": True}, [("user", "3"), ("assistant", "true")], []),
    "text": ({"text": "t"}, [("text", "t")], []),
    "text with a label": ({"text": "t", "label": 3}, [("text", "t")], ["label"]),
    "text with a search": ({"text": "t", "query": "x"}, [("text", "t")], ["query"]),
    "OpenAI's messages": ({"messages": OPENAI}, BRIEF, []),
    "a developer": ({"messages": turns(("developer", "s"), *ASKED)}, BRIEF, []),
    "great letters": ({"messages": turns(("User", "q"), ("Assistant", "a"))}, ASKED, []),
    "a list as the whole line": (OPENAI, BRIEF, []),
    "names of turns": ({"messages": turns(*ASKED, name="Ann")}, ASKED, ["name of a turn"]),
    "a message that is not learned": (
        {"messages": [*turns(*TWICE[:1]), {"role": "assistant", "content": "a1", "weight": 0}, *turns(*ASKED)]},
        [("user", "q1"), ("-assistant", "a1"), *ASKED], []),
    "a weight of 1": ({"messages": turns(*ASKED, weight=1)}, ASKED, []),
    "parts of text in a table": ({"messages": turns(("user", [{"type": "text", "text": "q", "image": None}]),
                                                    ("assistant", "a"))}, ASKED, []),
    "parts of text": ({"messages": turns(("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]),
                                         ("assistant", [{"type": "text", "text": "a"}]))},
                      [("user", "q!"), ("assistant", "a")], []),
    "messages with a system prompt beside them": ({"system": "s", "messages": turns(*ASKED)}, BRIEF, []),
    "two system prompts": ({"system": "t", "messages": OPENAI}, BRIEF, ["system"]),
    "UltraChat": ({"prompt": "q", "messages": turns(*ASKED)}, ASKED, ["prompt"]),
    "ShareGPT": ({"conversations": turns(("human", "q"), ("gpt", "a"), role="from", content="value")}, ASKED, []),
    "ShareGPT with a system prompt": (
        {"id": 7, "system": "s", "conversations": turns(("human", "q"), ("gpt", "a"), role="from", content="value")},
        BRIEF, ["id"]),
    "ShareGPT with role and content": ({"conversations": turns(*ASKED)}, ASKED, []),
    "messages with from and value": ({"messages": turns(*ASKED, role="from", content="value")}, ASKED, []),
    "messages as JSON in a column": ({"messages": json.dumps(OPENAI)}, BRIEF, []),
    "TRL's conversational prompt": (
        {"prompt": turns(("system", "s"), ("user", "q")), "completion": turns(("assistant", "a"))}, BRIEF, []),
    "TRL's prompt of several turns": (
        {"prompt": turns(*TWICE[:3]), "completion": turns(("assistant", "a"))},
        [("user", "q1"), ("-assistant", "a1"), *ASKED], []),
    "TRL's prompt and a text": ({"prompt": turns(("user", "q")), "completion": "a"}, ASKED, []),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [("prompt", "q")], ["chosen", "rejected"]),
    "capitals, with a field that is not used": ({"Text": "t", "Label": 1}, [("text", "t")], ["Label"]),
    "one capital": ({"Instruction": "q", "input": "i", "output": "a", "Id": 3},
                    [("user", "q|i"), ("assistant", "a")], ["Id"]),
    "the same in two cases": ({"Text": "T", "text": "t"}, [("text", "t")], ["Text"]),
    "capitals": ({"Question": "q", " ANSWER": "a"}, ASKED, []),
    "a list of one text": ({"question": "q", "answer": ["a"]}, ASKED, []),
    "ShareGPT with text": ({"conversations": turns(("human", "q"), ("gpt", "a"), role="from", content="text")},
                           ASKED, []),
    "a history as JSON": ({"instruction": "q", "output": "a", "history": '[["q1", "a1"]]'}, TWICE, []),
    "an empty history as JSON": ({"instruction": "q", "output": "a", "history": "[]"}, ASKED, []),
    "a date": ({"question": "q", "answer": datetime.date(2026, 11, 28)},
               [("user", "q"), ("assistant", "2026-11-28")], []),
    "a prompt with a system prompt": ({"system": "s", "prompt": "q", "response": "a"}, BRIEF, []),
    "a prompt without the others' system prompt": ({"system": None, "prompt": "q", "completion": "a"},
                                                   [("prompt", "q"), ("completion", "a")], []),
    "a prompt with a history": ({"prompt": "q", "completion": "a", "history": [["q1", "a1"]]}, TWICE, []),
    "a prompt with a context": ({"prompt": "q", "context": "i", "response": "a"},
                                [("user", "q|i"), ("assistant", "a")], []),
    "columns that are no turns": ({"from": "en", "to": "de", "prompt": "q", "completion": "a"},
                                  [("prompt", "q"), ("completion", "a")], ["from", "to"]),
    "tools beside a conversation without calls": ({"messages": turns(*ASKED), "tools": [{"x": 1}]}, ASKED, ["tools"]),
}


@pytest.mark.parametrize("record, messages, unused", RECORDS.values(), ids=RECORDS)
def test_what_a_record_becomes(record, messages, unused):
    before = json.dumps(record, default=str)
    assert said(record) == (messages, unused)
    assert json.dumps(record, default=str) == before  # it is left as it came, for test.jsonl


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
# what is wrong: the record, the reason by which it is counted
UNUSABLE = {
    "no answer": ({"instruction": "q"}, "no answer"),
    "a null answer": ({"instruction": "q", "output": None}, "no answer"),
    "an empty answer": ({"instruction": "q", "output": " \n"}, "no answer"),
    "an answer that is NaN": ({"question": "q", "answer": NAN}, "no answer"),
    "no turns": ({"messages": []}, "no answer"), "null for turns": ({"messages": None}, "no answer"),
    "no last answer": ({"messages": turns(("user", "q"))}, "no answer"),
    "an empty turn": ({"messages": turns(("user", "q"), ("assistant", ""))}, "no answer"),
    "an empty turn in the midst": ({"messages": turns(("user", "q"), ("assistant", None), *ASKED)}, "no answer"),
    "nothing to learn": ({"messages": turns(*ASKED, weight=0)}, "no answer"),
    "no question": ({"instruction": " ", "output": "a"}, "no question"),
    "an empty question": ({"messages": turns(("user", ""), ("assistant", "a"))}, "no question"),
    "a tool call": ({"messages": [*turns(("user", "q")), CALL]}, "a tool call"),
    "a function call": ({"messages": turns(*ASKED, function_call={"name": "f"})}, "a tool call"),
    "a tool's answer": ({"messages": turns(*ASKED, ("tool", "x"), *ASKED)}, "an unknown role"),
    "a forged role": ({"messages": turns(("user", "q"), ("assistant\n", "a"))}, "an unknown role"),
    "no role": ({"messages": [{"role": None, "content": "q"}]}, "a field that is no text"),
    "half a weight": ({"messages": turns(*ASKED, weight=0.5)}, "a weight that is neither 0 nor 1"),
    "an image": ({"messages": turns(("user", IMAGE), ("assistant", "a"))}, "a part that is no text"),
    "an image beside a text": ({"messages": turns(("user", [{"text": "q", "image": "x.png"}]), ("assistant", "a"))},
                               "a part that is no text"),
    "several answers": ({"question": "q", "answer": ["a", "b"]}, "a field that is no text"),
    "a list of texts": ({"text": ["a", "b"]}, "a field that is no text"),
    "cells that are cut": ({"question": "q", "answer": "a", "truncated_cells": ["answer"]},
                           "cells that the hub's viewer has cut"),
    "a nested list": ({"paragraph": "p", "qas": [{"question": "q", "answer": "a"}]}, "unknown kind of record"),
    "preferences alone": ({"chosen": turns(*ASKED), "rejected": turns(*ASKED)}, "unknown kind of record"),
    "an object for an answer": ({"question": "q", "answer": {"text": ["a"]}}, "a field that is no text"),
    "a list of numbers": ({"text": [1, 2]}, "a field that is no text"),
    "a history of texts": ({"instruction": "q", "output": "a", "history": ["x"]}, "a history that is no list of pairs"),
    "turns that are texts": ({"messages": ["q", "a"]}, "no conversation"),
    "another kind": ({"text": "t"}, "not of the kind of the first"),
    "a pair among conversations": ({"prompt": "q", "completion": "a"}, "not of the kind of the first"),
    "unknown fields": ({"q": "q", "a": "a"}, "unknown kind of record"),
    "no fields": ({}, "unknown kind of record"),
    "no record": (3, "a record is an object with named fields"),
    "half a surrogate pair": ({"instruction": "\ud800", "output": "a"}, "broken text"),
}
GOOD = [{"messages": turns(("user", f"q{i}"), ("assistant", "a"))} for i in range(3)]


@pytest.mark.parametrize("record, reason", UNUSABLE.values(), ids=UNUSABLE)
def test_what_cannot_be_used_is_dropped_and_counted_or_refused(record, reason, tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", [*GOOD, record, record])

    def prepare(**flags):
        return prepare_data.main(PrepareConfig(input=str(path), out_dir=str(tmp_path / "d"), encoding="bytes", show=0,
                                               val_fraction=0, test_fraction=0, **flags))
    assert prepare()["train"]["examples"] == 3
    line, = (line for line in capsys.readouterr().out.splitlines() if "dropped" in line)
    assert line.startswith(f"2 dropped: {reason} (first: a.jsonl, line 4")
    with pytest.raises(UserError, match=f"^a.jsonl, line 4: {reason}"):
        prepare(strict=True)


ROWS = [{"question": "q1", "answer": "a1"}, {"question": "q2", "answer": "a2"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
VIEWER = {"features": [], "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)],
          "num_rows_total": 2}
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
SHUFFLED = {"question": {"0": "q1", "1": "q2"}, "answer": {"1": "a2", "0": "a1"}}
PANDAS = {name: {str(i): value for i, value in enumerate(column)} for name, column in COLUMNS.items()}
TABLE = "question,answer\nq1,a1\nq2,a2\n"
TURNS = [{"messages": turns(*ASKED)}, {"messages": turns(*TWICE)}]
# the file's name, its content, its records
FILES = [
    ("lines.jsonl", LINES, ROWS), ("lines.json", LINES, ROWS), ("lines.ndjson", LINES, ROWS),
    ("blank.jsonl", "\n\n" + LINES.replace("\n", "\r\n\r\n"), ROWS),
    ("list.json", json.dumps(ROWS), ROWS), ("list.jsonl", json.dumps(ROWS), ROWS),
    ("indented.json", json.dumps(ROWS, indent=2), ROWS), ("indented.jsonl", json.dumps(ROWS, indent=2), ROWS),
    ("objects.json", "\n".join(json.dumps(row, indent=1) for row in ROWS), ROWS),
    ("one.json", json.dumps(ROWS[0], indent=1), ROWS[:1]), ("glued.json", LINES.replace("\n", ""), ROWS),
    ("data.json", json.dumps({"version": "1", "data": ROWS}), ROWS), ("train.json", json.dumps({"train": ROWS}), ROWS),
    ("both.json", json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1), ROWS),
    ("viewer.json", json.dumps(VIEWER), ROWS), ("columns.json", json.dumps(COLUMNS), ROWS),
    ("pandas.json", json.dumps(PANDAS), ROWS), ("shuffled.json", json.dumps(SHUFFLED), ROWS),
    ("table.json", json.dumps({"schema": {"fields": []}, "data": ROWS}), ROWS),
    ("nested.json", json.dumps({"messages": [row["messages"] for row in TURNS]}), TURNS),
    ("single.json", json.dumps({"text": ["a", "b"]}), [{"text": "a"}, {"text": "b"}]),
    ("null.json", json.dumps([None, *ROWS]), [None, *ROWS]),
    ("ner.jsonl", '{"tokens": ["a", "b"], "tags": ["x", "y"]}\n' * 2, [{"tokens": ["a", "b"], "tags": ["x", "y"]}] * 2),
    ("chats.json", json.dumps(TURNS), TURNS),
    ("turns.jsonl", "".join(json.dumps(row["messages"]) + "\n" for row in TURNS), [row["messages"] for row in TURNS]),
    ("turns.json", json.dumps(TURNS[0]["messages"]), [TURNS[0]["messages"]]),
    ("conversations.json", json.dumps([row["messages"] for row in TURNS]), [row["messages"] for row in TURNS]),
    ("trl.json", json.dumps({"prompt": turns(("user", "q")), "completion": turns(("assistant", "a"))}),
     [{"prompt": turns(("user", "q")), "completion": turns(("assistant", "a"))}]),
    ("mails.json", json.dumps(turns(("a@b", "x"), ("c@d", "y"), role="from", content="text")),
     turns(("a@b", "x"), ("c@d", "y"), role="from", content="text")),
    ("line.jsonl", '{"title": "t", "authors": [{"name": "x"}]}', [{"title": "t", "authors": [{"name": "x"}]}]),
    ("extra.json", json.dumps({**ROWS[0], "sources": [{"a": 1}]}), [{**ROWS[0], "sources": [{"a": 1}]}]),
    ("table.csv", TABLE, ROWS), ("semicolons.csv", TABLE.replace(",", ";"), ROWS),
    ("tabs.csv", TABLE.replace(",", "\t"), ROWS), ("table.tsv", TABLE.replace(",", "\t"), ROWS),
    ("commas.tsv", TABLE, ROWS), ("crlf.csv", TABLE.replace("\n", "\r\n"), ROWS),
    ("excel.csv", TABLE.replace("\n", ",,\n"), ROWS), ("empty_rows.csv", TABLE.replace("q2", "\n,\nq2"), ROWS),
    ("spaced.csv", 'question, answer\nq1, "a1"\nq2, a2\n', ROWS),
    ("quoted.csv", '"question", "answer"\n"q1", "a1"\n', ROWS[:1]),
    ("kept.csv", "question,answer\nq1, a1\n", [{"question": "q1", "answer": " a1"}]),
    ("index.csv", ",question,answer\n0,q1,a1\n", [{"column 1": "0", **ROWS[0]}]),
    ("quotes.csv", 'question,answer\n"say ""q""","a, b"\n', [{"question": 'say "q"', "answer": "a, b"}]),
    ("escaped.csv", 'question,answer\n"say \\"q\\", twice","C:\\dir"\n', [{"question": 'say "q", twice',
                                                                         "answer": "C:\\dir"}]),
    ("escaped_outside.csv", 'question,answer\nsay \\"q\\" now,y\n"a \\"b\\", c\\n",z\n', [
        {"question": 'say "q" now', "answer": "y"}, {"question": 'a "b", c\\n', "answer": "z"}]),
    ("bare_quotes.tsv", 'question\tanswer\n"Hello there\ta1\nq2\ta2\n5 foot 2"\ta3\n', [
        {"question": '"Hello there', "answer": "a1"}, {"question": "q2", "answer": "a2"},
        {"question": '5 foot 2"', "answer": "a3"}]),
    ("sep.csv", "sep=;\r\nquestion;answer\r\nq1;a1\r\n", ROWS[:1]),
    ("tab.csv", "sep=\t\r\nquestion\tanswer\r\nq1\ta1\r\n", ROWS[:1]),
    ("backslash.csv", 'question,answer\n"C:\\",a\n', [{"question": "C:\\", "answer": "a"}]),
    ("newline.csv", 'question,answer\n"one\ntwo",a\n', [{"question": "one\ntwo", "answer": "a"}]),
    ("one_column.csv", "text\nla la\nlo, lo\n".replace("lo, lo", '"lo, lo"'), [{"text": "la la"}, {"text": "lo, lo"}]),
    ("book.txt", "one\ntwo\n", [{"text": "one\ntwo\n"}]),
    ("songs.txt", "one\ntwo\n<|endoftext|>\n\nthree\n<|endoftext|>\n", [{"text": "one\ntwo"}, {"text": "three"}]),
    ("inline.txt", "a <|endoftext|> b\n", [{"text": "a <|endoftext|> b\n"}]),
    ("mac.txt", "a\r\nb\rc", [{"text": "a\nb\nc"}]),
]


@pytest.mark.parametrize("name, content, records", FILES, ids=[name for name, *_ in FILES])
def test_what_a_file_holds(name, content, records, tmp_path, capsys):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"):
        (tmp_path / name).write_bytes(content.encode(encoding))
        assert [record for _, record in read_records(tmp_path / name)] == records, encoding
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert [record for _, record in read_records(tmp_path / f"{name}.gz")] == records
    printed = {"both.json": "both.json: not used: test", "data.json": "data.json: not used: version",
               "viewer.json": "viewer.json: not used: features, num_rows_total",
               "table.json": "table.json: not used: schema"}.get(name, "")
    assert {line.replace(".gz", "") for line in capsys.readouterr().out.splitlines()} == set(filter(None, [printed]))


def test_rows_that_the_viewer_has_cut_are_told_from_whole_ones(tmp_path):
    rows = [{"row_idx": i, "row": row, "truncated_cells": ["a"] * i} for i, row in enumerate(ROWS)]
    (tmp_path / "a.json").write_text(json.dumps({"rows": rows}))
    write_lines(tmp_path / "a.jsonl", rows)
    for name in ("a.json", "a.jsonl"):
        assert [record for _, record in read_records(tmp_path / name)] == [
            ROWS[0], {**ROWS[1], "truncated_cells": ["a"]}]


def test_hidden_folders_and_packed_parquet_are_not_read(tmp_path, capsys):
    for name in (".hidden/a.jsonl", "sub/.b.jsonl", "sub/c.jsonl", "sub/d.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert paths_of("input", str(tmp_path)) == [tmp_path / "sub" / "c.jsonl"]
    assert capsys.readouterr().out == f"{tmp_path}: not read: d.parquet.gz\n"


def test_a_row_is_where_it_begins_and_an_empty_text_counts(tmp_path):
    (tmp_path / "a.csv").write_text('\nq,answer\n"1\n2",a\n\n\n"3\n4\n",b\n5,c\n')
    assert [place for place, _ in read_records(tmp_path / "a.csv")] == [f"a.csv, line {n}" for n in (3, 7, 10)]
    (tmp_path / "a.csv").write_text("sep=,\nq,answer\n1,a\n")
    assert [place for place, _ in read_records(tmp_path / "a.csv")] == ["a.csv, line 3"]
    (tmp_path / "b.csv").write_text('q,answer\n"1\n2",a,b\n')
    with pytest.raises(UserError, match="b.csv, line 2: 3 fields where the header has 2"):
        list(read_records(tmp_path / "b.csv"))
    for text in ("", " \n"):
        (tmp_path / "c.txt").write_text(text)
        assert list(read_records(tmp_path / "c.txt")) == [("c.txt, line 1", {"text": text})]


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("question,answer\ncafé,“ja”\n".encode("cp1252"))
    with pytest.raises(UserError, match="^a.csv, in or after line 1: .*0xe9.*--text_encoding=cp1252"):
        list(read_records(tmp_path / "a.csv"))
    with pytest.raises(UserError, match="^--text_encoding: Python knows no 'klingon'; try cp1252"):
        list(read_records(tmp_path / "a.csv", "klingon"))
    (_, record), = read_records(tmp_path / "a.csv", "cp1252")
    assert record == {"question": "café", "answer": "“ja”"}
    (tmp_path / "c.csv").write_bytes("question,answer\nq,a\n".encode("utf-8-sig"))
    assert [record for _, record in read_records(tmp_path / "c.csv", "UTF8")] == [{"question": "q", "answer": "a"}]
    for number, (encoding, text) in enumerate([("cp1252", "é"), ("utf-8", "é"), ("utf-8-sig", "e"), ("utf-16", "é")]):
        (tmp_path / f"{number}.csv").write_bytes(f"question,answer\n{text},a\n".encode(encoding))
        assert next(read_records(tmp_path / f"{number}.csv", "cp1252"))[1] == {"question": text, "answer": "a"}
    (tmp_path / "a.txt").write_bytes("\u3000\u3000第一章".encode("utf-16-le"))  # by its zeros it seems to be UTF-16-BE
    assert next(read_records(tmp_path / "a.txt", "utf-16-le"))[1] == {"text": "\u3000\u3000第一章"}
    (tmp_path / "b.csv").write_bytes("question,answer\nдом,да\n".encode("utf-16"))
    assert [record for _, record in read_records(tmp_path / "b.csv")] == [{"question": "дом", "answer": "да"}]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table
    rows = [{**row, "score": None, "messages": turns(*ASKED)} for row in ROWS] * 3000
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    found = list(read_records(tmp_path / "a.parquet"))
    assert [record for _, record in found] == rows and found[-1][0] == "a.parquet, row 6000"
    (tmp_path / "label=b").mkdir()
    parquet.write_table(Table.from_pylist(ROWS), tmp_path / "label=b" / "a.parquet")
    assert [record for _, record in read_records(tmp_path / "label=b" / "a.parquet")] == [
        {"label": "b", **row} for row in ROWS]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(UserError, match="a.parquet, after row 0: .*; write it again, with plain columns"):
        list(read_records(tmp_path / "a.parquet"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with data sets of two configs in parquet; those of `gated` are for the token `right`."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table
    files = {f"/datasets/{config}/{split}/{number}.parquet": [{"question": f"{config} {split} {number}", "answer": "a"}]
             for config in ("default", "small") for split in ("train", "test") for number in (0, 1)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.path, self.headers["Authorization"]))
            content, status = b"", 404
            if self.path in files:
                parquet.write_table(Table.from_pylist(files[self.path]), tmp_path / "sent")
                content, status = (tmp_path / "sent").read_bytes(), 200
            elif self.path.endswith("/parquet"):
                status = 401 if "gated" in self.path and self.headers["Authorization"] != "Bearer right" else 200
                content = json.dumps(server.listing or {config: {split: [
                    f"{server.url}{path}" for path in files if f"/{config}/{split}/" in path]
                    for split in ("train", "test")} for config in ("default", "small")}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-9] if server.cut and self.path in files else content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.requests, server.listing, server.cut = f"http://127.0.0.1:{server.server_port}", [], None, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.shutdown()
    server.server_close()


def test_data_sets_by_name_are_downloaded_once(hub, tmp_path, monkeypatch):
    def questions_of(name):
        return [record["question"] for path in paths_of("input", name) for _, record in read_records(path)]
    assert questions_of("hf:owner/name") == ["default train 0", "default train 1"]
    assert questions_of("hf:owner/name:small") == ["small train 0", "small train 1"]
    assert questions_of("hf:owner/name:test") == ["default test 0", "default test 1"]
    count = len(hub.requests)
    assert questions_of("hf:owner/name:small:test") == ["small test 0", "small test 1"]
    hub.listing = {"default": {}}  # what the hub has later is not mixed with what it had
    assert questions_of("hf:owner/name:small:test") == ["small test 0", "small test 1"]
    assert len(hub.requests) == count + 2  # each file once
    hub.listing = None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(questions_of("hf:owner/name,hf:owner/name:test")) == 4 and len(hub.requests) == count + 2
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match=r"the hub refuses gated/name \(401\).*set HF_TOKEN"):
        questions_of("hf:gated/name")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert len(questions_of("hf:gated/name")) == 2 and hub.requests[-1][1] == "Bearer right"
    elsewhere = f"{hub.url.replace('127.0.0.1', 'localhost')}/datasets/default/train/0.parquet"
    hub.listing = {"default": {"train": [elsewhere]}}
    assert len(questions_of("hf:other/name")) == 1 and hub.requests[-1][1] is None  # the token is the hub's alone
    hub.listing = None
    meta = prepared(tmp_path, input="hf:owner/name", val_input="hf:owner/name:test", out_dir="")
    assert meta["train"]["examples"] == meta["val"]["examples"] == 2


def test_what_goes_wrong_with_a_data_set_is_one_line(hub, tmp_path, monkeypatch):
    for name, listing, message in (
            ("hf:name", None, "hf:name is no data set; write hf:owner/name"),
            ("hf:a/b:c:d:e", None, "is no data set; write"), ("hf:../b", None, "is no data set; write"),
            ("hf:a/b:x", None, "a/b's splits are train, test; name one as in hf:owner/name:config:split"),
            ("hf:a/b:x:test", None, "a/b's configs are default, small; name one"),
            ("hf:a/c", {"x": {"all": []}, "y": {}}, "a/c's configs are x, y; name one"),
            ("hf:a/d", {"error": "no"}, "list of a/d's files is not as expected; name the path of a copy"),
            *(("hf:a/d", listing, "list of a/d's files is not as expected") for listing in (
                [{"default": []}], {"default": {"train": None}}, {"default": None}, "a login page")),
            ("hf:a/e", {"../../x": {"train": []}}, "list of a/e's files is not as expected")):
        hub.listing = listing
        with pytest.raises(UserError, match=message):
            paths_of("input", name)
    assert not list(tmp_path.rglob("datasets--a--d/**/listing.json"))
    hub.listing, hub.cut = None, True
    with pytest.raises(UserError, match="the download of a/f failed .*; check the name and the network and try again"):
        paths_of("input", "hf:a/f")
    assert not list(tmp_path.rglob("0000*"))
    hub.cut = False
    assert len(paths_of("input", "hf:a/f")) == 2
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="test/0.parquet is not in the cache and HF_HUB_OFFLINE is set; unset it"):
        paths_of("input", "hf:a/f:test")
    with pytest.raises(UserError, match="/a/g/parquet is not in the cache and HF_HUB_OFFLINE is set; unset it"):
        paths_of("input", "hf:a/g")


def test_several_files_directories_and_patterns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.csv", "in/c.txt", "in/deep/d.txt", "in/.hidden.txt", "in/notes.pdf", "e, f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(LINES)

    def found(names):
        return [str(path) for path in paths_of("input", names)]
    assert found("a.jsonl,b.csv") == ["a.jsonl", "b.csv"] and found("b.csv,a.jsonl,b.csv") == ["b.csv", "a.jsonl"]
    assert found("in") == ["in/c.txt", "in/deep/d.txt"] and found("e, f.jsonl") == ["e, f.jsonl"]
    assert capsys.readouterr().out == "in: not read: notes.pdf\n"
    assert found("a.jsonl, b.csv,") == ["a.jsonl", "b.csv"]
    assert found("*.jsonl") == ["a.jsonl", "e, f.jsonl"] and found("in/**/*.txt") == ["in/c.txt", "in/deep/d.txt"]
    for names, message in (("no.jsonl", "'no.jsonl' is not there; give a file"), ("a.jsonl,no.csv", "'no.csv' is not"),
                           ("in/notes.pdf", "notes.pdf is none of .json"),
                           (",", "',' names no file"), (".", ". has texts .* and records; name one kind"),
                           ("*.xlsx", r"'\*.xlsx' is not")):
        with pytest.raises(UserError, match=f"^--input: {message}"):
            paths_of("input", names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="'empty' is a directory without such files"):
        paths_of("val_input", "empty")


def prepared(tmp_path, **flags):
    return prepare_data.main(PrepareConfig(**{**dict(out_dir=str(tmp_path / "d"), encoding="bytes", show=0), **flags}))


def questions(count, start=0):
    return [{"question": f"q{i}", "answer": "a"} for i in range(start, start + count)]


def test_own_files_for_validation_and_test(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", questions(30))
    write_lines(tmp_path / "v.jsonl", questions(10, 28))
    write_lines(tmp_path / "t.jsonl", questions(5, 29))
    meta = prepared(tmp_path, input=str(tmp_path / "a.jsonl"), val_input=str(tmp_path / "v.jsonl"),
                    test_input=str(tmp_path / "t.jsonl"))
    assert [meta[split]["examples"] for split in ("train", "val", "test")] == [30, 10, 5]
    assert [json.loads(line) for line in (tmp_path / "d" / "test.jsonl").read_text().splitlines()] == questions(5, 29)
    lines = capsys.readouterr().out.splitlines()
    assert "2 prompts of val stand in training too" in lines and "1 prompts of test stand in training too" in lines
    for name, start in (("train", 0), ("Test-1", 30), ("valuable", 60)):  # a directory, and what of it is held out
        (tmp_path / "split").mkdir(exist_ok=True)
        write_lines(tmp_path / "split" / f"{name}.jsonl", questions(20, start))
    prepared(tmp_path, input=str(tmp_path / "split"))
    assert "Test-1.jsonl is trained on, too; --test_input and --val_input hold out" in capsys.readouterr().out
    meta = prepared(tmp_path, input=str(tmp_path / "split"), test_input=str(tmp_path / "split" / "Test-1.jsonl"))
    assert meta["test"]["examples"] == 20 and meta["train"]["examples"] + meta["val"]["examples"] == 40
    assert "Test-1.jsonl" not in capsys.readouterr().out
    meta = prepared(tmp_path, input=str(tmp_path / "a.jsonl"), val_input=str(tmp_path / "v.jsonl"), test_fraction=0.3)
    assert meta["val"]["examples"] == 10 and 25 > meta["train"]["examples"] == 30 - meta["test"]["examples"]


def test_fields_that_are_not_used_are_named_once_and_a_label_is_explained(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": i % 3, "id": i} for i in range(12)])
    prepared(tmp_path, input=str(tmp_path / "a.jsonl"))
    lines = capsys.readouterr().out.splitlines()
    assert "not used: label (12 records), id (12 records)" in lines
    hint, = (line for line in lines if line.startswith("to classify by"))
    assert hint == r'to classify by label, add --prompt_format="{text}\nlabel:" --response_format=" {label}"'
    write_lines(tmp_path / "b.jsonl", [{"Text": f"t{i}", "dc:It's": i % 3 / 2, "a$b": 1 + i % 2} for i in range(12)])
    prepared(tmp_path, input=str(tmp_path / "b.jsonl"))
    hint, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("to classify by"))
    assert hint.endswith("""add --prompt_format="{Text}\\ndc:It's:" --response_format=" {dc:It's}\"""")
    flags = dict(word[2:].split("=", 1) for word in shlex.split(hint.split(" add ")[1]) if word.startswith("--"))
    prepared(tmp_path, input=str(tmp_path / "b.jsonl"), show=9, **flags)
    assert "dc:It's:>>> 0.5<" in capsys.readouterr().out
    prepared(tmp_path, input=str(tmp_path / "a.jsonl"), template="text", response_format="{id}")
    assert r'to classify by label, add --prompt_format="{id}\nlabel:"' in capsys.readouterr().out
    prepared(tmp_path, input=str(tmp_path / "a.jsonl"), prompt_format=r"{text}\nlabel:", response_format=" {label}")
    assert "not used: id (12 records)" in capsys.readouterr().out.splitlines()


def test_documents_in_one_file_and_in_several_are_split_whole(tmp_path):
    songs = [f"song {i}\nla la" for i in range(40)]
    (tmp_path / "songs.txt").write_text("\n---\n".join(songs))
    (tmp_path / "folder").mkdir()
    for i, song in enumerate(songs):
        (tmp_path / "folder" / f"{i}.txt").write_text(song)
    for name, flags in (("songs.txt", dict(separator="---")), ("folder", {})):
        meta = prepared(tmp_path, input=str(tmp_path / name), test_fraction=0.2, **flags)
        assert sum(meta[split]["examples"] for split in ("train", "val", "test")) == 40
        held_out = [json.loads(line)["text"] for line in (tmp_path / "d" / "test.jsonl").read_text().splitlines()]
        assert 1 < len(held_out) < 20 and set(held_out) < set(songs) and meta["block_size"] == 1024


@pytest.mark.parametrize("flags, message", [
    (dict(separator="---"), "--separator: '---' parts no documents in a.txt; leave it out"),
    (dict(template="chat"), "a .txt file is plain text; leave them out"),
    (dict(prompt_format="{a}", response_format="{b}"), "a .txt file is plain text; leave them out"),
    (dict(input="", val_input="a.txt"), "--input: needed with --val_input and --test_input")])
def test_flags_without_an_effect_are_refused(flags, message, tmp_path):
    (tmp_path / "a.txt").write_text("la la\n")
    with pytest.raises(UserError, match=message):
        prepared(tmp_path, **{**dict(input=str(tmp_path / "a.txt")), **flags})


def test_the_preview_tells_a_special_token_from_text_that_looks_like_one(tmp_path, capsys):
    write_lines(tmp_path / "a.jsonl", [{"prompt": "q<|endoftext|>", "completion": "a<|endoftext|>"}])
    prepared(tmp_path, input=str(tmp_path / "a.jsonl"), show=1, val_fraction=0, test_fraction=0)
    assert capsys.readouterr().out.splitlines()[-1] == r"q\<|endoftext|>>>>a\<|endoftext|><|endoftext|><<<"


def test_messages_are_chats_and_pairs_follow_a_template_that_is_named(tmp_path):
    for records, flags, template in (
            ([{"messages": turns(*TWICE)}], {}, "chat"), ([{"messages": turns(*ASKED)}], {}, "chat"),
            ([{"instruction": "q", "output": "a"}], {}, "alpaca"), ([{"question": "q", "answer": "a"}], {}, "alpaca"),
            ([{"instruction": "q", "output": "a", "system": "s"}], {}, "chat"),
            ([{"prompt": "q", "completion": "a"}], dict(template="chat"), "chat"),
            ([{"prompt": "q", "completion": "a"}], dict(template="alpaca"), "alpaca")):
        write_lines(tmp_path / "a.jsonl", records)
        meta = prepared(tmp_path, input=str(tmp_path / "a.jsonl"), val_fraction=0, test_fraction=0, **flags)
        assert (meta["prompt"]["template"], meta["prompt"]["response_format"]) == (template, "")


def test_formats_under_a_chat_template_are_its_turns(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"title": "a", "by": "b", "kind": "c"}])
    write_lines(tmp_path / "b.jsonl", [{"messages": turns(("user", "a, by b"), ("assistant", "c!"))}])
    formats = dict(prompt_format="{title}, by {by}", response_format="{kind}!", template="chat")
    for name, flags in (("a", formats), ("b", {})):
        meta = prepared(tmp_path, input=str(tmp_path / f"{name}.jsonl"), out_dir=str(tmp_path / name), val_fraction=0,
                        test_fraction=0, **flags)
        assert meta["prompt"]["template"] == "chat"
    a, b = ((tmp_path / name / "train_00000.npy").read_bytes() for name in "ab")
    assert a == b


def test_an_unusable_record_says_why():
    with pytest.raises(Unusable, match="an unknown role: 'tool' is none of system, user, assistant") as caught:
        to_messages({"messages": turns(("tool", "x"))}, PLAIN)
    assert caught.value.reason == "an unknown role"


def test_fields_that_tests_forgot(tmp_path):
    assert said({"instruction": "i", "query": "q", "answer": "a"}) == ([("user", "i|q"), ("assistant", "a")], [])
    spec = {"template": "alpaca", "prompt_format": "{q}", "response_format": "{a} {b}"}
    assert said({"q": "q", "a": "1", "b": None}, spec) == ([("prompt", "q")], [])  # no half of an answer
    for chat in (turns(("User", "q"), ("Assistant", "a")), turns(("human", "q"), ("gpt", "a"), role="from",
                                                                 content="value")):
        (tmp_path / "a.json").write_text(json.dumps(chat))
        assert [record for _, record in read_records(tmp_path / "a.json")] == [chat]


def test_a_directorys_held_out_file_is_not_trained_on(tmp_path):
    for name, start in (("train", 0), ("val", 30)):
        write_lines(tmp_path / f"{name}.jsonl", questions(20, start))
    meta = prepared(tmp_path, input=str(tmp_path), val_input=str(tmp_path / "val.jsonl"), test_fraction=0)
    assert (meta["train"]["examples"], meta["val"]["examples"]) == (20, 20)
