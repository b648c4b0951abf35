"""Readers of GLUE data: the layout of each task, and the refusal of any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from raymoe.finetune.readers import TaskData, read_task
from raymoe.finetune.tasks import TASKS, Example

MNLI_TEXT = "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2"
LAYOUTS = {
    "cola": ("", "ab01\t1\t\tOne cat sleeps.\nab01\t0\t*\tOne cats sleep.\n"),
    "sst2": ("sentence\tlabel\n", 'one "good cat \t1\na bad day \t0\n'),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n", "1\t7\t8\tA cat.\t\"A cat\n0\t7\t9\tA cat.\tA dog.\n"),
    "stsb": (
        "\t".join(["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"]) + "\n",
        "0\tg\tf\t2012\t1\tnone\tnone\tA cat.\tA dog.\t5.000\n1\tg\tf\t2012\t2\tnone\tnone\tA cat.\tRain.\t0.25\n",
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n",
        "1\t2\t3\tWhat is it?\tWhat is that?\t1\n2\t4\t5\tWhy?\t\t0\n",
    ),
    "mnli": (
        MNLI_TEXT + "\tlabel1\tgold_label\n",
        "0\t1\t1n\tg\t(\t(\t(\t(\tA cat.\tAn animal.\tx\tentailment\n1\t1\t1n\tg\t(\t(\t(\t(\tA cat.\tNo cat.\tx\tcontradiction\n",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n", "0\tWho?\tA cat.\tentailment\n1\tWho?\tRain.\tnot_entailment\n"),
    "rte": ("index\tsentence1\tsentence2\tlabel\n", "0\tA.\tB.\tnot_entailment\n1\tA.\tA.\tentailment\n"),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n", "0\tA.\tB.\t1\n1\tA.\tC.\t0\n"),
}  # fmt: skip
"""Task -> header and two rows, as in the classic download."""

EXPECTED = {
    "cola": [("One cat sleeps.", None, 1), ("One cats sleep.", None, 0)],
    "sst2": [('one "good cat ', None, 1), ("a bad day ", None, 0)],
    "mrpc": [("A cat.", '"A cat', 1), ("A cat.", "A dog.", 0)],
    "stsb": [("A cat.", "A dog.", 5.0), ("A cat.", "Rain.", 0.25)],
    "qqp": [("What is it?", "What is that?", 1), ("Why?", "", 0)],
    "mnli": [("A cat.", "An animal.", 0), ("A cat.", "No cat.", 2)],
    "qnli": [("Who?", "A cat.", 0), ("Who?", "Rain.", 1)],
    "rte": [("A.", "B.", 1), ("A.", "A.", 0)],
    "wnli": [("A.", "B.", 1), ("A.", "C.", 0)],
}


def write(folder: Path, name: str, train: str | bytes | None = None) -> Path:
    """Write the files of a task; `train` replaces the content of train.tsv."""
    content = "".join(LAYOUTS[name])
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("train.tsv", *(split.file for split in TASKS[name].dev)):
        (folder / file).write_text(content, encoding="utf-8")
    if train is not None:
        (folder / "train.tsv").write_bytes(train.encode() if isinstance(train, str) else train)
    return folder


def read(folder: Path, name: str) -> TaskData:
    return read_task(TASKS[name], str(folder))


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("above", [False, True], ids=["the folder", "the folder above"])
def test_each_task_is_read_in_its_layout(name: str, above: bool, tmp_path: Path) -> None:
    folder = write(tmp_path / TASKS[name].folder, name)
    data = read(tmp_path if above else folder, name)
    expected = [Example(*row) for row in EXPECTED[name]]
    assert data.train == expected and data.skipped == [] and data.source == str(folder)
    assert data.dev == {split.name: expected for split in TASKS[name].dev}


def test_windows_line_ends_and_other_separators_of_unicode_are_read(tmp_path: Path) -> None:
    write(tmp_path, "sst2", "sentence\tlabel\r\nan odd\u2028te\rxt\t1\r\na cat\t0")
    assert read(tmp_path, "sst2").train == [("an odd\u2028te\rxt", None, 1), ("a cat", None, 0)]


@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        ("sst2", "", r"train\.tsv:1: the file is empty, expected a header with sentence, label"),
        ("sst2", "sentence\tlabel\n", r"train\.tsv:2: no examples, expected a row of sentence, label"),
        ("cola", "", r"train\.tsv:1: no examples, expected a row of source, label, mark, sentence"),
        ("sst2", "index\tsentence\n0\ta\n", r"train\.tsv:1: .* 'index', 'sentence', expected 'sentence', 'label'"),
        ("sst2", "a\t1\nb\t0\n", r"train\.tsv:1: the header has the columns 'a', '1', expected"),
        ("sst2", "sentence\tlabel\na\t1\nb\n", r"train\.tsv:3: 1 columns .*, expected 2: sentence, label"),
        ("sst2", "sentence\tlabel\na\t1\n\nb\t1\n", r"train\.tsv:3: 1 columns"),
        ("cola", "ab\t1\t\tA.\nab\t1\tA.\n", r"train\.tsv:2: 3 columns .*, expected 4: source, label, mark, sentence"),
        ("sst2", "sentence\tlabel\na\t1\nb\t2\n", r"train\.tsv:3: label is '2', expected one of '0', '1'"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", r"train\.tsv:2: label is '1', .*'entailment'"),
        ("stsb", LAYOUTS["stsb"][0] + "0\tg\tf\t1\t1\ts\ts\tA\tB\t5.5\n", r"train\.tsv:2: score is '5\.5', expected a number"),
        ("stsb", LAYOUTS["stsb"][0] + "0\tg\tf\t1\t1\ts\ts\tA\tB\tnan\n", r"train\.tsv:2: score is 'nan'"),
        ("qqp", LAYOUTS["qqp"][0] + "1\t2\t3\tA\tB\t1\n2\t3\tA\n", r"train\.tsv:3: 1 of 2 rows .* at most 0\.1%"),
        ("sst2", b"sentence\tlabel\na\t1\n\xff\t1\n", r"train\.tsv:\d: not UTF-8"),
    ],
)  # fmt: skip
def test_another_layout_is_refused_with_file_line_and_expectation(
    name: str, train: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, name, train), name)


def test_a_few_broken_rows_of_qqp_are_skipped_and_reported(tmp_path: Path) -> None:
    header, rows = LAYOUTS["qqp"]
    data = read(write(tmp_path, "qqp", header + "9\t9\tbroken\n" + rows * 500), "qqp")
    assert len(data.train) == 1000
    assert data.skipped == [f"{tmp_path / 'train.tsv'}: 1 of 1001 rows without 6 columns, first in line 2"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither .*train\.tsv nor .*SST-2/train\.tsv"):
        read(tmp_path, "sst2")
    folder = write(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_mismatched\.tsv does not exist"):
        read(folder, "mnli")


def test_the_fingerprint_is_of_the_examples(tmp_path: Path) -> None:
    first = read(write(tmp_path / "a", "sst2"), "sst2").fingerprint
    assert read(write(tmp_path / "b", "sst2"), "sst2").fingerprint == first
    changed = "".join(LAYOUTS["sst2"]).replace("bad", "sad")
    assert read(write(tmp_path / "c", "sst2", changed), "sst2").fingerprint != first


def on_the_hub(monkeypatch: pytest.MonkeyPatch, **splits: dict[str, list[Any]]) -> None:
    sets = datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})
    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: {("nyu-mll/glue", "mrpc"): sets}[name])


def test_the_hub_gives_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"sentence1": ["A cat."] * 2, "sentence2": ['"A cat', "A dog."], "label": [1, 0], "idx": [0, 1]}
    on_the_hub(monkeypatch, train=rows, validation=rows, test=rows | {"label": [-1, -1]})
    data = read_task(TASKS["mrpc"], None)
    assert data.train == data.dev[""] == [Example(*row) for row in EXPECTED["mrpc"]]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"sentence1": ["a"], "sentence2": ["b"], "label": [-1]}}, "row 0: label is -1, expected 0 to 1"),
        ({"train": {"sentence1": ["a"], "label": [0]}}, "no column 'sentence2', expected sentence1, sentence2, label"),
        ({"train": {"sentence1": [None], "sentence2": ["b"], "label": [0]}}, "row 0: .* expected to be text"),
        ({"train": {"sentence1": ["a"], "sentence2": ["b"], "label": [0]}}, "no split 'validation'"),
    ],
)
def test_another_layout_on_the_hub_is_refused(
    splits: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(monkeypatch, **splits)
    with pytest.raises(ValueError, match=message):
        read_task(TASKS["mrpc"], None)


def test_an_unreachable_hub_is_reported_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "dataset_info", fails)
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(ValueError, match=r"nyu-mll/glue, mrpc .*ConnectionError: no network.* --data"):
        read_task(TASKS["mrpc"], None)
