"""What was measured of starts becomes a claim; the file that a contestant writes is waited for only while somebody may write it."""

from pathlib import Path

import pytest

from benchmarks.submit_start import Start, _first_line, claim_of
from tests.support.commands import Command

OURS: list[Start] = [{"packing": 0.2, "workers": 6.0, "seconds": seconds} for seconds in (24.0, 25.0, 60.0)]


def test_ours_may_take_half_as_long_again_and_ten_seconds() -> None:
    claim = claim_of(OURS, [9.0, 11.0, 10.0], {"command": "c"}, judged=True)
    assert (claim.ours, claim.peer, claim.goal, claim.met) == (25.0, 10.0, "≤ 1.5 × torchrun + 10", True)
    assert claim_of(OURS, [9.0, 9.9, 10.0], {}, judged=True).met is False
    assert claim.environment["parts"]["workers"] == 6.0
    assert claim.environment["parts"]["job"] == 0.0
    assert claim_of(OURS, [9.0], {}, judged=False).goal is None


def test_a_contestant_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    command = Command([], tmp_path, program="no_such_module").start()
    with pytest.raises(RuntimeError, match="no_such_module"):
        _first_line(tmp_path / "answer", command)
    (tmp_path / "answer").write_text("17.5\n")
    assert _first_line(tmp_path / "answer", command) == "17.5"
