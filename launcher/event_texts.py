"""Events of a run in words, for people (pure)."""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.redaction import redacted

Event = Mapping[str, Any]

FROM_RANKS = {
    "precision_chosen",
    "attention_chosen",
    "compiling",
    "compiled",
    "slow_precision",
    "resumed",
    "continued",
    "checkpoint_failed",
    "checkpoint_damaged",
    "numeric_trouble",
    "batch_skipped",
    "data_skipped",
    "tracker_failed",
}
"""What ranks record, and who watches should read at once."""
_DEVICES = {"cpu": "processor", "cuda": "GPU"}
_HIDDEN = {"time", "kind", "attempt", "step", "settings", "problems"}


def tell(event: Event) -> str:
    """What happened, in one line; an event of an unknown kind as its fields."""
    words = _TEXTS.get(event["kind"])
    return redacted(words(event) if words is not None else _fields(event))


def title(event: Event) -> str:
    """The event's kind in words."""
    return event["kind"].replace("_", " ")


def _fields(event: Event) -> str:
    return "; ".join(f"{key} {value}" for key, value in event.items() if key not in _HIDDEN and value not in (None, "", []))


def _resumed(event: Event) -> str:
    rewound, exact = event.get("rewound_from"), event.get("not_bit_exact_because")
    return (
        f"resumed at step {event['step']}: micro-batches repeated {event.get('repeated', 0)}, skipped {event.get('skipped', 0)}; "
        f"steps lost {event.get('steps_lost', 0)}, seconds lost {event.get('seconds_lost') or 0:.1f}; cause: {event.get('cause', 'not recorded')}"
        + (f"; rewound from step {rewound}" if rewound is not None else "")
        + (f"; loaded in {event['load_s']:.1f} s" if event.get("load_s") is not None else "")
        + (f"; not bit-exact: {', '.join(exact) if isinstance(exact, list) else exact}" if exact else "")
    )


def _continued(event: Event) -> str:
    """R8's loss continuity."""
    if event.get("loss_before") is None:
        return f"first step after the resume, {event['step']}: loss {_number(event.get('loss'))}"
    where = "at the same step before" if event.get("same_step") else "at the step before"
    difference = event.get("relative_difference")
    equal = event.get("same_step") and event.get("loss") == event["loss_before"]
    return f"first step after the resume, {event['step']}: loss {_number(event.get('loss'))}, {where} {_number(event['loss_before'])}" + (
        ", bit-identical" if equal else f", relative difference {difference:.1e}" if difference is not None else ""
    )


def _rank_unhealthy(event: Event) -> str:
    where = f" on {event['node']}" if event.get("node") else ""
    who = "a rank" if event.get("rank") is None else f"rank {event['rank']}"
    return (
        f"{who}{where} (process {event.get('pid')}) {event.get('state', 'unhealthy')} in phase {event.get('phase')} of step "
        f"{event.get('step')} for {event.get('seconds') or 0:.0f} s" + (f"; stacks of all ranks: {event['stacks']}" if event.get("stacks") else "")
    )


def _worker_failed(event: Event) -> str:
    return f"{event.get('failure', 'failure')}: {event.get('cause', 'cause not recorded')}"  # which names node and phase


def _numeric_trouble(event: Event) -> str:
    value = event.get("value")
    target = event.get("rewind_to")
    return (
        f"{str(event.get('trouble', 'numeric trouble')).replace('_', ' ')} at step {event['step']}{'' if value is None else f' ({_number(value)})'}, "
        f"micro-batches {_range(event.get('micro_batches'))}; policy: {event.get('policy')}"
        + (f"; answer: {event['response']}" if event.get("response") else "")
        + (f" to step {target}" if target is not None else "")
    )


def _batch_skipped(event: Event) -> str:
    return f"the batch of step {event['step']} (micro-batches {_range(event.get('micro_batches'))}) was skipped on purpose{_because(event)}"


def _data_skipped(event: Event) -> str:
    block = f"{event.get('block')} of {event.get('corpus')}/{event.get('shard')}"
    return f"damaged block {block} left out, {event.get('samples', '?')} samples{_because(event)}"


def _checkpoint_committed(event: Event) -> str:
    stall, write = event.get("stall_s", event.get("seconds")), event.get("write_s")
    return f"checkpoint of step {event['step']}: {(event.get('bytes') or 0) / 1e6:,.1f} MB" + "".join(
        f", {what} {seconds:.2f} s" for what, seconds in (("training stood still", stall), ("written in", write)) if seconds is not None
    )


def _checkpoint_failed(event: Event) -> str:
    rank = f" on rank {event['rank']}" if event.get("rank") is not None else ""
    return f"the checkpoint of step {event['step']} failed{rank}{', it is tried again' if event.get('retried') else ''}{_because(event)}"


def _because(event: Event) -> str:
    return f": {event['cause']}" if event.get("cause") else ""


def _compiled(event: Event) -> str:
    breaks = f"; the compiler gave up in {event['graph_breaks']} places, which stay as slow as they were" if event.get("graph_breaks") else ""
    return f"compiled in {event.get('seconds')} s{breaks}"


def _range(numbers: Any) -> str:
    return f"{numbers[0]} to {numbers[1]}" if isinstance(numbers, list | tuple) and len(numbers) == 2 else str(numbers)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else str(value)


_TEXTS: dict[str, Callable[[Event], str]] = {
    "resumed": _resumed,
    "continued": _continued,
    "rank_unhealthy": _rank_unhealthy,
    "worker_failed": _worker_failed,
    "numeric_trouble": _numeric_trouble,
    "batch_skipped": _batch_skipped,
    "data_skipped": _data_skipped,
    "checkpoint_committed": _checkpoint_committed,
    "checkpoint_failed": _checkpoint_failed,
    "checkpoint_damaged": lambda event: f"the checkpoint of step {event['step']} is damaged{_because(event)}; set aside as {event.get('moved_to')}",
    "resized": lambda event: f"from {event.get('before')} ranks to {event.get('after')}{_because(event)}",
    "preempted": lambda event: f"{', '.join(event.get('nodes') or ['machines'])} will be taken away: saving a checkpoint{_because(event)}",
    "precision_chosen": lambda event: (
        f"computing in {event.get('precision')}, which is fastest on this {_DEVICES.get(event.get('device', ''), 'device')}"
    ),
    "attention_chosen": lambda event: (
        f"attention kernel: {event.get('kernels')}, which is fastest on this {_DEVICES.get(event.get('device', ''), 'device')}"
    ),
    "compiling": lambda event: f"compiling {event.get('layers')} layers, which may take a minute or two",
    "compiled": _compiled,
    "slow_precision": lambda event: (
        f"{event.get('precision')} takes {event.get('factor')} times as long as {event.get('faster')} in a matrix product on this processor; "
        "precision: auto takes the faster"
    ),
    "tracker_failed": lambda event: f"tracker {event.get('tracker')}: {event.get('cause')}; training goes on without it",
    "submitted": lambda event: f"job {event.get('submission')} handed over in {event.get('upload_s', 0.0):.1f} s",
    "group_started": lambda event: f"the ranks have started, their imports took {event.get('imports_s', 0.0):.1f} s",
    "first_step": lambda event: f"the first step of the attempt took {event.get('step_s', 0.0):.1f} s",
    "config_changed": lambda event: f"{event.get('path')}: {event.get('before')} -> {event.get('after')}",
}
