"""Micro-batches of generated tokens for the training benchmarks, as the stream makes them and as stock transformers takes them (pure)."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.training import Network, Shape

MASK_RATE = 0.15
IGNORED = -100
_SHORTEST = 8
_CONCENTRATION = 3.0
"""Of the beta distribution of lengths: they spread over the whole row, as those of short documents do."""


def micro_batches(shape: Shape, network: Network) -> list[Any]:
    """`shape.count` of `data_pipeline.stream.MicroBatch`; the same whenever they are made."""
    is_causal = network.objective.get("kind") == "clm"
    return [micro_batch(shape, network.vocab_size, number, is_causal=is_causal) for number in range(shape.count)]


def micro_batch(shape: Shape, vocab_size: int, number: int, *, is_causal: bool = False) -> Any:
    """Samples of the lengths that `shape` tells, 15 % masked, half of the pairs with the label 1; or every next token to be predicted."""
    from data_pipeline.packing import LAYOUTS
    from data_pipeline.stream import MicroBatch
    from data_pipeline.window import Finished
    from tests.support.batches import SPECIAL

    random = np.random.default_rng(number)
    lengths = sample_lengths(shape, random)
    ends = np.cumsum(lengths)
    ids = random.integers(len(SPECIAL), vocab_size, ends[-1])
    ids[ends - lengths], ids[ends - 1] = SPECIAL["cls"], SPECIAL["sep"]
    if is_causal:
        positions = np.delete(np.arange(len(ids)), ends - 1)
        labels = ids[positions + 1]
    else:
        ordinary = np.flatnonzero(ids >= len(SPECIAL))
        positions = np.sort(random.choice(ordinary, round(MASK_RATE * len(ordinary)), replace=False))
        labels = ids[positions]
        ids[positions] = SPECIAL["mask"]
    samples = Finished(ids, lengths, lengths // 2, positions, labels, random.permutation(np.arange(shape.samples) % 2))
    return MicroBatch(number, samples, LAYOUTS[shape.packing](lengths, shape.length), SPECIAL["pad"])


def sample_lengths(shape: Shape, random: np.random.Generator) -> NDArray[np.int64]:
    """(B,) lengths whose mean is `fill * length`, to half a token a sample; the first is `length`."""
    if shape.fill >= 1.0:
        return np.full(shape.samples, shape.length)
    drawn = random.beta(_CONCENTRATION * shape.fill, _CONCENTRATION * (1 - shape.fill), shape.samples) * shape.length
    lengths = np.clip(drawn.round().astype(np.int64), _SHORTEST, shape.length)
    lengths[0] = shape.length
    wanted = round(shape.fill * shape.length * shape.samples)
    while missing := wanted - int(lengths.sum()):
        step = 1 if missing > 0 else -1
        free = np.flatnonzero((lengths + step >= _SHORTEST) & (lengths + step <= shape.length))
        free = free[free > 0][: abs(missing)]
        if not len(free):
            break
        lengths[free] += step
    return lengths


def stock_inputs(batch: Any) -> dict[str, Any]:
    """A padded micro-batch as `BertForPreTraining` takes it."""
    import torch

    labels = np.full(batch.layout.num_places, IGNORED)
    labels[batch.mlm_positions] = batch.mlm_labels
    arrays = {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "attention_mask": np.sign(batch.sample_ids),
        "labels": labels.reshape(batch.input_ids.shape),
        "next_sentence_label": batch.nsp_labels,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
