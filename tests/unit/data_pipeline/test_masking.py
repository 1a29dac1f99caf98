"""Masking: rates, special tokens, purity."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.hashing import mix64
from data_pipeline.masking import Masking, Vocabulary, mask_rows

VOCABULARY = Vocabulary(size=1200, pad=0, unk=1, cls=2, sep=3, mask=4, ordinary_ranges=((5, 900), (950, 1200)))


def _rows(num_rows: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    ids = (mix64(seed, np.arange(num_rows)[:, None], np.arange(width)) % np.uint64(895)).astype(np.int64) + 5
    ids[:, 0], ids[:, -1] = VOCABULARY.cls, VOCABULARY.sep
    ids[:, 7] = VOCABULARY.unk
    return ids, mix64(seed, 99, np.arange(num_rows))


def test_rates_and_replacements() -> None:
    original, keys = _rows(2000, 128, 0)
    masked = original.copy()
    positions, labels = mask_rows(masked, keys, Masking.of(VOCABULARY, 0.15))
    assert (np.diff(positions) > 0).all()
    assert (original.ravel()[positions] == labels).all()
    assert abs(len(positions) / (2000 * 125) - 0.15) < 0.003
    now = masked.ravel()[positions]
    assert abs((now == VOCABULARY.mask).mean() - 0.8) < 0.01
    assert abs((now == labels).mean() - 0.1) < 0.01
    random = now[(now != VOCABULARY.mask) & (now != labels)]
    assert set(np.unique(random)) <= set(VOCABULARY.ordinary_ids)
    assert len(np.unique(random)) > 1000  # drawn from the whole vocabulary, not from the tokens of the batch
    assert random.max() > 1190
    untouched = np.ones(masked.size, dtype=bool)
    untouched[positions] = False
    assert (masked.ravel()[untouched] == original.ravel()[untouched]).all()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(9, 64), st.sampled_from([0.05, 0.15, 0.9]))
def test_special_tokens_are_never_chosen(seed: int, width: int, rate: float) -> None:
    original, keys = _rows(8, width, seed)
    _, labels = mask_rows(original.copy(), keys, Masking.of(VOCABULARY, rate))
    assert not set(labels.tolist()) & {0, 1, 2, 3, 4}


@given(st.integers(0, 10**6))
def test_a_row_does_not_depend_on_its_neighbours_nor_on_padding(seed: int) -> None:
    masking = Masking.of(VOCABULARY, 0.15)
    original, keys = _rows(6, 40, seed)
    together = original.copy()
    mask_rows(together, keys, masking)
    alone = np.concatenate([original[4:5], np.zeros((1, 24), dtype=np.int64)], axis=1)
    mask_rows(alone, keys[4:5], masking)
    assert (alone[0, :40] == together[4]).all()


def test_other_keys_give_other_masks() -> None:
    masking = Masking.of(VOCABULARY, 0.15)
    original, keys = _rows(50, 128, 0)
    first, _ = mask_rows(original.copy(), keys, masking)
    second, _ = mask_rows(original.copy(), mix64(keys, 1), masking)
    assert len(set(first.tolist()) & set(second.tolist())) < 0.3 * len(first)
