"""Every measurement of one GPU (budget: nine minutes): `python -m benchmarks.gpu [--short] [--json FILE] [--only PART ...]`.

Needs torch, transformers, deepspeed and this checkout, nothing else. Without a GPU it runs in a reduced mode on the CPU, whose figures say so
and are judged against no goal: it shows that the kit works.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.claims import Claim, Goal, make_claim, number
from benchmarks.contestants import attention_kernels, device
from benchmarks.contestants.training import process_group
from benchmarks.machine import command_line, describe_machine, installed_version
from benchmarks.planned import GOAL as PLAN_GOAL
from benchmarks.planned import Case, planned_bytes
from benchmarks.stand_ins import stand_in
from benchmarks.training import BASE, LARGE, TINY, Network, Shape, Work, our_precision

BUDGET_S = 420.0
"""No part begins later than this; the longest is meant to take about two minutes."""
LIMIT_S = 530.0
"""After which what was measured is shown, whatever still runs."""
NOT_MEASURED = "not measured on a GPU"
_showing = threading.Lock()
"""Held by whoever shows the figures, for good."""
_MISSING = ("tenacity", "webdataset", "webdataset.tariterators", "webdataset.writer")
"""What only reading corpora and stores needs."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    seconds: float
    rounds: int
    repeats: int
    """Of an attention kernel."""
    steps: tuple[tuple[Work, float | None], ...]
    """What is trained, and the goal in tokens a second on one H200."""
    zero: Work
    attention: tuple[int, tuple[int, ...], int, int]
    """Tokens, lengths of a sequence, heads, width of a head."""
    memory: tuple[Case, ...]


def _case(network: Network, shape: Shape, stage: int, **others: Any) -> Case:
    return Case(network, shape, stage, **{"precision": "bf16", "attention": "varlen", **others})


FULL = Plan(
    seconds=6.0,
    rounds=3,
    repeats=20,
    steps=(
        (Work(BASE, Shape(2048, 128), compiled=True), 0.73e6),
        (Work(BASE, Shape(512, 512), compiled=True), 0.67e6),
        (Work(LARGE, Shape(128, 512), 2, compiled=True), 0.20e6),
        (Work(BASE, Shape(2048, 128), compiled=True, dropout=0.0), 0.73e6),
        (Work(BASE, Shape(512, 512), compiled=True, dropout=0.0), 0.67e6),
    ),
    zero=Work(BASE, Shape(256, 128), 8),
    attention=(32768, (128, 512), 12, 64),
    memory=(
        _case(BASE, Shape(64, 128), 0),
        _case(BASE, Shape(64, 128), 1),
        _case(BASE, Shape(64, 128), 1, attention="sdpa"),
        _case(BASE, Shape(64, 128), 1, checkpointing=True),
        _case(BASE, Shape(64, 128), 1, precision="fp32", attention="eager"),
        _case(BASE, Shape(16, 512), 2),
        _case(BASE, Shape(64, 128), 3),
        _case(LARGE, Shape(32, 512), 1),
    ),
)
SHORT = replace(FULL, seconds=2.0, rounds=1, repeats=5)
REDUCED = Plan(
    seconds=0.5,
    rounds=1,
    repeats=2,
    steps=((Work(TINY, Shape(4, 32), 2), None), (Work(TINY, Shape(2, 64), 1, dropout=0.0), None)),
    zero=Work(TINY, Shape(4, 32), 4),
    attention=(128, (32,), 2, 32),
    memory=(),
)


@dataclass(frozen=True)
class Session:
    """The device and what is to be measured on it."""

    plan: Plan
    precision: str
    environment: dict[str, Any]
    peak: float | None
    """Stated FLOP/s of the card; None of one that is not known."""
    on_gpu: bool

    def claim(self, name: str, unit: str, *values: Any, **named: Any) -> Claim:
        """A claim that says where it was not measured on a GPU; without a GPU it has no goal."""
        if not self.on_gpu:
            named = {**named, "goal": None}
        return make_claim(name if self.on_gpu else f"{name} ({NOT_MEASURED})", unit, self.environment, *values, **named)


class Kept:
    """Figures, which are in a file of JSON as soon as they are there."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self.claims: list[Claim] = []

    def add(self, claim: Claim) -> None:
        """Keep one more."""
        self.claims.append(claim)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps([each.record() for each in self.claims], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measure_steps(session: Session) -> Iterator[Claim]:
    """Tokens a second and MFU of optimizer steps on full rows."""
    for work, goal in session.plan.steps:
        found = device.steps(work, session.precision, session.plan.seconds)
        name = f"{found.work.name}, {session.precision}"
        yield session.claim(f"training {name}", "tokens/s", [found.tokens_per_s], goal=None if goal is None else Goal("ours", "≥", goal))
        if session.peak is not None:
            yield session.claim(f"MFU of {name}, of the stated peak", "of the peak", [found.flops_per_s / session.peak], goal=Goal("ours", "≥", 0.40))
        share = found.flops_per_s / found.matmul_flops_per_s
        yield session.claim(f"MFU of {name}, of a measured matrix product", "of the product", [share])


def measure_zero(session: Session) -> Iterator[Claim]:
    """Our engine under ZeRO-1 against a plain torch loop with fp32 master weights."""
    work = session.plan.zero
    found = device.zero_and_plain(work, session.precision, session.plan.seconds, session.plan.rounds)
    name = f"ZeRO-1, {work.network.name}, {work.accumulation * work.shape.samples * work.shape.length:,} tokens a step"
    yield session.claim(name, "tokens/s", found["ours"], found["plain"], "plain torch loop, fp32 master", goal=Goal("ratio", "≥", 0.95))


def measure_memory(session: Session) -> Iterator[Claim]:
    """What `plan` says of a rank's memory against the most that torch has allocated."""
    for case in session.plan.memory:
        planned, measured = planned_bytes(case, on_gpu=True).peak_bytes, device.peak_bytes(case)
        sizes = {"planned_bytes": planned, "measured_peak_bytes": measured}
        claim = session.claim(f"plan's memory, {case.name}, {case.precision}", "% off", [100 * abs(planned / measured - 1)], goal=PLAN_GOAL)
        yield replace(claim, environment={**claim.environment, **sizes})


