"""`mix64`: stable values, broadcasting, no visible structure."""

import numpy as np

from data_pipeline.hashing import mix64, threshold64


def test_values_never_change() -> None:
    # Every corpus, mask and order depends on them: a release that changes one breaks the resume of all runs.
    assert int(mix64(0)) == 0x9DA44F6E0275D406
    assert [int(value) for value in mix64(1, np.arange(3))] == [0x7E218861CEE1C985, 0x39613A104536B01E, 0xC2BE3F55CA0102DD]


def test_broadcasts_and_accepts_python_integers() -> None:
    table = mix64(7, np.arange(4)[:, None], np.arange(5))
    assert table.shape == (4, 5)
    assert table[2, 3] == mix64(7, 2, 3)
    assert int(mix64(2**64 + 5)) == int(mix64(5))
    assert int(mix64(np.int64(-1))) == int(mix64(2**64 - 1))


def test_order_of_words_matters() -> None:
    assert int(mix64(1, 2)) != int(mix64(2, 1))


def test_bits_look_random() -> None:
    hashes = mix64(np.arange(300)[:, None], np.arange(300)).ravel()
    assert len(np.unique(hashes)) == len(hashes)
    share_of_ones = np.unpackbits(hashes.view(np.uint8)).mean()
    assert abs(share_of_ones - 0.5) < 0.001
    neighbours = np.corrcoef(hashes[:-1].astype(float), hashes[1:].astype(float))[0, 1]
    assert abs(neighbours) < 0.02
    assert abs((hashes < threshold64(0.15)).mean() - 0.15) < 0.005
