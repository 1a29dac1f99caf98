"""Copies a checkpoint out of a store to each node once, whatever the number of ranks there (every function is collective)."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from data_pipeline.scratch import Scratch
from data_pipeline.storage import Location
from trainer.agreement import Ranks
from trainer.manifest import Manifest, Problem, shares
from trainer.object_checkpoints import download

COPY = "maskwright-checkpoint-"


def copy_to_nodes(
    ranks: Ranks, location: Location, manifest: Manifest, needs: Callable[[int], Iterable[str]], on_piece: Callable[[], None]
) -> tuple[Scratch, list[list[Problem]]]:
    """Copy the files that the ranks of this node need (`needs(rank)`) into a folder that they share: each of them fetches a part.

    Returns the folder, which every rank has to `remove` when it has loaded, and what each rank found wrong with the files that it fetched.
    `on_piece` is called before each piece.

    Raises:
        MaskwrightError: a rank could not copy its part; the same on every rank, and the folder is gone.
    """
    own = Scratch.make(COPY)
    folder = own
    try:
        paths = ranks.all_do("make a folder for a copy of the checkpoint", lambda: str(own.path))
        first, folder = _first_of_node(paths, own)
        neighbours = [rank for rank, other in enumerate(ranks.all_do("find the ranks of its node", lambda: first)) if other == first]
        wanted = {name: manifest.files[name] for rank in neighbours for name in needs(rank)}
        part = shares(wanted, len(neighbours))[neighbours.index(ranks.rank)]
        found = ranks.all_do("copy its part of the checkpoint", lambda: download(location, manifest, part, folder.path, on_piece))
    except BaseException:
        folder.remove()
        raise
    finally:
        if folder is not own:
            own.remove()
    return folder, found


def _first_of_node(paths: Sequence[str], own: Scratch) -> tuple[int, Scratch]:
    """The lowest rank whose folder this process sees, and that folder: containers of one machine may have disks of their own."""
    for rank, path in enumerate(paths):
        if path == str(own.path):
            break
        if (folder := Scratch.join(Path(path))) is not None:
            return rank, folder
    return paths.index(str(own.path)), own
