"""The README's table is what the committed results say."""

import json
from pathlib import Path

import pytest

from benchmarks.claims import KEYS, Goal, make_claim
from benchmarks.machine import describe_machine
from benchmarks.table import END, README, START, read_results, render, replace_table

_ENVIRONMENT = {"command": "python -m benchmarks.x", "cpu": "C", "cores": 2, "memory_gb": 8, "versions": {"python": "3.11", "torch": "2.13"}}


def test_the_readme_has_the_committed_results() -> None:
    readme = README.read_text(encoding="utf-8")
    assert readme == replace_table(readme, render(read_results())), "run `make bench-table`"


def test_committed_results_have_the_keys_of_the_interface_and_no_path_of_a_machine() -> None:
    for name, records in read_results().items():
        assert records, name
        for record in records:
            assert tuple(record) == KEYS
            assert {"command", "cpu", "cores", "versions", "load"} <= set(record["environment"])
            assert "/" not in record["environment"]["command"]
        assert str(Path.home()) not in json.dumps(records)


def test_a_row_for_each_claim_with_a_goal() -> None:
    judged = make_claim("reading", "documents/s", _ENVIRONMENT, [1000.0], [10.0], "peer 1.0", Goal("ratio", "≥", 200))
    other = make_claim("also", "documents/s", _ENVIRONMENT, [1000.0])
    table = render({"x": [judged.record(), other.record()]})
    assert "| reading | 1,000 documents/s | 10 documents/s (peer 1.0) | 100 × | ≥ 200 × | **no** |" in table
    assert "also" not in table
    assert "Measured on C, 2 cores, 8 GB, Python 3.11, torch 2.13: `python -m benchmarks.x`." in table


def test_replacing_keeps_what_stands_around_the_markers() -> None:
    assert replace_table(f"a\n{START}\nold\n{END}\nb\n", "new") == f"a\n{START}\nnew\n{END}\nb\n"
    with pytest.raises(ValueError, match="markers"):
        replace_table("nothing", "new")


def test_the_machine_is_described_without_its_name() -> None:
    found = describe_machine()
    assert found["cores"] >= 1
    assert found["versions"]["numpy"]
    assert set(found) == {"cpu", "cores", "memory_gb", "system", "versions", "load"}
