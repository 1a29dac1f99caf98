"""What does the model see at step S: global batches put together from the ranks' own streams, as the trainer would read them."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.config import ObjectiveConfig, Phase
from data_pipeline.micro_batch import MicroBatch, step_digest
from data_pipeline.order import micro_batches_of_step, rank_micro_batches
from data_pipeline.stream import MicroBatchStream


def inspect_steps(
    stream: MicroBatchStream, phases: tuple[Phase, ...], first_step: int, num_steps: int, world_size: int, rank: int | None
) -> Iterator[dict[str, Any]]:
    """One object per step: step, digest (16 hex digits), num_samples, num_tokens; with `rank`, of that rank's part. `skipped_blocks` are
    damaged blocks left out (see `data.on_damage`), named at the first step that would have had samples of them.

    Every rank reads through a stream of its own, so equal digests at two world sizes are evidence, not a tautology.
    """
    ranks = range(world_size) if rank is None else [rank]
    streams = {each: copy.copy(stream) for each in ranks}  # a copy shares no window
    named: set[str] = set()
    for step in range(first_step, first_step + num_steps):
        numbers = micro_batches_of_step(phases, step)
        parts = [part for each in ranks for part in _read_part(streams[each], numbers, each, world_size)]
        skipped = {block.name for _, batch in parts for block in batch.skipped} - named
        named |= skipped
        yield {
            "step": step,
            "digest": f"{step_digest((position, batch.digest) for position, batch in parts):016x}",
            "num_samples": sum(batch.num_samples for _, batch in parts),
            "num_tokens": sum(batch.num_tokens for _, batch in parts),
            "skipped_blocks": sorted(skipped),
        }


@dataclass(frozen=True)
class SampleText:
    """One sample as people read it."""

    text: str
    """Its tokens; a masked one as `[what the model sees -> what it has to say]`."""
    sentences: str
    """What the second segment is to the first."""


def sample_texts(stream: MicroBatchStream, phases: tuple[Phase, ...], step: int, count: int) -> Iterator[SampleText]:
    """The first samples of a step's global batch."""
    from data_pipeline.tokenizer import load_tokenizer

    tokenizer: Any = load_tokenizer(stream.mixture.tokenizer_folder)
    for number in micro_batches_of_step(phases, step):
        for text in _texts(stream[number], tokenizer, stream.objective):
            if count <= 0:
                return
            count -= 1
            yield text


def _texts(batch: MicroBatch, tokenizer: Any, objective: ObjectiveConfig) -> Iterator[SampleText]:
    samples = batch.samples
    labels: dict[int, str] = {}
    if objective.kind == "mlm":  # the next token stands there anyway
        labels = dict(zip(samples.mlm_positions.tolist(), tokenizer.convert_ids_to_tokens(samples.mlm_labels.tolist()), strict=True))
    tokens: list[str] = tokenizer.convert_ids_to_tokens(samples.token_ids.tolist())
    start = 0
    for length, label in zip(samples.lengths.tolist(), samples.nsp_labels.tolist(), strict=True):
        words: list[str] = []
        for place, token in enumerate(tokens[start : start + length], start):
            if place in labels:
                words.append(f"[{token} -> {labels[place]}]")
            elif token.startswith("##") and not words[-1].endswith("]"):
                words[-1] += token[2:]
            else:
                words.append(token)
        yield SampleText(" ".join(words), _RELATIONS.get(label, {}).get(objective.sentence_objective, "a single segment"))
        start += length


_RELATIONS = {
    0: {"nsp": "the second segment follows the first", "sop": "the segments are in order"},
    1: {"nsp": "the second segment is from another document", "sop": "the segments have changed places"},
}


def _read_part(stream: MicroBatchStream, numbers: Sequence[int], rank: int, world_size: int) -> list[tuple[int, MicroBatch]]:
    return [(position, stream[numbers[position]]) for position in rank_micro_batches(len(numbers), rank, world_size)]
