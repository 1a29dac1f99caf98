"""The GPU kit: what it says without a GPU, of cards, of parts that fail, and of packages that are not there."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.children import ROOT
from benchmarks.claims import Claim, Goal
from benchmarks.contestants import attention_kernels
from benchmarks.gpu import NOT_MEASURED, REDUCED, Kept, Session, lines, measure
from benchmarks.stand_ins import StandIn, stand_in

GPU = Session(REDUCED, "bf16", {}, 1e15, on_gpu=True)
CPU = Session(REDUCED, "fp32", {}, None, on_gpu=False)


def test_without_a_gpu_a_figure_says_so_and_meets_no_goal() -> None:
    on_gpu, reduced = (session.claim("training", "tokens/s", [10.0], goal=Goal("ours", "≥", 5)) for session in (GPU, CPU))
    assert (on_gpu.claim, on_gpu.met) == ("training", True)
    assert (reduced.claim, reduced.goal, reduced.met) == (f"training ({NOT_MEASURED})", None, None)


def test_a_part_that_fails_or_comes_too_late_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half(session: Session) -> Iterator[Claim]:
        yield session.claim("first", "ms", [1.0])
        raise RuntimeError("no memory\nand more")

    monkeypatch.setattr(gpu, "PARTS", {"half": half, "late": half})
    times = iter([0.0, 1.0, gpu.BUDGET_S + 1.0])
    kept = Kept(tmp_path / "figures.json")
    measure(GPU, ["half", "late"], kept, now=lambda: next(times))
    assert [record["claim"] for record in json.loads((tmp_path / "figures.json").read_text())] == ["first", "half", "late"]
    assert [(claim.claim, claim.ours, claim.peer_version) for claim in kept.claims] == [
        ("first", 1.0, None),
        ("half", None, "failed: no memory"),
        ("late", None, "not measured: the time was up"),
    ]
    table = list(lines(kept.claims))
    assert len(table) == 4
    assert "failed: no memory" in table[2]


HANGING = """
import sys, time
from benchmarks import gpu

def hang(session):
    yield session.claim("first", "ms", [1.0])
    time.sleep(600)

gpu.PARTS["attention"], gpu.LIMIT_S = hang, 1.0
sys.exit(gpu.main())
"""


def test_a_kernel_that_hangs_does_not_take_the_figures_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HANGING, "--only", "attention", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    first, rest = json.loads((tmp_path / "gpu.json").read_text())
    assert first["ours"] == 1.0
    assert "not measured: not done after" in rest["peer_version"]
    assert first["claim"] in done.stdout


def test_kernels_that_a_machine_lacks_say_why() -> None:
    found = attention_kernels.table(tokens=64, length=16, heads=2, width=8, dtype="float32", repeats=1)
    assert isinstance(found["matrix products"], float)
    assert all(isinstance(value, float) or value.startswith("not here: ") for value in found.values())


def test_a_stand_in_has_every_name_and_says_what_is_missing() -> None:
    module = StandIn("absent.part")
    with pytest.raises(ModuleNotFoundError, match=r"absent\.part\.open is needed, but absent is not installed"):
        module.open("file")
    assert stand_in(["torch", "json"]) == []


HIDING = """
import importlib.machinery, sys
import benchmarks.gpu

class Hiding:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else found(name, path, target)

hidden = set(sys.argv.pop(1).split(","))
assert not hidden & set(sys.modules)
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = Hiding.find_spec
sys.exit(benchmarks.gpu.main())
"""
HIDDEN = "accelerate,datasketch,ftfy,pyarrow,ray,rich,scipy,sklearn,tenacity,tensorboard,typer,webdataset,s3fs,zstandard,moto"


@pytest.mark.full
@pytest.mark.timeout(300)
def test_the_kit_needs_nothing_but_torch_transformers_and_deepspeed() -> None:
    """Everything else that the product depends on is hidden, and the kit runs."""
    command = [sys.executable, "-c", HIDING, HIDDEN, "--only", "steps", "zero"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"ZeRO-1, 2L/64, 512 tokens a step ({NOT_MEASURED})" in done.stdout
    assert "failed" not in done.stdout
