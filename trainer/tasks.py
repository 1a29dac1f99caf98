"""Labelled classification tasks: rows read from .jsonl or .csv files and checked, labels numbered (reads files, writes only `python-docs`)."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, DataCorruptError, MaskwrightError, NotFoundError, json_fault
from data_pipeline.storage import Location
from trainer.finetune_config import TaskConfig

PYTHON_DOCS = "python-docs"
SPLITS = ("train", "dev", "test")
FORMATS = (".jsonl", ".csv")

_Record = tuple[int, dict[str, Any]]
"""Line number, counted from 1, and the row's columns."""
_Label = int | str


@dataclass(frozen=True)
class Rows:
    """The rows of one split, in the order of the file."""

    texts: tuple[str, ...]
    text_pairs: tuple[str, ...] | None
    """The second texts of a pair task; None for a task of single texts."""
    labels: tuple[int, ...]
    """Index into `Task.label_names`."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Task:
    """A labelled task, checked: every label of dev and test occurs in train."""

    name: str
    label_names: tuple[str, ...]
    """Sorted: by value when all are integers, else by name."""
    train: Rows
    dev: Rows
    test: Rows

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def digest(self) -> str:
        """SHA-256 over all rows and label names: two tasks with the same digest give the same scores."""
        splits = [[rows.texts, rows.text_pairs, rows.labels] for rows in (self.train, self.dev, self.test)]
        return hashlib.sha256(json.dumps([self.label_names, splits]).encode()).hexdigest()


def load_task(task: TaskConfig, work_folder: str | os.PathLike[str]) -> Task:
    """Read and check a task. `python-docs` is first written into the local folder `work_folder`, unless it is there already.

    Raises:
        NotFoundError: the folder or one of its files is missing.
        ConfigError: a column is absent, or train has fewer than two labels.
        DataCorruptError: a file is not UTF-8, not JSON or CSV, empty, or has a label that train lacks.
    """
    folder = _task_folder(task, work_folder)
    columns = {split: _columns(_split_file(task, folder, split), task) for split in SPLITS}
    names = _label_names(task, columns["train"])
    number = {str(name): index for index, name in enumerate(names)}
    rows = {split: _numbered(task, split, found, number) for split, found in columns.items()}
    return Task(task.name, tuple(str(name) for name in names), rows["train"], rows["dev"], rows["test"])


def task_errors(tasks: Iterable[TaskConfig]) -> Iterator[MaskwrightError]:
    """What is wrong with tasks that are folders, one error at most of each: a mistake is told now, not after hours of pretraining."""
    for task in tasks:
        if task.path != PYTHON_DOCS:
            try:
                load_task(task, work_folder="")
            except MaskwrightError as error:
                yield error


def require_tasks(tasks: Iterable[TaskConfig]) -> None:
    """Refuse tasks of which one cannot be fine-tuned on.

    Raises: see `load_task`.
    """
    for error in task_errors(tasks):
        raise error


def read_test_texts(task: TaskConfig, work_folder: str | os.PathLike[str]) -> list[str]:
    """The texts of a task's test file, second texts of pairs included: what must not be in the text that a model is pretrained on.

    Raises: see `load_task`.
    """
    found = _columns(_split_file(task, _task_folder(task, work_folder), "test"), task)
    return [*found.texts, *(found.text_pairs or ())]


def _task_folder(task: TaskConfig, work_folder: str | os.PathLike[str]) -> Location:
    folder = _python_docs(Path(work_folder)) if task.path == PYTHON_DOCS else Location.at(task.path)
    if not folder.exists():
        raise NotFoundError(
            f"task {task.name}: there is no folder {folder}",
            f"It must hold train, dev and test files (.jsonl or .csv), or set path to {PYTHON_DOCS}.",
        )
    return folder


@dataclass(frozen=True)
class _Columns:
    """What a file says, before labels are numbered."""

    lines: list[int]
    texts: list[str]
    text_pairs: list[str] | None
    labels: list[_Label]
    file: Location


def _python_docs(folder: Path) -> Location:
    from data_pipeline.python_docs_task import write_task

    if not all((folder / f"{split}.jsonl").exists() for split in SPLITS):
        try:
            write_task(folder)
        except ValueError as error:
            raise ConfigError(str(error), "Install more of these packages, or set the task's path to a folder of your own.") from error
    return Location.at(folder)


def _split_file(task: TaskConfig, folder: Location, split: str) -> Location:
    for suffix in FORMATS:
        if (folder / f"{split}{suffix}").exists():
            return folder / f"{split}{suffix}"
    raise NotFoundError(
        f"task {task.name}: expected {split}.jsonl or {split}.csv in {folder}, found {', '.join(folder.children()) or 'nothing'}",
        f"Put a file {split}.jsonl or {split}.csv with the columns {task.text!r} and {task.label!r} there.",
    )


def _columns(file: Location, task: TaskConfig) -> _Columns:
    wanted = [task.text, task.label, *([task.text_pair] if task.text_pair else [])]
    found = _Columns([], [], [] if task.text_pair else None, [], file)
    for line, record in _records(file):
        absent = [name for name in wanted if name not in record]
        if absent:
            raise ConfigError(
                f"task {task.name}: {file} line {line} has no column {', '.join(absent)}; its columns are {', '.join(map(str, record)) or 'none'}",
                "Set the task's text, text_pair and label to names of columns.",
            )
        found.lines.append(line)
        found.texts.append(_text(record[task.text], file, line, task.text))
        if task.text_pair and found.text_pairs is not None:
            found.text_pairs.append(_text(record[task.text_pair], file, line, task.text_pair))
        found.labels.append(_label(record[task.label], file, line, task.label))
    if not found.lines:
        raise DataCorruptError(f"task {task.name}: {file} has no rows", "Put at least one row into each of train, dev and test.")
    return found


def _records(file: Location) -> Iterator[_Record]:
    data = file.read_bytes()
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataCorruptError(f"{file} line {line} is not UTF-8 (byte {error.start})", "Convert the file to UTF-8.") from error
    return _csv_records(file, content) if file.name.endswith(".csv") else _json_records(file, content)


def _json_records(file: Location, content: str) -> Iterator[_Record]:
    for line, written in enumerate(content.split("\n"), 1):  # not splitlines(): JSON strings may hold other line separators
        if not written.strip():
            continue
        try:
            record = json.loads(written)
        except ValueError as error:
            raise DataCorruptError(f"{file} line {line} is not JSON: {json_fault(error)}", "Correct or delete the line.") from error
        if not isinstance(record, dict):
            raise DataCorruptError(f"{file} line {line}: expected a JSON object, found {type(record).__name__}", "Correct or delete the line.")
        yield line, record


def _csv_records(file: Location, content: str) -> Iterator[_Record]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise DataCorruptError(f"{file} line {reader.line_num}: expected {len(reader.fieldnames or ())} cells", "Correct or delete the line.")
            yield reader.line_num, record
    except csv.Error as error:
        raise DataCorruptError(f"{file} line {reader.reader.line_num} is not CSV: {error}", "Correct or delete the line.") from error


def _text(value: Any, file: Location, line: int, column: str) -> str:
    if not isinstance(value, str):
        raise DataCorruptError(f"{file} line {line}: expected a text in column {column!r}, found {value!r}", "Correct or delete the line.")
    return value


def _label(value: Any, file: Location, line: int, column: str) -> _Label:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataCorruptError(
            f"{file} line {line}: expected an integer or a name in column {column!r}, found {value!r}", "Correct or delete the line."
        )
    return value


def _label_names(task: TaskConfig, train: _Columns) -> list[str]:
    names = {str(label) for label in train.labels}
    if len(names) < 2:
        raise ConfigError(
            f"task {task.name}: expected at least 2 labels in {train.file}, found {', '.join(names)}", "A classifier needs two classes."
        )
    try:
        return sorted(names, key=int)
    except ValueError:
        return sorted(names)


def _numbered(task: TaskConfig, split: str, found: _Columns, number: dict[str, int]) -> Rows:
    for line, label in zip(found.lines, found.labels, strict=True):
        if str(label) not in number:
            raise DataCorruptError(
                f"task {task.name}: {found.file} line {line} has the label {label!r}, which no row of train has",
                f"Correct the label in {split}, or add rows with it to train.",
            )
    pairs = tuple(found.text_pairs) if found.text_pairs is not None else None
    return Rows(tuple(found.texts), pairs, tuple(number[str(label)] for label in found.labels))
