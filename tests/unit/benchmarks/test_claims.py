"""Claims: medians, ratios, and goals that a peer which was not measured cannot meet."""

import pytest

from benchmarks.claims import KEYS, Goal, make_claim, number


def test_a_claim_has_the_keys_of_the_interface_and_the_medians_of_its_runs() -> None:
    claim = make_claim("read", "documents/s", {"cpu": "x"}, [100, 900, 110], [10, 11, 2], "peer 1.0", Goal("ratio", "≥", 10))
    record = claim.record()
    assert tuple(record) == KEYS
    assert (record["ours"], record["peer"], record["ratio"]) == (110, 10, 11)
    assert record["met"] is True
    assert record["goal"] == "≥ 10 ×"
    assert record["runs"] == {"ours": [100, 900, 110], "peer": [10, 11, 2]}


def test_a_peer_that_was_not_measured_meets_no_goal_on_the_ratio() -> None:
    claim = make_claim("read", "documents/s", {}, [100], [], "cannot be installed here", Goal("ratio", "≥", 10))
    assert (claim.peer, claim.ratio, claim.met) == (None, None, False)
    assert claim.peer_version == "cannot be installed here"


def test_without_a_goal_nothing_is_judged() -> None:
    claim = make_claim("read", "documents/s", {}, [100], [50])
    assert (claim.goal, claim.met, claim.ratio) == (None, None, 2)


@pytest.mark.parametrize(
    ("sign", "value", "met"),
    [("≥", 2, True), ("≥", 2.1, False), (">", 2, False), ("<", 2, False), ("<", 2.1, True), ("≤", 2, True), ("≤", 1.9, False)],
)
def test_signs_of_goals(sign: str, value: float, met: bool) -> None:
    assert make_claim("x", "s", {}, [2], goal=Goal("ours", sign, value)).met is met


@pytest.mark.parametrize(("found", "met"), [(22.0, True), (22.1, False)])
def test_a_goal_may_be_on_top_of_what_was_measured_beside(found: float, met: bool) -> None:
    claim = make_claim("x", "s", {}, [found], goal=Goal("ours", "≤", 10, ("start-up", 12.0)))
    assert (claim.goal, claim.met) == ("≤ start-up + 10", met)


def test_a_goal_is_judged_before_rounding() -> None:
    assert make_claim("x", "s", {}, [39_999.9], goal=Goal("ours", "≥", 40_000)).met is False


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (1234567, "1,230,000"), (123.4, "123"), (12.34, "12.3"), (0.01234, "0.0123"), (40000, "40,000"), (2, "2")],
)
def test_numbers_for_people(value: float | None, shown: str) -> None:
    assert number(value) == shown
