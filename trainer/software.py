"""The software of this process: what has to be the same on all ranks of an attempt (reads the installed packages)."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("data_pipeline", "launcher", "trainer")
_LIBRARIES = ("torch", "deepspeed", "transformers", "ray")


def software() -> dict[str, str]:
    """Releases by name, and the digest of our own packages, which change without one."""
    import torch

    cuda = str(torch.version.cuda or "none")
    return {
        "Python": ".".join(platform.python_version_tuple()[:2]),
        **{name: _version(name) for name in _LIBRARIES},
        "CUDA": cuda,
        "maskwright": own_version(),
    }


@cache
def own_version() -> str:
    """Short digest of our packages as this process found them when it first asked."""
    return packages_digest(Path(__file__).parents[1])[:12]


def package_files(folder: Path) -> list[Path]:
    """The files of our packages in `folder`, sorted: not what Python makes of them, nor what is hidden."""
    found = (path for package in PACKAGES for path in (folder / package).rglob("*"))
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."))


def packages_digest(folder: Path) -> str:
    """Of names and contents: equal where the packages do the same."""
    digest = hashlib.sha256()
    for path in package_files(folder):
        digest.update(f"{path.relative_to(folder)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
