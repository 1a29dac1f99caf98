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
from benchmarks.stand_ins import stand_in
from benchmarks.training import BASE, LARGE, TINY, Network, Shape, our_precision

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
    steps: tuple[tuple[Network, Shape, float | None], ...]
    """Network, micro-batch, and the goal in tokens a second on one H200."""
    zero: tuple[Network, Shape, int]
    """Network, micro-batch, micro-batches of a step."""
    attention: tuple[int, tuple[int, ...], int, int]
    """Tokens, lengths of a sequence, heads, width of a head."""


FULL = Plan(
    seconds=10.0,
    rounds=3,
    repeats=20,
    steps=((BASE, Shape(256, 128), 0.73e6), (BASE, Shape(64, 512), 0.67e6), (LARGE, Shape(32, 512), 0.20e6)),
    zero=(BASE, Shape(256, 128), 8),
    attention=(32768, (128, 512), 12, 64),
)
SHORT = replace(FULL, seconds=2.0, rounds=1, repeats=5)
REDUCED = Plan(
    seconds=0.5,
    rounds=1,
    repeats=2,
    steps=((TINY, Shape(4, 32), None), (TINY, Shape(2, 64), None)),
    zero=(TINY, Shape(4, 32), 4),
    attention=(128, (32,), 2, 32),
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


def measure_steps(session: Session) -> Iterator[Claim]:
    """Tokens a second and MFU of optimizer steps on full rows."""
    for network, shape, goal in session.plan.steps:
        found = device.steps(network, shape, session.precision, session.plan.seconds)
        name = f"{network.name}, {found.samples} x {shape.length}, {session.precision}"
        yield session.claim(f"training {name}", "tokens/s", [found.tokens_per_s], goal=None if goal is None else Goal("ours", "≥", goal))
        if session.peak is not None:
            yield session.claim(f"MFU of {name}, of the stated peak", "of the peak", [found.flops_per_s / session.peak], goal=Goal("ours", "≥", 0.40))
        share = found.flops_per_s / found.matmul_flops_per_s
        yield session.claim(f"MFU of {name}, of a measured matrix product", "of the product", [share])


def measure_zero(session: Session) -> Iterator[Claim]:
    """Our engine under ZeRO-1 against a plain torch loop with fp32 master weights."""
    network, shape, accumulation = session.plan.zero
    found = device.zero_and_plain(network, shape, accumulation, session.precision, session.plan.seconds, session.plan.rounds)
    tokens = accumulation * shape.samples * shape.length
    name = f"ZeRO-1, {network.name}, {tokens:,} tokens a step"
    yield session.claim(name, "tokens/s", found["ours"], found["plain"], "plain torch loop, fp32 master", goal=Goal("ratio", "≥", 0.95))


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
    network, shape, _ = session.plan.steps[0]
    for cost, share in device.profile(network, shape, session.precision, num_steps=3):
        yield session.claim(f"share of a step of {network.name}: {cost[:90]}", "of the device's time", [share])


PARTS: dict[str, Callable[[Session], Iterator[Claim]]] = {
    "steps": measure_steps,
    "zero": measure_zero,
    "attention": measure_attention,
    "profile": measure_profile,
}


def measure(session: Session, parts: Sequence[str], claims: list[Claim], now: Callable[[], float] = time.monotonic) -> None:
    """Add the figures of all parts to `claims` as they come; a part that fails or would begin too late is a row that says so."""
    begun = now()
    for part in parts:
        if now() - begun > BUDGET_S:
            claims.append(session.claim(part, "", [], [], "not measured: the time was up"))
            continue
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            claims += PARTS[part](session)
        except Exception as error:  # noqa: BLE001 - the other parts are worth having
            claims.append(session.claim(part, "", [], [], f"failed: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"))
        with suppress(RuntimeError):  # after some errors CUDA does nothing any more
            device.free()


def show(session: Session, claims: Sequence[Claim], file: Path | None) -> None:
    """Print the table; write JSON."""
    about = session.environment
    print(f"{about['card'] or 'a CPU: ' + NOT_MEASURED}, driver {about.get('driver')}, torch {installed_version('torch')}, {session.precision}")
    print("\n".join(lines(claims)), flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([claim.record() for claim in claims], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def give_up(session: Session, claims: list[Claim], file: Path | None) -> None:
    """End the process with what there is, unless it is shown already: a kernel that hangs hears nothing else."""
    if _showing.acquire(blocking=False):
        try:
            show(session, [*claims, session.claim("the rest", "", [], [], f"not measured: not done after {LIMIT_S:.0f} s")], file)
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
    claims: list[Claim] = []
    limit = threading.Timer(LIMIT_S, give_up, (session, claims, given.json))
    limit.daemon = True
    limit.start()
    with process_group():
        measure(session, given.only, claims)
    _showing.acquire()
    show(session, claims, given.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
