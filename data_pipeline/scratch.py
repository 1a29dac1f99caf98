"""`Scratch`, a temporary folder that outlives nobody: who uses it holds a lock on it, and what killed processes leave the next one removes."""

import fcntl
import hashlib
import os
import shutil
import socket
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass
class Scratch:
    """A temporary folder of this process, or of several of this machine: the last one removes it.

    The lock, which they share, goes with the process, in whatever container that is; a process number would not.
    """

    path: Path
    _lock: int | None

    @classmethod
    def make(cls, prefix: str, base: str | None = None) -> "Scratch":
        """A new folder in `base` (default: where temporary files go), after those of the same prefix whose owners were killed are removed."""
        parent = base or tempfile.gettempdir()
        remove_abandoned(prefix, parent)
        while True:
            path = Path(tempfile.mkdtemp(prefix=f"{prefix}{_machine()}-", dir=parent))
            if (scratch := cls.join(path)) is not None:
                return scratch  # otherwise another process found it before it was locked, and took it for abandoned

    @classmethod
    def join(cls, path: Path) -> "Scratch | None":
        """The folder that a process of this user has made on this machine and still uses; None where there is none of this name.

        One of another machine is none, even where the file system shows it: it may keep locks of folders to itself.
        """
        if f"{_machine()}-" not in path.name:
            return None
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return None
        fcntl.flock(lock, fcntl.LOCK_SH)
        if path.exists() and os.fstat(lock).st_uid == os.getuid():
            return cls(path, lock)
        os.close(lock)
        return None

    def remove(self) -> None:
        """Have done with the folder, and remove it unless another process uses it; a second time does nothing."""
        if self._lock is not None:
            with suppress(BlockingIOError):  # of several that leave at once, the last to let go of the shared lock gets this one
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def remove_abandoned(prefix: str, base: str) -> None:
    """Remove this user's folders in `base` whose names begin with `prefix` and whose lock nobody holds; not those of other machines, which cannot be
    seen: a network file system may keep locks of folders to itself."""
    for folder in Path(base).glob(f"{prefix}{_machine()}-*"):
        with suppress(OSError):  # somebody else's, gone, or in use
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


@cache
def _machine() -> str:
    """Four letters for what shares a kernel, and with it locks: this machine, all its containers included, until it is started again."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        identity = socket.gethostname().encode()
    return hashlib.sha256(identity).hexdigest()[:4]
