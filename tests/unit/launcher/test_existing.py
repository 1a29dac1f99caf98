"""What is asked of a Ray cluster's head, which may hang."""

import importlib
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RaySystemError

from data_pipeline.errors import UnreachableError
from launcher.clusters import existing
from launcher.clusters.local import keep_from_connecting

NAME = "0a" * 14 + "01000000"
"""A placement group's; ends with the driver's job."""


def test_a_head_that_hangs_holds_up_nobody_and_what_it_says_too_late_removes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    back, asked, removed = threading.Event(), list[threading.Thread](), list[Any]()

    def table() -> dict[str, dict[str, str]]:
        asked.append(threading.current_thread())
        assert back.wait(60)
        return {NAME: {"state": "CREATED"}}

    module = importlib.import_module("ray.util.placement_group")
    monkeypatch.setattr(module, "placement_group_table", table)
    monkeypatch.setattr(module, "remove_placement_group", removed.append)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01000000"))
    monkeypatch.setattr(existing, "_HEAD_ANSWER_S", 0.2)
    began = time.monotonic()
    with pytest.raises(UnreachableError, match="does not answer"):
        existing.remove_placement_groups()
    assert time.monotonic() - began < 20
    back.set()
    asked[0].join(10)
    assert not removed
    monkeypatch.setattr(existing, "_HEAD_ANSWER_S", 30.0)
    existing.remove_placement_groups()
    assert [group.id.hex() for group in removed] == [NAME]


def test_what_asks_a_ray_that_was_ended_gets_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself Ray starts another cluster for whoever asks it anything."""
    monkeypatch.setattr("ray._private.auto_init_hook.ray", ray)
    keep_from_connecting(ray)
    assert not ray.is_initialized()
    for ask in (lambda: ray.get([]), lambda: ray.put(1), lambda: ray.get_actor("board")):
        with pytest.raises(RaySystemError, match="Ray was ended"):
            ask()
    with pytest.raises(UnreachableError, match="Ray"):
        existing.remove_placement_groups()
    assert not ray.is_initialized()
