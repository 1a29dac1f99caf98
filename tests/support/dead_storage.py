"""Storage that hangs, as on a mount whose server is gone: no call returns, and no time-out is known to anybody."""

import errno
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest

from data_pipeline.storage import Location


@contextmanager
def dead_storage() -> Generator[None]:
    """Every call to storage hangs until the block ends, and then fails."""
    over = threading.Event()

    def hang(*_: object, **__: object) -> None:
        over.wait()
        raise OSError(errno.EIO, "the mount came back")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("exists", "children", "read_bytes", "write_bytes", "write_json", "append_line", "iter_lines", "claim", "remove"):
            patch.setattr(Location, name, hang)
        try:
            yield
        finally:
            over.set()
