"""What a run is not resumed from, and what is not saved: each function looks at one thing and raises what a user can act on."""

import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress

import torch

from data_pipeline.config import Phase
from data_pipeline.errors import ConfigError, EnvironmentMismatchError, NotFoundError, NumericTroubleError, StorageError
from data_pipeline.storage import Location
from trainer.agreement import Ranks
from trainer.runlog import RunFolder
from trainer.state import TrainState

SHARED_S = 30.0
"""How long a rank looks for what rank 0 has written: network file systems show it late."""
_POLL_S = 0.1


def require_shared(folder: Location, ranks: Ranks, timeout_s: float = SHARED_S) -> None:
    """Rank 0 writes a word that nobody can know, every rank reads it back. Collective.

    Raises:
        StorageError: a rank does not see it within `timeout_s`; names the rank, its host and rank 0's, which may as well be the one apart.
    """

    def write() -> tuple[str, str]:
        word = uuid.uuid4().hex
        (folder / f".shared.{word[:8]}.tmp").write_bytes(word.encode())
        return word, socket.gethostname()

    word, writer = ranks.rank_zero_does("write into the run folder", write)
    file = folder / f".shared.{word[:8]}.tmp"

    def read() -> None:
        deadline, found = time.monotonic() + timeout_s, None
        while found != word:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"host {socket.gethostname()} does not see in {folder} what rank 0 wrote there on host {writer}: the storage is not shared",
                    "Set `storage` to a path that all workers share, or to a URL.",
                )
            with suppress(NotFoundError):  # not yet: attributes of network file systems are cached for seconds
                found = file.read_bytes().decode(errors="replace")
            if found != word:
                time.sleep(_POLL_S)

    ranks.all_do("read the run folder", read)
    ranks.rank_zero_does("write into the run folder", file.remove)


def require_same_software(ranks: Ranks, own: Mapping[str, str]) -> None:
    """Refuse ranks whose software differs: they may disagree in a bit, in what they save, or hang. Collective.

    Raises:
        EnvironmentMismatchError: names the library, both releases, and a host of each.
    """
    first, *others = ranks.all_do("tell its software", lambda: (socket.gethostname(), dict(own)))
    for host, theirs in others:
        if different := [name for name, release in theirs.items() if first[1].get(name) != release]:
            told = ", ".join(f"{name} {first[1].get(name)} on {first[0]} and {theirs[name]} on {host}" for name in different)
            raise EnvironmentMismatchError(
                f"the machines of the run have other software: {told}", "Install the same packages on all of them, then `maskwright resume` the run."
            )


def require_room(run: RunFolder, step: int, num_bytes: int, free_bytes: int | None) -> None:
    """Refuse a save that does not fit.

    Raises:
        StorageError: there is less room than it takes.
    """
    if free_bytes is not None and num_bytes > free_bytes:
        raise StorageError(
            f"the checkpoint of step {step} takes {num_bytes:,} bytes, and {free_bytes:,} are free in {run.checkpoints}",
            "Free space (`maskwright clean`), lower checkpoint.keep_last, or choose another --storage; then `maskwright resume` the run.",
        )


def require_finite(probe: Mapping[str, torch.Tensor], step: int) -> None:
    """Refuse to save weights that went bad between two steps (a flipped bit): a checkpoint is what all is recovered from.

    Raises:
        NumericTroubleError: the logits of a checkpoint's probe are not finite; another attempt resumes from the checkpoint before.
    """
    if not all(torch.isfinite(logits).all() for logits in probe.values()):
        raise NumericTroubleError(
            f"the weights after {step} steps are not finite; they are not saved", "`maskwright resume` goes on from the checkpoint before.", step=step
        )


def require_same_data(saved: TrainState, now: TrainState) -> None:
    """Refuse to continue on another corpus or tokenizer than the checkpoint's: its position would mean other data.

    Raises:
        ConfigError: they differ.
    """
    for what, before, after in [
        ("corpus", saved.corpus_fingerprint, now.corpus_fingerprint),
        ("tokenizer", saved.tokenizer_digest, now.tokenizer_digest),
    ]:
        if before != after:
            raise ConfigError(
                f"the checkpoint of step {saved.step} was trained on {what} {before[:12]}; this attempt has {what} {after[:12]}",
                "Restore the corpus of the run, or start a new run under another `name`.",
            )


def require_same_position(saved: TrainState, phases: tuple[Phase, ...]) -> None:
    """Refuse a checkpoint that has consumed another number of micro-batches than come before its step here: data would be repeated or skipped.

    Raises:
        ConfigError: the numbers differ.
    """
    phase = next(phase for phase in reversed(phases) if phase.first_step <= saved.step)
    expected = phase.first_micro_batch + (saved.step - phase.first_step) * phase.num_micro_batches
    if saved.micro_batches_consumed != expected:
        raise ConfigError(
            f"the checkpoint of step {saved.step} has consumed {saved.micro_batches_consumed} micro-batches; by this configuration, {expected}",
            "Restore `batch` as it was when the checkpoint was written, or start a new run under another `name`.",
        )
