"""What passes between the command that starts a run, or submits it, and its first optimizer step (pure)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

Events = Sequence[Mapping[str, Any]]

PARTS = {
    "command": "the submitting command: Python, imports, reaching the cluster",
    "packing": "packing the packages that travel with the job",
    "upload": "handing packages and job over",
    "job": "the cluster starts the job",
    "driver": "the command that drives the run: Python, imports, the lease",
    "prepare": "looking for the corpus, or making it",
    "cluster": "starting or joining Ray, waiting for nodes",
    "earlier_attempts": "attempts that ended before their first step",
    "workers": "Ray starts the ranks: processes, torch, process group",
    "imports": "the ranks import the trainer and transformers",
    "engine": "network, DeepSpeed and its engine, checkpoint",
    "first_step": "the first step",
}
"""Keys of the JSON, in the order in which they follow each other, and what they are."""


def start_up(events: Events) -> dict[str, float]:
    """Seconds of each part of the newest command's way to its first step, which add up to the whole; none before that step is taken.

    Times of up to three machines are compared: a part is at least 0 where their clocks differ, and its neighbour so much shorter. What was not
    recorded (of a run that was not submitted, of an older release) is no part, or is in the one that follows.
    """
    places = [place for place, event in enumerate(events) if event["kind"] == "command_started"]
    command = events[places[-1]] if places else {}
    since = events[places[-1] :] if places else []
    step = next((event for event in since if event["kind"] == "first_step"), None)
    if step is None:
        return {}
    instants = [*_submitted(command, events), *_driver(command), *_attempts(since, step), ("first_step", step["time"])]
    times = [instants[0][1]]
    for _, instant in instants[1:]:
        times.append(max(times[-1], instant))
    return {name: round(end - begin, 3) for (name, _), (begin, end) in zip(instants[1:], pairwise(times), strict=True)}


Instants = list[tuple[str, float]]
"""Parts, and when each ended; the first is where all begins."""


def _submitted(command: Mapping[str, Any], events: Events) -> Instants:
    """Of what was submitted; a job that its cluster has started again does not begin with that."""
    job = command.get("submission")
    about_it = [event for event in events if job and event.get("submission") == job]
    event = next((event for event in about_it if event["kind"] == "submitted"), None)
    if event is None or sum(each["kind"] == "command_started" for each in about_it) > 1:
        return []
    packed_at = event["time"] - event.get("upload_s", 0.0)
    packing_at = packed_at - event.get("packing_s", 0.0)
    return [("", packing_at - event.get("command_s", 0.0)), ("command", packing_at), ("packing", packed_at), ("upload", event["time"])]


def _driver(command: Mapping[str, Any]) -> Instants:
    return [("job", command["time"] - command.get("process_s", 0.0)), ("driver", command["time"])]


def _attempts(since: Events, step: Mapping[str, Any]) -> Instants:
    starts = [event for event in since if event["kind"] == "attempt_started" and event.get("stage") == "pretrain"]
    own = next((event for event in starts if event["attempt"] == step["attempt"]), None)
    if own is None:
        return []
    first, ready = starts[0], next((e for e in since if e["kind"] == "group_started" and e["attempt"] == step["attempt"]), None)
    instants = [("prepare", first["time"] - first.get("cluster_s", 0.0)), ("cluster", first["time"]), ("earlier_attempts", own["time"])]
    if ready is not None:
        instants += [("workers", ready["time"] - ready.get("imports_s", 0.0)), ("imports", ready["time"])]
    return [*instants, ("engine", step["time"] - step.get("step_s", 0.0))]


def tell_start_up(parts: Mapping[str, float]) -> str:
    """`23.4 s to the first step: packing 0.1, …`, without what took no time; empty where there are no parts."""
    told = ", ".join(f"{name.replace('_', ' ')} {seconds:.1f}" for name, seconds in parts.items() if seconds >= 0.05)
    return f"{sum(parts.values()):.1f} s to the first step: {told}" if parts else ""
