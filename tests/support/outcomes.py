"""What a run of `tiny_run` came to: its records, its events, and whether it ended with the bits of another."""

import json
from pathlib import Path
from typing import Any

SAME = ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "grad_norm", "lr", "batch_digest")


def metrics(run: Path) -> dict[int, dict[str, Any]]:
    """The surviving record of each step."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return {record["step"]: record for record in map(json.loads, lines)}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, (run / "events.jsonl").read_text().splitlines()) if event["kind"] == kind]


def assert_same(run: Path, reference: Path) -> None:
    """All steps of `reference`: numbers and data, the last checkpoint's files and the exported weights are equal bit for bit."""
    ours, theirs = metrics(run), metrics(reference)
    steps = len(theirs)
    assert sorted(ours) == sorted(theirs) == list(range(steps))
    for step in range(steps):
        assert [ours[step][key] for key in SAME] == [theirs[step][key] for key in SAME], f"step {step}"
    checkpoint = f"checkpoints/step-{steps:08d}/MANIFEST.json"
    files, expected = (json.loads((path / checkpoint).read_text())["files"] for path in (run, reference))
    assert {name: entry["sha256"] for name, entry in files.items()} == {name: entry["sha256"] for name, entry in expected.items()}
    weights = "models/final/model.safetensors"
    assert (run / weights).read_bytes() == (reference / weights).read_bytes()
