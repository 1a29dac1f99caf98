"""Labelled tasks: what is read, how labels are numbered, and what is said about files that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataCorruptError, MaskwrightError, NotFoundError
from trainer.finetune_config import TaskConfig
from trainer.tasks import load_task

ROWS = [{"text": "one", "label": "b"}, {"text": "zwei\u2028drei", "label": "a"}]


def write(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> TaskConfig:
    folder.mkdir(exist_ok=True)
    for split, written in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return TaskConfig(name="t", path=str(folder))


def task_of(folder: Path, **splits: list[dict[str, Any]]) -> TaskConfig:
    return write(folder, {"train": ROWS, "dev": ROWS, "test": ROWS, **splits})


def test_labels_are_numbered_in_sorted_order_and_texts_keep_the_order_of_the_file(tmp_path: Path) -> None:
    task = load_task(task_of(tmp_path / "t"), tmp_path)
    assert task.label_names == ("a", "b")
    assert task.train.texts == ("one", "zwei\u2028drei")
    assert task.train.labels == (1, 0)
    assert task.train.text_pairs is None
    assert (len(task.dev), task.num_labels) == (2, 2)


def test_integer_labels_are_sorted_by_value(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (10, 2, -1)]
    task = load_task(task_of(tmp_path / "t", train=rows, dev=rows, test=rows), tmp_path)
    assert task.label_names == ("-1", "2", "10")
    assert task.test.labels == (2, 1, 0)


def test_csv_with_quotes_pairs_and_a_byte_order_mark(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_bytes('\ufeffq,a,y\n"line one\nline two, still",p,1\nother,r,0\n'.encode())
    task = load_task(TaskConfig(name="t", path=str(tmp_path), text="q", text_pair="a", label="y"), tmp_path)
    assert task.train.texts == ("line one\nline two, still", "other")
    assert task.train.text_pairs == ("p", "r")
    assert task.train.labels == (1, 0)


def test_digest_depends_on_every_row_and_on_nothing_else(tmp_path: Path) -> None:
    first = load_task(task_of(tmp_path / "a"), tmp_path).digest
    assert load_task(task_of(tmp_path / "b"), tmp_path).digest == first
    assert load_task(task_of(tmp_path / "c", test=ROWS[:1]), tmp_path).digest != first


def test_python_docs_is_written_once_into_the_work_folder(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):  # as an earlier attempt left it
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert load_task(TaskConfig(name="t", path="python-docs"), tmp_path).train.labels == (1, 0)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"there is no folder .*/nowhere"):
        load_task(TaskConfig(name="t", path=str(tmp_path / "nowhere")), tmp_path)


def test_a_missing_file_is_named_with_what_is_there(tmp_path: Path) -> None:
    config = write(tmp_path / "t", {"train": ROWS, "test": ROWS})
    with pytest.raises(NotFoundError, match=r"expected dev.jsonl or dev.csv in .*, found test.jsonl, train.jsonl"):
        load_task(config, tmp_path)


@pytest.mark.parametrize(
    ("splits", "error", "said"),
    [
        ({"train": [{"words": "x", "y": 1}]}, ConfigError, "line 1 has no column text, label; its columns are words, y"),
        ({"train": [ROWS[0]]}, ConfigError, "expected at least 2 labels in .*train.jsonl, found b"),
        ({"dev": [*ROWS, {"text": "x", "label": "c"}]}, DataCorruptError, "dev.jsonl line 3 has the label 'c', which no row of train has"),
        ({"test": []}, DataCorruptError, "test.jsonl has no rows"),
        ({"dev": [ROWS[0], {"text": None, "label": "a"}]}, DataCorruptError, "dev.jsonl line 2: expected a text in column 'text', found None"),
        ({"dev": [{"text": "x", "label": True}]}, DataCorruptError, "line 1: expected an integer or a name in column 'label', found True"),
        ({"dev": [{"text": "x", "label": 0.5}]}, DataCorruptError, "found 0.5"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, splits: dict[str, list[dict[str, Any]]], error: type[MaskwrightError], said: str) -> None:
    with pytest.raises(error, match=said) as raised:
        load_task(task_of(tmp_path / "t", **splits), tmp_path)
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "x", "label": 1}\n\n{"text": "x", "lab', "train.jsonl line 3 is not JSON: Unterminated string starting at in column 15\n"),
        (b'{"text": "x", "label": 1}\n["x", 1]\n', "train.jsonl line 2: expected a JSON object, found list"),
        (b'{"text": "x", "label": 1}\n{"text": "\xff\xfe", "label": 1}\n', "train.jsonl line 2 is not UTF-8"),
    ],
)
def test_a_broken_jsonl_file_is_named_with_the_line(tmp_path: Path, content: bytes, said: str) -> None:
    config = task_of(tmp_path / "t")
    (tmp_path / "t" / "train.jsonl").write_bytes(content)
    with pytest.raises(DataCorruptError, match=said):
        load_task(config, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"), [("text,label\nx,1\ny\n", "line 3: expected 2 cells"), ('text,label\nx,1\n"y,2\n', "line 3 is not CSV")]
)
def test_a_broken_csv_file_is_named_with_the_line(tmp_path: Path, content: str, said: str) -> None:
    for split in ("train", "dev", "test"):
        (tmp_path / f"{split}.csv").write_text(content)
    with pytest.raises(DataCorruptError, match=f"train.csv {said}"):
        load_task(TaskConfig(name="t", path=str(tmp_path)), tmp_path)
