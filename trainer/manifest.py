"""`Manifest`, the file that makes a checkpoint committed: what it holds, under which circumstances, and how to tell that it is intact.

Reads and hashes files; imports no torch unless asked for the present circumstances.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import EnvironmentMismatchError, MaskwrightError, StorageError, StorageUnreachableError
from data_pipeline.remote import is_passing
from data_pipeline.storage import Location
from trainer.software import own_version
from trainer.state import TrainState

FORMAT_VERSION = 1
MANIFEST = "MANIFEST.json"
_CHUNK_BYTES = 1 << 22


def nothing() -> None:
    """For who does not want to hear of progress."""


@dataclass(frozen=True)
class Problem:
    """A file that is not what the manifest says, and in which way."""

    file: str
    cause: str

    def __str__(self) -> str:
        return f"{self.file}: {self.cause}"


@dataclass(frozen=True)
class FileDigest:
    """Size and sha256 of one file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, on_piece: Callable[[], None] = nothing) -> "FileDigest":
        """Read and hash the whole file; `on_piece` is called before each piece."""
        digest = hashlib.sha256()
        num_bytes = 0
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                on_piece()
                digest.update(chunk)
                num_bytes += len(chunk)
        return cls(num_bytes, digest.hexdigest())


@dataclass(frozen=True)
class Circumstances:
    """What must stay the same for a resumed run to be bit-identical (R3), beside the files themselves."""

    world_size: int
    zero_stage: int
    precision: str
    threads_per_rank: int
    device: str
    versions: dict[str, str]
    """By package; ours, which checkpoints of older releases lack, by digest."""
    attention: Mapping[str, str] = field(default_factory=dict)
    """Kernels by row length; empty of a release that did not choose."""

    @classmethod
    def now(cls, *, world_size: int, zero_stage: int, precision: str, attention: Mapping[str, str]) -> "Circumstances":
        """The circumstances of this process."""
        import torch

        cuda = torch.cuda.is_available()
        # Kernels, and so the order of additions, differ between instruction sets as they do between GPU models.
        device = f"cuda {torch.cuda.get_device_name()}" if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}"
        versions = {**{name: version(name) for name in ("torch", "deepspeed", "transformers")}, "maskwright": own_version()}
        return cls(world_size, zero_stage, precision, torch.get_num_threads(), device, versions, attention)

    def differences(self, now: "Circumstances") -> list[str]:
        """One line for each way in which `now` differs, old value first."""
        before, after = asdict(self), asdict(now)
        before |= {f"{name} version": value for name, value in before.pop("versions").items()}
        after |= {f"{name} version": value for name, value in after.pop("versions").items() if name in self.versions}
        then = before.pop("attention") or dict.fromkeys(now.attention, "sdpa" if self.device.startswith("cuda") else "eager")
        before |= {f"attention at {length} tokens": kernel for length, kernel in then.items()}
        after |= {f"attention at {length} tokens": kernel for length, kernel in after.pop("attention").items()}
        return [f"{key.replace('_', ' ')}: {before.get(key)}, now {after.get(key)}" for key in after if before.get(key) != after[key]]


