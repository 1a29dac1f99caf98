"""Model folders wherever they lie: a local copy to read from, a digest of what they hold, publication of a finished folder."""

import hashlib
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.errors import NotFoundError
from data_pipeline.storage import Location, storage_errors

_READ_BYTES = 1 << 20


@contextmanager
def local_folder(model: Location) -> Generator[str]:
    """A local path of the model folder: its own, or that of a copy which is removed at the end.

    Raises:
        NotFoundError: there is no model folder.
    """
    if not (model / "config.json").exists():
        raise NotFoundError(f"{model} is not a model folder: it has no config.json", "Export the run (`maskwright export`) or check the path.")
    if model.is_local:
        yield model.url
        return
    with tempfile.TemporaryDirectory(prefix="model-") as copy:
        fs, path = model.filesystem()
        fs.get(f"{path}/", f"{copy}/", recursive=True)
        yield copy


def model_digest(folder: str) -> str:
    """SHA-256 over what decides the model's outputs: its config and its weights."""
    digest = hashlib.sha256()
    for path in sorted([Path(folder, "config.json"), *Path(folder).glob("*.safetensors")]):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                digest.update(part)
    return digest.hexdigest()


def publish(folder: Path, destination: Location) -> None:
    """Move a finished local folder to `destination`, replacing what is there; a reader of a local destination never sees a part."""
    with storage_errors(destination.url):
        if not destination.is_local:
            destination.remove()
            fs, path = destination.filesystem()
            fs.put(f"{folder}/", f"{path}/", recursive=True)
            return
        destination.path.parent.mkdir(parents=True, exist_ok=True)
        destination.remove()
        folder.rename(destination.path)
