"""The record of a claim: ours, the peer, their ratio, the goal and whether it is met (pure)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

KEYS = ("claim", "ours", "peer", "peer_version", "unit", "ratio", "goal", "met", "runs", "environment")


@dataclass(frozen=True)
class Goal:
    """What a claim has to reach."""

    of: Literal["ratio", "ours"]
    """The number that is judged: ours over the peer's, or ours alone."""
    sign: Literal["≥", ">", "<", "≤"]
    value: float
    on_top_of: tuple[str, float] | None = None
    """Name and amount of what was measured beside, and is allowed as well."""

    def __str__(self) -> str:
        base = f"{self.on_top_of[0]} + " if self.on_top_of else ""
        return f"{self.sign} {base}{number(self.value)}{' ×' if self.of == 'ratio' else ''}"

    def is_met(self, ours: float | None, ratio: float | None) -> bool:
        """A number that could not be measured meets nothing."""
        found = ratio if self.of == "ratio" else ours
        if found is None:
            return False
        bound = self.value + (self.on_top_of[1] if self.on_top_of else 0.0)
        return {"≥": found >= bound, ">": found > bound, "<": found < bound, "≤": found <= bound}[self.sign]


@dataclass(frozen=True)
class Claim:
    """One line of a result. Without a peer, `peer` and `ratio` are None; without a goal, `goal` and `met`."""

    claim: str
    ours: float | None
    peer: float | None
    peer_version: str | None
    """Name and version of the peer; where it could not be measured, why."""
    unit: str
    ratio: float | None
    """Ours over the peer's."""
    goal: str | None
    met: bool | None
    runs: dict[str, list[float]]
    """Every single measurement that the medians are of."""
    environment: dict[str, Any]

    def record(self) -> dict[str, Any]:
        """As it is written to JSON: exactly the keys in `KEYS`."""
        return asdict(self)


def make_claim(
    claim: str,
    unit: str,
    environment: dict[str, Any],
    ours: Sequence[float],
    peer: Sequence[float] = (),
    peer_version: str | None = None,
    goal: Goal | None = None,
) -> Claim:
    """The claim of some runs: medians, their ratio, and the goal judged. A peer that was not measured meets no goal on the ratio."""
    ours_median, peer_median = middle(ours), middle(peer)
    ratio = ours_median / peer_median if ours_median is not None and peer_median else None
    return Claim(
        claim=claim,
        ours=rounded(ours_median),
        peer=rounded(peer_median),
        peer_version=peer_version,
        unit=unit,
        ratio=rounded(ratio),
        goal=None if goal is None else str(goal),
        met=None if goal is None else goal.is_met(ours_median, ratio),
        runs={"ours": [_rounded(value) for value in ours], "peer": [_rounded(value) for value in peer]},
        environment=environment,
    )


def middle(values: Sequence[float]) -> float | None:
    """The median; None of nothing."""
    return median(values) if values else None


def rounded(value: float | None) -> float | None:
    """Four significant digits: what repeated runs can tell apart."""
    return None if value is None else _rounded(value)


def number(value: float | None) -> str:
    """For people: three significant digits, thousands separated; a dash for None."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    shown = float(f"{value:.3g}")
    return f"{shown:,.0f}" if abs(shown) >= 100 or shown == int(shown) else f"{shown:,.4g}"


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