@dataclass(frozen=True)
class Manifest:
    """Contents of MANIFEST.json. `digest` covers everything else in it, so that a flipped bit of the manifest itself shows."""

    attempt: int
    circumstances: Circumstances
    files: dict[str, FileDigest]
    train_state: TrainState
    config: dict[str, Any]
    validation_loss: float | None = None
    """Of the validation at its step; None where there was none, as in older checkpoints."""

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return self.train_state.step

    @property
    def num_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.bytes for file in self.files.values())

    @property
    def digest(self) -> str:
        """Identity of the checkpoint: sha256 over the manifest's contents, and through them over every file."""
        return _digest(self._body())

    def _body(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "attempt": self.attempt,
            **{name: value for name, value in asdict(self.circumstances).items() if name != "attention" or value},
            "files": {name: asdict(file) for name, file in self.files.items()},
            "train_state": self.train_state.to_json(),
            "config": self.config,
            **({} if self.validation_loss is None else {"validation_loss": self.validation_loss}),
        }

    def to_json(self) -> dict[str, Any]:
        """JSON object; `from_json` reads it back."""
        return {**self._body(), "digest": self.digest}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Manifest":
        """The manifest written by `to_json`.

        Raises:
            ValueError: it is not whole.
        """
        if value.get("digest") != _digest({key: item for key, item in value.items() if key != "digest"}):
            raise ValueError("its contents do not match the digest in it")
        if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in value["files"]):
            raise ValueError("it names files outside its folder")
        names = ("world_size", "zero_stage", "precision", "threads_per_rank", "device", "versions")
        return cls(
            attempt=value["attempt"],
            circumstances=Circumstances(**{name: value[name] for name in names}, attention=value.get("attention", {})),
            files={name: FileDigest(**file) for name, file in value["files"].items()},
            train_state=TrainState.from_json(value["train_state"]),
            config=value["config"],
            validation_loss=value.get("validation_loss"),
        )


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest | Problem:
    """The manifest of a checkpoint folder, or what is wrong with it.

    Raises:
        EnvironmentMismatchError: a newer release wrote it. That is not damage: the checkpoint stays where it is.
        StorageError, StorageUnreachableError: it is there and cannot be read now, which says nothing about its contents.
    """
    path = folder / MANIFEST
    try:
        return parse_manifest(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return Problem(MANIFEST, "missing")
    except IsADirectoryError:
        return Problem(MANIFEST, "is a folder")
    except OSError as error:
        raise _cannot_read(path, error) from error


def parse_manifest(data: bytes, path: str) -> Manifest | Problem:
    """The manifest in a file's contents, or what is wrong with it; `path` is for the message.

    Raises:
        EnvironmentMismatchError: a newer release wrote it.
    """
    try:
        value: Any = json.loads(data)
    except ValueError as error:
        return Problem(MANIFEST, f"unreadable: {error}")
    if not isinstance(value, dict):
        return Problem(MANIFEST, "not a JSON object")
    found = value.get("format_version")
    if isinstance(found, int) and found > FORMAT_VERSION:
        raise EnvironmentMismatchError(
            f"{path} has format_version {found}; this release reads up to {FORMAT_VERSION}",
            "Upgrade maskwright to the release that wrote it, or newer.",
        )
    try:
        return Manifest.from_json(value)
    except (KeyError, TypeError, ValueError) as error:
        return Problem(MANIFEST, f"damaged: {error}")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write MANIFEST.json durably; it must be the last file written into `folder`."""
    Location.at(folder / MANIFEST).write_json(manifest.to_json())


def check_files(folder: Path, files: dict[str, FileDigest], names: Iterable[str], on_piece: Callable[[], None] = nothing) -> list[Problem]:
    """Compare files on disk with the expected sizes and digests. Sizes are looked at first: they cost nothing. `on_piece`: see `FileDigest.of`.

    Raises:
        StorageError, StorageUnreachableError: a file is there and cannot be read now, which says nothing about its contents.
    """
    problems: list[Problem] = []
    for name in names:
        expected, path = files[name], folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                problems.append(Problem(name, f"has {size} bytes instead of {expected.bytes}"))
            elif (found := FileDigest.of(path, on_piece).sha256) != expected.sha256:
                problems.append(Problem(name, f"sha256 is {found[:12]}… instead of {expected.sha256[:12]}…"))
        except (FileNotFoundError, NotADirectoryError):
            problems.append(Problem(name, "missing"))
        except IsADirectoryError:
            problems.append(Problem(name, "is a folder"))
        except OSError as error:
            raise _cannot_read(path, error) from error
    return problems


def _cannot_read(path: Path, error: OSError) -> MaskwrightError:
    kind = StorageUnreachableError if is_passing(error) else StorageError
    return kind(f"cannot read {path}: {error.strerror or error}", "Check the mount and the permissions, then run the command again.")


def shares(files: dict[str, FileDigest], num_parts: int) -> list[list[str]]:
    """Divide files into parts of about equal bytes: the largest first, each to the part that has least so far."""
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for name in sorted(files, key=lambda name: (-files[name].bytes, name)):
        smallest = loads.index(min(loads))
        parts[smallest].append(name)
        loads[smallest] += files[name].bytes
    return parts


def fsync_file(path: Path) -> None:
    """Make a file's contents durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
