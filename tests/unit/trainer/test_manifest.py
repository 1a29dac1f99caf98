"""The manifest says what a checkpoint holds, and shows when it does not."""

import errno
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import EnvironmentMismatchError, MaskwrightError, StorageError, StorageUnreachableError
from trainer.manifest import MANIFEST, Circumstances, FileDigest, Manifest, Problem, check_files, read_manifest, shares, write_manifest
from trainer.software import own_version
from trainer.state import TrainState

CIRCUMSTANCES = Circumstances(2, 1, "bf16", 1, "cpu AVX2", {"torch": "2.13.0", "deepspeed": "0.19.8"})


def manifest(**files: bytes) -> Manifest:
    return Manifest(3, CIRCUMSTANCES, {name: FileDigest(len(data), "0" * 64) for name, data in files.items()}, TrainState(step=7), {"name": "run"})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest(a=b"1", b=b"22"))
    assert read_manifest(tmp_path) == manifest(a=b"1", b=b"22")
    chosen = replace(manifest(a=b"1"), circumstances=replace(CIRCUMSTANCES, attention={"1024": "sdpa", "128": "eager"}))
    write_manifest(tmp_path, chosen)
    assert read_manifest(tmp_path) == chosen
    assert "attention" not in manifest(a=b"1").to_json()  # of a release that did not choose: its digest stays


@pytest.mark.parametrize("key", ["step", "attempt", "world_size", "files", "train_state", "config", "versions", "digest"])
def test_a_changed_or_missing_value_shows(tmp_path: Path, key: str) -> None:
    value = manifest(a=b"1").to_json()
    for changed in ({**value, key: "other"}, {name: item for name, item in value.items() if name != key}):
        (tmp_path / MANIFEST).write_text(json.dumps(changed))
        assert isinstance(read_manifest(tmp_path), Problem)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 1}'])
def test_something_else_is_a_problem(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert isinstance(read_manifest(tmp_path), Problem)


def test_names_outside_the_folder_are_refused(tmp_path: Path) -> None:
    for name in ("../secret", "/etc/passwd", "zero/../../secret"):
        write_manifest(tmp_path, manifest(**{name: b""}))
        assert "outside" in str(read_manifest(tmp_path))


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(EnvironmentMismatchError, match=r"MANIFEST.json has format_version 2; this release reads up to 1"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, StorageUnreachableError), (errno.EACCES, StorageError), (errno.ESTALE, StorageUnreachableError)]
)
def test_what_cannot_be_read_now_is_no_problem_of_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[MaskwrightError]
) -> None:
    write_manifest(tmp_path, manifest(a=b"1"))
    (tmp_path / "a").write_bytes(b"1")

    def fails(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fails)
    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(error, match=re.escape(f"cannot read {tmp_path / 'a'}: {os.strerror(number)}")):
        check_files(tmp_path, manifest(a=b"1").files, ["a"])
    with pytest.raises(error, match=MANIFEST):
        read_manifest(tmp_path)


def test_files_are_checked(tmp_path: Path) -> None:
    for name in ("good", "short", "flipped"):
        (tmp_path / name).write_bytes(b"0123456789")
    files = {name: FileDigest.of(tmp_path / "good") for name in ("good", "short", "flipped", "gone")}
    (tmp_path / "short").write_bytes(b"01234")
    (tmp_path / "flipped").write_bytes(b"0123456788")
    problems = {problem.file: problem.cause for problem in check_files(tmp_path, files, files)}
    assert problems.keys() == {"short", "flipped", "gone"}
    assert problems["short"] == "has 5 bytes instead of 10"
    assert problems["gone"] == "missing"
    assert "sha256" in problems["flipped"]


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 10**12), max_size=30), st.integers(1, 9))
def test_shares_cover_every_file_once_and_evenly(sizes: dict[str, int], num_parts: int) -> None:
    parts = shares({name: FileDigest(size, "") for name, size in sizes.items()}, num_parts)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({}, None),
        ({"threads_per_rank": 2}, "threads per rank: 1, now 2"),
        ({"device": "cuda H200"}, "device: cpu AVX2, now cuda H200"),
        ({"attention": {"128": "eager"}}, None),  # what releases took that did not choose
        ({"attention": {"128": "eager", "512": "sdpa"}}, "attention at 512 tokens: eager, now sdpa"),
        ({"versions": {"torch": "2.14.0", "deepspeed": "0.19.8"}}, "torch version: 2.13.0, now 2.14.0"),
        ({"versions": CIRCUMSTANCES.versions | {"maskwright": "0f3a"}}, None),  # which older releases did not record
    ],
)
def test_differences_are_named(change: dict[str, Any], line: str | None) -> None:
    assert CIRCUMSTANCES.differences(replace(CIRCUMSTANCES, **change)) == ([line] if line else [])


def test_our_own_code_is_among_the_versions() -> None:
    now = Circumstances.now(world_size=1, zero_stage=1, precision="fp32", attention={})
    before = replace(now, versions=now.versions | {"maskwright": "0f3a"})
    assert before.differences(now) == [f"maskwright version: 0f3a, now {own_version()}"]
