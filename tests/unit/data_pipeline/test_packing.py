"""Layouts: every token has a place of its own, samples stay whole, rows are as full as best-fit decreasing makes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.packing import LAYOUTS, Packing, pack_rows

LENGTHS = st.lists(st.integers(2, 64), min_size=1, max_size=80).map(np.array)


@given(LENGTHS, st.sampled_from(sorted(LAYOUTS)))
def test_every_token_has_a_place_and_samples_stay_whole(lengths: np.ndarray, packing: Packing) -> None:
    layout = LAYOUTS[packing](lengths, 64)
    places = layout.places(lengths)
    assert len(set(places.tolist())) == len(places) == lengths.sum()
    assert places.max() < layout.num_places
    assert layout.width % 8 == 0
    stops = np.cumsum(lengths)
    for start, stop, first in zip(stops - lengths, stops, layout.starts, strict=True):
        assert places[start:stop].tolist() == list(range(first, first + stop - start))
        assert places[start] // layout.width == places[stop - 1] // layout.width


@given(LENGTHS)
def test_a_row_is_opened_only_when_no_other_has_room(lengths: np.ndarray) -> None:
    layout = pack_rows(lengths, 64)
    used = np.bincount(layout.starts // 64, weights=lengths, minlength=layout.num_rows)
    assert used.min() > 0
    assert len(used) == 1 or np.sort(used)[:2].sum() > 64


@pytest.mark.parametrize(
    ("lengths", "rows"), [([64, 64], 2), ([40, 24, 30, 34], 2), ([50, 14, 40, 20, 4], 2), ([33, 33, 33], 3), ([64], 1), ([60, 4, 60, 4], 2)]
)
def test_rows_that_can_be_filled_are(lengths: list[int], rows: int) -> None:
    assert pack_rows(np.array(lengths), 64).num_rows == rows


def test_packing_does_not_depend_on_more_than_lengths() -> None:
    lengths = np.random.default_rng(0).integers(5, 64, 64)
    one, two = pack_rows(lengths, 64), pack_rows(lengths.copy(), 64)
    assert (one.starts == two.starts).all()
