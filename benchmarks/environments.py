"""The peers: which release, in which environment. Where our pins and theirs clash, each gets a virtual environment of its own, made on demand."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import installed_version

CACHE = Path(os.environ.get("MASKWRIGHT_BENCH_CACHE", "~/.cache/maskwright-bench")).expanduser()
_DONE = ".installed"
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Peer:
    """A library that is compared with, pinned."""

    name: str
    distribution: str
    version: str
    pins: tuple[str, ...] = ()
    """What else its environment holds. Empty: it lives in our own environment."""

    @property
    def label(self) -> str:
        """Distribution and version, as results name it."""
        return f"{self.distribution} {self.version}"


_OURS = ("torch>=2.11,<2.14", "pydantic>=2.10", "PyYAML>=6.0", "fsspec>=2025.3", "tenacity>=9.0", "webdataset==1.0.2")
"""What our masking needs beside numpy when it runs on a peer's reader."""

WEBDATASET = Peer("webdataset", "webdataset", "1.0.2")
STREAMING = Peer("streaming", "mosaicml-streaming", "0.13.0", ("transformers==4.57.3", "numpy==2.1.3", *_OURS))
LITDATA = Peer("litdata", "litdata", "0.2.76", ("transformers==5.23.0", "numpy==2.4.6", *_OURS))
PEERS = (WEBDATASET, STREAMING, LITDATA)


class PeerUnavailableError(RuntimeError):
    """The environment of a peer could not be made; the message is the reason."""


def python_of(peer: Peer, progress: Callable[[str], None]) -> str:
    """The interpreter that has the peer, its environment made first where it is missing.

    Raises:
        PeerUnavailableError: it cannot be installed here, or another release is.
    """
    if not peer.pins:
        found = installed_version(peer.distribution)
        if found != peer.version:
            raise PeerUnavailableError(f"{peer.label} is not installed, found {found}")
        return sys.executable
    folder = CACHE / "peers" / f"{peer.name}-{peer.version}"
    python = folder / "bin" / "python"
    wanted = "\n".join([peer.label, *peer.pins])
    if not (folder / _DONE).exists() or (folder / _DONE).read_text() != wanted:
        progress(f"installing {peer.label} into an environment of its own (about 1 GB, once)")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], peer)
        _run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{peer.distribution}=={peer.version}", *peer.pins], peer
        )
        (folder / _DONE).write_text(wanted)
    return str(python)


def _run(command: list[str], peer: Peer) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired, OSError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise PeerUnavailableError(f"{peer.label} cannot be installed here: {lines[-1] if lines else error}") from error
