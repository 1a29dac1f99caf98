"""Finds an earlier run of the same network and precision in the storage, and what its steps took (reads local files)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import MaskwrightError
from data_pipeline.lines import last_lines
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from launcher.history import History, attempts_of
from launcher.plan_time import Speed, measured_speed
from launcher.plan_work import PhaseWork, mean_sample
from launcher.runs import read_config, run_ids
from trainer.checkpoint_store import checkpoints_of
from trainer.config import RunConfig
from trainer.dimensions import Dimensions
from trainer.gpus import find_gpu
from trainer.manifest import Manifest
from trainer.runlog import RunFolder, records

_MOST_RUNS = 20
"""Newest runs that are looked at."""
_WHOLE_BYTES = 16 << 20
"""Records up to here are read whole; of more the last ones."""


@dataclass(frozen=True)
class Ranks:
    """On what a rank computes."""

    gpu: str | None
    """None for a CPU."""
    threads: int | None
    """Of its CPU; None where that is not known, or does not matter."""


def earlier_speed(config: RunConfig, precision: str, network: Dimensions | None, mixture: Mixture | None, ranks: Ranks) -> Speed | None:
    """The speed of the run itself, else that of the newest like it on the same kind of device; None where there is none."""
    storage = Location.at(config.storage)
    if network is None or not storage.is_local:
        return None
    for run in _candidates(storage, config.name):
        try:
            earlier = read_config(run)
        except MaskwrightError:
            continue
        if _is_alike(config, earlier) and _computed_in(run, earlier, on_gpu=ranks.gpu is not None) == precision:
            caveat = _caveat(run, ranks)
            found = _speed_of(run, earlier, network, mixture) if caveat is not None else None
            if found is not None:
                return replace(found, caveat=caveat or "")
    return None


def _candidates(storage: Location, name: str) -> Iterator[RunFolder]:
    runs = [RunFolder(storage / run) for run in run_ids(storage)]
    with_metrics = [run for run in runs if run.metrics.exists()]
    newest = sorted(with_metrics, key=lambda run: (run.root.name != name, -run.metrics.path.stat().st_mtime))
    return iter(newest[:_MOST_RUNS])


def _is_alike(config: RunConfig, earlier: RunConfig) -> bool:
    """Whether a micro-step of the two is the same work but for its size."""
    return (
        earlier.model.model_dump(exclude={"initializer_range", "init_from"}) == config.model.model_dump(exclude={"initializer_range", "init_from"})
        and earlier.zero == config.zero
        and earlier.optimizer.kind == config.optimizer.kind
        and earlier.objective == config.objective
        and earlier.batch.packing == config.batch.packing
        and earlier.batch.sequence_lengths == config.batch.sequence_lengths
    )


def _computed_in(run: RunFolder, earlier: RunConfig, *, on_gpu: bool) -> str | None:
    """The precision of a run, if it ran on the kind of device that is planned for."""
    devices = {event.get("device", "") for event in run.read_events() if event["kind"] == "attempt_started"}
    if devices != {"cuda" if on_gpu else "cpu"}:
        return None
    if earlier.precision != "auto":
        return earlier.precision
    return run.choices.read_json().get("precision") if run.choices.exists() else None


def _caveat(run: RunFolder, ranks: Ranks) -> str | None:
    """What a person has to know of the device of a run, by its newest checkpoint: empty where it is that of `ranks`; None where it is another GPU."""
    checkpoints = checkpoints_of(run)
    manifests = (checkpoints.read(entry.name) for entry in reversed(checkpoints.committed()))
    trained = next((found.circumstances for found in manifests if isinstance(found, Manifest)), None)
    if trained is None:
        return f"no checkpoint says on {'which GPU' if ranks.gpu else 'how many threads'}"
    if ranks.gpu is not None:
        return "" if find_gpu(trained.device) == find_gpu(ranks.gpu) else None
    if ranks.threads in (None, trained.threads_per_rank):
        return ""
    return f"a rank's threads: {trained.threads_per_rank} there, {ranks.threads} here"


def _speed_of(run: RunFolder, earlier: RunConfig, network: Dimensions, mixture: Mixture | None) -> Speed | None:
    events = run.read_events()
    history = History.of(_records(run), events)
    work = [PhaseWork.of(phase, mean_sample(mixture, phase.sequence_length, earlier.objective), earlier.objective) for phase in earlier.phases]
    return measured_speed(run.root.name, history, attempts_of(events, history), work, network)


def _records(run: RunFolder) -> Iterator[dict[str, Any]]:
    if run.metrics.path.stat().st_size <= _WHOLE_BYTES:
        return run.iter_metrics()
    return records(last_lines(run.metrics))