def measure_attention(session: Session) -> Iterator[Claim]:
    """Attention kernels, forward and backward."""
    tokens, lengths, heads, width = session.plan.attention
    dtype = "bfloat16" if session.precision == "bf16" else "float32"
    for length in lengths:
        for kernel, found in attention_kernels.table(tokens, length, heads, width, dtype, session.plan.repeats).items():
            name = f"attention, {heads} x {width}, {tokens} tokens in sequences of {length}: {kernel}"
            if isinstance(found, str):
                yield session.claim(name, "ms", [], [], found)
            else:
                yield session.claim(name, "ms", [found])


def measure_profile(session: Session) -> Iterator[Claim]:
    """The ten largest costs of a step of the first network."""
    work, _ = session.plan.steps[0]
    for cost, share in device.profile(work, session.precision, num_steps=1):
        yield session.claim(f"share of a step of {work.name}: {cost[:90]}", "of the device's time", [share])


PARTS: dict[str, Callable[[Session], Iterator[Claim]]] = {
    "steps": measure_steps,
    "zero": measure_zero,
    "attention": measure_attention,
    "profile": measure_profile,
    "memory": measure_memory,
}


def measure(session: Session, parts: Sequence[str], claims: Kept, now: Callable[[], float] = time.monotonic) -> None:
    """Add the figures of all parts to `claims` as they come; a part that fails or would begin too late is a row that says so."""
    begun = now()
    for part in parts:
        if now() - begun > BUDGET_S:
            claims.add(session.claim(part, "", [], [], "not measured: the time was up"))
            continue
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            for claim in PARTS[part](session):
                claims.add(claim)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            claims.add(session.claim(part, "", [], [], f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"))
        with suppress(RuntimeError):  # after some errors CUDA does nothing any more
            device.free()


def show(session: Session, claims: Sequence[Claim]) -> None:
    """Print the table."""
    about = session.environment
    print(f"{about['card'] or 'a CPU: ' + NOT_MEASURED}, driver {about.get('driver')}, torch {installed_version('torch')}, {session.precision}")
    print("\n".join(lines(claims)), flush=True)


def give_up(session: Session, claims: Kept) -> None:
    """End the process with what there is, unless it is shown already: a kernel that hangs hears nothing else."""
    if _showing.acquire(blocking=False):
        try:
            claims.add(session.claim("the rest", "", [], [], f"not measured: not done after {LIMIT_S:.0f} s"))
            show(session, claims.claims)
        finally:
            os._exit(1)


def describe_device() -> dict[str, Any]:
    """Card, driver and versions; without a GPU that there is none."""
    import torch

    versions = {"deepspeed": installed_version("deepspeed"), "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return {"card": None, "measured": NOT_MEASURED, **versions}
    properties = torch.cuda.get_device_properties(0)
    return {"card": properties.name, "card_memory_gb": round(properties.total_memory / 1e9), "driver": _driver(), **versions}


def _driver() -> str | None:
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.splitlines()[0].strip()


def _stated_peak(card: str | None, precision: str) -> float | None:
    """FLOP/s of the card in `precision` as its maker states them."""
    import torch

    from trainer.peaks import stated_peak

    return None if card is None else stated_peak(card, torch.bfloat16 if precision == "bf16" else torch.float32)


def lines(claims: Sequence[Claim]) -> Iterator[str]:
    """The claims as a table of text; pure."""
    rows = [("claim", "figure", "unit", "peer", "ratio", "goal", "met", "")]
    for claim in claims:
        met = "" if claim.met is None else "yes" if claim.met else "NO"
        figures = number(claim.ours), claim.unit, number(claim.peer), number(claim.ratio)
        rows.append((claim.claim, *figures, claim.goal or "", met, claim.peer_version or ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main() -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Every measurement of one GPU.")
    parser.add_argument("--short", action="store_true", help="shorter runs: a check that it works, not figures to quote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the claims to FILE")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stand_in(_MISSING)
    about = describe_device()
    on_gpu = about["card"] is not None
    plan = (SHORT if given.short else FULL) if on_gpu else REDUCED
    environment = {"command": command_line("gpu"), **describe_machine(), **about}
    precision = our_precision()
    session = Session(plan, precision, environment, _stated_peak(about["card"], precision), on_gpu)
    claims = Kept(given.json)
    limit = threading.Timer(LIMIT_S, give_up, (session, claims))
    limit.daemon = True
    limit.start()
    with process_group():
        measure(session, given.only, claims)
    _showing.acquire()
    show(session, claims.claims)
    return 0


if __name__ == "__main__":
    sys.exit(main())
