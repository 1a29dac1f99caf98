"""A package `trackio` that writes down what it is told: as much of one as accelerate's tracker of that name calls."""

import json
import os
from pathlib import Path
from typing import Any


def _write(what: str, value: Any) -> None:
    with Path(os.environ["TRACKIO_STAND_IN"]).open("a") as file:
        file.write(json.dumps([what, value]) + "\n")


class _Config:
    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:
        del allow_val_change
        _write("config", values)


class _Run:
    def log(self, values: dict[str, Any], step: int) -> None:
        if os.environ.get("TRACKIO_FAILS_AT") == str(step):
            raise ConnectionError("http://user:hunter2@trackio.example refused\nand more")
        _write("log", [step, values])

    def finish(self) -> None:
        _write("finish", None)


config = _Config()


def init(**arguments: Any) -> _Run:
    _write("init", arguments)
    return _Run()
