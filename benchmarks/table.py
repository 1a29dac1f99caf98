"""The README's table from the committed results: `python -m benchmarks.table [--check]`."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.children import ROOT
from benchmarks.claims import number

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
START, END = "<!-- benchmarks: made by `make bench-table` -->", "<!-- end of benchmarks -->"

FAULTS = "recovery"
"""The benchmark whose claims have a table of their own."""
FAULT_COLUMNS = ("fault", "ours", "Ray Train + DeepSpeed", "goal", "met")

Record = dict[str, Any]


def read_results(folder: Path = RESULTS) -> dict[str, list[Record]]:
    """The committed claims by benchmark, in the order of their names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def render(results: Mapping[str, Sequence[Record]]) -> str:
    """Markdown: the claims that have a goal, the faults, and below what they were measured on; pure."""
    if not results:
        return "No results are kept yet; `make bench RESULTS=1` makes them."
    lines = ["| claim | ours | peer | ratio | goal | met |", "|---|--:|--:|--:|--:|---|"]
    lines += [_row(record) for name, records in results.items() if name != FAULTS for record in records if record["goal"] is not None]
    lines += ["", *_faults(results.get(FAULTS, ())), *_origins(results)]
    return "\n".join(lines)


def replace_table(readme: str, table: str) -> str:
    """The text with the table between its markers; pure. Raises ValueError where there are none."""
    before, found, rest = readme.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"README.md lacks the markers {START} and {END}")
    return f"{before}{START}\n{table}\n{END}{after}"


def _row(record: Record) -> str:
    unit = record["unit"]
    peer = f"{number(record['peer'])} {unit} ({record['peer_version']})" if record["peer"] is not None else record["peer_version"] or ""
    ratio = f"{number(record['ratio'])} ×" if record["ratio"] else ""  # of nothing to something there is none to speak of
    met = "yes" if record["met"] else "**no**"
    return f"| {record['claim']} | {number(record['ours'])} {unit} | {peer} | {ratio} | {record['goal']} | {met} |"


def _faults(records: Sequence[Record]) -> list[str]:
    """The table of faults, with the sentence that says how to read it."""
    if not records:
        return []
    work, peer = records[0]["environment"]["work"], records[0]["environment"]["peer"]
    said = (
        f"Seconds from a fault to the next optimizer step, beside {peer} as their documentation has it. Start-up: of the same job's first "
        f"group of workers, on a warm machine. Both train the same small BERT in {work['precision']} under ZeRO-{work['zero_stage']} on "
        f"{work['ranks']} ranks, global batch {work['global_batch_size']}, and save every {work['checkpoint_every_steps']} steps."
    )
    rows = [list(FAULT_COLUMNS), ["---", "---", "---", "--:", "---"], *map(fault_cells, records)]
    return [said, "", *(f"| {' | '.join(row)} |" for row in rows), ""]


def fault_cells(record: Record) -> list[str]:
    """A claim of `recovery` as a row of FAULT_COLUMNS; pure."""
    outcomes = record["environment"].get("outcomes", {})
    ours, peer = (_outcome(record[key], outcomes.get(key)) for key in ("ours", "peer"))
    met = "" if record["met"] is None else "yes" if record["met"] else "**no**"
    return [record["claim"], ours, peer or record["peer_version"], f"{record['goal']} s" if record["goal"] else "", met]


def _outcome(seconds: float | None, outcome: dict[str, Any] | None) -> str:
    """Seconds and what belongs to them; of one that did not come back, what happened instead."""
    if seconds is None:
        return outcome["text"] if outcome else ""
    said = f"{number(seconds)} s"
    return said if outcome is None else f"{said} (start-up {number(outcome['start_up_s'])} s), {number(outcome['steps_again'])} steps again"


def _origins(results: Mapping[str, Sequence[Record]]) -> list[str]:
    """One line a machine and text, with the commands whose results it holds."""
    commands: dict[str, list[str]] = {}
    for environment in (record["environment"] for records in results.values() for record in records):
        known = commands.setdefault(_place(environment), [])
        if (command := f"`{environment['command']}`") not in known:
            known.append(command)
    return [f"Measured on {place}: {', '.join(names)}." for place, names in commands.items()]


def _place(environment: dict[str, Any]) -> str:
    versions = environment["versions"]
    card = f"{environment['card']}, " if environment.get("card") else ""
    machine = f"{card}{environment['cpu']}, {environment['cores']} cores, {environment['memory_gb']} GB"
    corpus = environment.get("corpus")
    text = f", {corpus['name']} ({corpus['documents']:,} distinct documents)" if corpus else ""
    return f"{machine}, Python {versions['python']}, torch {versions['torch']}{text}"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the README's table; with --check, only say whether it is up to date."""
    readme = README.read_text(encoding="utf-8")
    wanted = replace_table(readme, render(read_results()))
    if "--check" in arguments:
        return 0 if readme == wanted else 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
