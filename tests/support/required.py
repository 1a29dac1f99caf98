"""What this machine may lack: a test skips with the reason, or fails where MASKWRIGHT_REQUIRE names it (as CI does)."""

import os
from typing import NoReturn

import pytest


def missing(what: str, reason: str) -> NoReturn:
    """Skip the test, or fail it when `what` is required on this machine: MASKWRIGHT_REQUIRE=slurm,netns,s3."""
    if what in os.environ.get("MASKWRIGHT_REQUIRE", "").split(","):
        pytest.fail(f"{what} is required (MASKWRIGHT_REQUIRE) and missing: {reason}")
    pytest.skip(f"no {what}: {reason}")
