"""All benchmarks one after the other, or those named: `python -m benchmarks [NAME ...] [--short] [--corpus PATH] [--runs N] [--results]`."""

import argparse
import subprocess
import sys

from benchmarks.children import ROOT
from benchmarks.table import RESULTS

NAMES = tuple(sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\nNAME = " in path.read_text(encoding="utf-8")))
"""A benchmark is a module that has a NAME."""


def main() -> int:
    """Run each in a process of its own; one that fails does not keep the others from running. Returns how many failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure every claim.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--short", action="store_true", help="a check that they work, not figures to quote")
    parser.add_argument("--corpus", default="python-docs", metavar="PATH", help="text to measure on (default: %(default)s)")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds (default: 5, with --short 1)")
    parser.add_argument("--results", action="store_true", help="write the claims to benchmarks/results/, which the README's table is made of")
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    failed = 0
    for name in given.names or NAMES:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--corpus", given.corpus]
        command += ["--short"] if given.short else []
        command += ["--runs", str(given.runs)] if given.runs else []
        command += ["--json", str(RESULTS / f"{name}.json")] if given.results else []
        failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
