"""The command line of a benchmark: its table, its JSON, and words that look like markup."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.children import ROOT
from benchmarks.claims import KEYS, Claim, Goal, make_claim
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import command_line


def _measure(options: Options) -> list[Claim]:
    options.progress("reading dataset[i]")
    options.table("rows", ("name", "number"), [("dataset[i]", "12")])
    runs = [float(options.rounds)] * options.rounds
    return [make_claim("read, against dataset[i]", "documents/s", options.environment, runs, [1.0], "peer 1.0", Goal("ratio", "≥", 4))]


def test_a_benchmark_prints_its_table_and_writes_its_claims(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "results" / "x.json"
    run_benchmark("x", "Reading", _measure, ["--json", str(result), "--runs", "3", "--corpus", "text.jsonl"])
    shown = capsys.readouterr().out
    assert shown.count("dataset[i]") == 3
    assert "NO" in shown
    records = json.loads(result.read_text(encoding="utf-8"))
    assert [tuple(record) for record in records] == [KEYS]
    assert records[0]["runs"]["ours"] == [3, 3, 3]
    assert records[0]["environment"]["versions"]["torch"]


@pytest.mark.parametrize(("arguments", "rounds", "seconds"), [([], 5, 5.0), (["--short"], 1, 1.0), (["--short", "--runs", "2"], 2, 1.0)])
def test_short_runs_are_fewer_and_shorter(arguments: list[str], rounds: int, seconds: float) -> None:
    given: list[Options] = []

    def measure(options: Options) -> list[Claim]:
        given.append(options)
        return []

    run_benchmark("x", "Reading", measure, arguments)
    assert (given[0].rounds, given[0].seconds, given[0].corpus) == (rounds, seconds, "python-docs")


@pytest.mark.parametrize(("arguments", "chosen"), [([], ("one", "two")), (["--only", "two"], ("two",))])
def test_parts_can_be_chosen(arguments: list[str], chosen: tuple[str, ...]) -> None:
    given: list[Options] = []

    def measure(options: Options) -> list[Claim]:
        given.append(options)
        return []

    run_benchmark("x", "Reading", measure, arguments, parts=["one", "two"])
    assert given[0].parts == chosen


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for parts in (["one"], []):
        with pytest.raises(SystemExit):
            run_benchmark("x", "Reading", lambda options: [], ["--only", "three"], parts=parts)
    assert "invalid choice: 'three'" in capsys.readouterr().err


def test_a_benchmark_that_is_told_to_end_cleans_up() -> None:
    """`timeout` and `kill` send SIGTERM, which by itself runs no `finally`."""
    program = (
        "import os, signal\n"
        "from benchmarks.harness import run_benchmark\n"
        "def measure(options):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    finally:\n"
        "        print('cleaned up')\n"
        "run_benchmark('x', 'Reading', measure, [])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.returncode) == ("cleaned up", 143), done.stderr


def test_the_command_of_a_result_has_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--corpus", "/home/someone/text.jsonl.gz", "--json", "/tmp/x.json", "--short"])
    assert command_line("data_read") == "python -m benchmarks.data_read --corpus text.jsonl.gz --short"
