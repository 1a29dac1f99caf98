"""What every benchmark shares: its command line, its table, its JSON."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.claims import Claim, number
from benchmarks.machine import command_line, describe_machine


@dataclass(frozen=True)
class Options:
    """What a benchmark is asked to do."""

    short: bool
    """A minute or so instead of the whole measurement: a check that it works, not a figure to quote."""
    corpus: str
    """Text to measure on: a .jsonl(.gz), .txt or .parquet by path, or `python-docs`."""
    rounds: int
    seconds: float
    """Length of one measurement."""
    environment: dict[str, Any]
    """Goes into every claim: the machine, the command."""
    console: Console
    parts: tuple[str, ...] = ()
    """What is measured of a benchmark that can be measured in parts."""

    def progress(self, message: str) -> None:
        """One line about what is being done."""
        self.console.print(message, style="dim", markup=False, highlight=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table beside the claims."""
        self.console.print(simple_table(title, columns, rows))


_WIDTH = 150

Measure = Callable[[Options], list[Claim]]


def run_benchmark(name: str, title: str, measure: Measure, arguments: Sequence[str] | None = None, parts: Sequence[str] = ()) -> None:
    """The command line of a benchmark: measure, print the table, write JSON where asked. Where it has `parts`, some can be chosen."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=title)
    parser.add_argument("--short", action="store_true", help="fewer and shorter runs on a part of the text: a check that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims to FILE")
    parser.add_argument("--corpus", default="python-docs", metavar="PATH", help="text to measure on (default: %(default)s)")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds; their median counts (default: 5, with --short 1)")
    if parts:
        parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART", help=f"some of {', '.join(parts)}")
    given = parser.parse_args(arguments)
    rounds = given.runs or (1 if given.short else 5)
    environment = {"command": command_line(name), **describe_machine()}
    seconds, chosen = 1.0 if given.short else 5.0, tuple(given.only if parts else ())
    options = Options(given.short, given.corpus, rounds, seconds, environment, _console(), chosen)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what was started is ended: a cluster goes on by itself
    claims = measure(options)
    options.console.print(claims_table(title, claims))
    if given.json is not None:
        write_claims(given.json, claims)


def _console() -> Console:
    """As wide as the terminal; wide enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def write_claims(path: Path, claims: Sequence[Claim]) -> None:
    """Write the claims as a JSON list, one object a claim."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([claim.record() for claim in claims], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def claims_table(title: str, claims: Sequence[Claim]) -> Table:
    """The claims as people read them."""
    rows = [
        (
            claim.claim,
            number(claim.ours),
            number(claim.peer),
            claim.peer_version or "",
            claim.unit,
            number(claim.ratio),
            claim.goal or "",
            verdict(claim.met),
        )
        for claim in claims
    ]
    return simple_table(title, ("claim", "ours", "peer", "peer's version", "unit", "ratio", "goal", "met"), rows)


def verdict(met: bool | None) -> str:
    """yes, no, or nothing where there is no goal."""
    return "" if met is None else "yes" if met else "NO"


def simple_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table; columns of numbers are set to the right."""
    table = Table(title=title, title_justify="left")
    for nth, column in enumerate(columns):
        cells = [row[nth] for row in rows]
        table.add_column(column, justify="right" if cells and all(_is_number(cell) for cell in cells) else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _is_number(cell: str) -> bool:
    return not cell or cell == "–" or cell.replace(",", "").replace(".", "", 1).replace("%", "").isdigit()
