"""The training benchmarks: equal work for all contestants, products counted as they are made, clocks that count what they say."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.contestants import layouts
from benchmarks.contestants.device import rate
from benchmarks.contestants.gemms import attention_products, record, replay
from benchmarks.contestants.training import network_of, run_config
from benchmarks.contestants.training_batches import micro_batch, micro_batches, sample_lengths, stock_inputs
from benchmarks.contestants.training_peers import Clock, PlainLoop, hugging_face, plain_loop
from benchmarks.train_packing import FILLS, LAYOUTS
from benchmarks.train_speed import pairs
from benchmarks.training import BASE, LARGE, SMALL, TINY, Network, Shape, arguments
from data_pipeline.stream import MicroBatch

SHAPE = Shape(samples=8, length=32, fill=0.47)
NETWORK = Network(1, 32, 2, vocab_size=128)


@pytest.mark.parametrize("fill", [0.2, 0.47, 0.9, 1.0])
@pytest.mark.parametrize("samples", [1, 4, 32])
def test_lengths_fill_the_rows_as_told(fill: float, samples: int) -> None:
    lengths = sample_lengths(Shape(samples, 128, fill), np.random.default_rng(0))
    assert (lengths[0], lengths.max()) == (128, 128)
    assert lengths.min() >= 8
    if samples > 4:
        assert lengths.mean() == pytest.approx(fill * 128, abs=0.5)


def test_batches_are_the_same_in_every_process_and_layout() -> None:
    first, again = ([batch.digest for batch in micro_batches(SHAPE, TINY)] for _ in range(2))
    packed = micro_batches(replace(SHAPE, packing="rows"), TINY)
    assert first == again == [batch.digest for batch in packed]
    assert len(set(first)) == SHAPE.count
    assert all(batch.layout.num_rows < SHAPE.samples for batch in packed)
    assert all(batch.num_masked == pytest.approx(0.15 * batch.num_tokens, abs=4) for batch in packed)


def test_stock_transformers_gets_the_same_samples() -> None:
    batch = micro_batch(SHAPE, TINY.vocab_size, 0)
    inputs = stock_inputs(batch)
    assert inputs["input_ids"].shape == inputs["labels"].shape == inputs["attention_mask"].shape == (8, 32)
    assert int(inputs["attention_mask"].sum()) == batch.num_tokens
    assert sorted(inputs["labels"][inputs["labels"] != -100].tolist()) == sorted(batch.mlm_labels.tolist())
    assert inputs["next_sentence_label"].tolist() == batch.nsp_labels.tolist()


def test_a_linear_layer_makes_three_products_of_equal_size() -> None:
    layer, rows = torch.nn.Linear(6, 10), torch.randn(4, 6, requires_grad=True)
    products = record(lambda: layer(rows).sum().backward())
    assert sum(products.values()) == 3
    assert {product.flops for product in products} == {2 * 4 * 6 * 10}


@pytest.mark.parametrize("width", [16, 64])
def test_fused_attention_counts_as_its_kernel_makes_it(width: int) -> None:
    shape = (2, 3, 5, width)
    queries, keys, values = (torch.randn(shape, requires_grad=True) for _ in range(3))
    products = record(lambda: torch.nn.functional.scaled_dot_product_attention(queries, keys, values).sum().backward())
    assert sum(product.flops * count for product, count in products.items()) == (2 + 5) * 2 * 2 * 3 * 5 * 5 * width
    assert products == attention_products(shape, 5, torch.float32, is_backward=False) + attention_products(shape, 5, torch.float32, is_backward=True)


def test_bare_products_are_the_recorded_ones() -> None:
    left, right = torch.randn(3, 4, 5, requires_grad=True), torch.randn(5, 3, 6).transpose(0, 1).requires_grad_()

    def run() -> None:
        (torch.bmm(left, right).sum() + (left[0] @ right[0]).sum()).backward()

    products = record(run)
    assert record(replay(products)) == products
    assert sum(products.values()) == 6


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [("fp32", [("fp32", "fp32"), ("fp32", "bf16")]), ("bf16", [("bf16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")])],
)
def test_ours_stands_against_both_modes_of_the_trainer(chosen: str, expected: list[tuple[str, str]]) -> None:
    assert [(pair.ours, pair.mode) for pair in pairs(SMALL, chosen) if not pair.has_our_memory] == expected
    assert [(pair.mode, pair.goal) for pair in pairs(BASE, chosen) if pair.has_our_memory] == [("fp32", None), ("bf16", None)]
    assert [str(pair.goal) for pair in pairs(BASE, "bf16")[:2]] == ["≥ 3.5 ×", "≥ 1.6 ×"]
    assert pairs(TINY, chosen)[0].goal is None


def test_the_clock_counts_steps_after_the_warm_up_until_the_time_is_over() -> None:
    times = iter([0.0, 0.3, 0.6, 1.0, 2.0, 2.7])
    clock = Clock(2.0, [10, 20], now=lambda: next(times))
    ticks = [clock.tick() for _ in range(5)]
    assert ticks == [False, False, False, False, True]
    found = clock.measurement()
    assert found["counts"] == {"tokens": 10 + 20 + 10, "steps": 3}
    assert found["wall_s"] == pytest.approx(2.1)


def test_a_rate_counts_real_tokens() -> None:
    seen: list[int] = []
    tokens_per_s, steps_per_s = rate(lambda step: seen.append(sum(batch.num_tokens for batch in step)), micro_batches(SHAPE, TINY), seconds=0.01)
    assert len(seen) > 3
    assert tokens_per_s / steps_per_s == pytest.approx(seen[0])


class Leaking(MicroBatch):
    """Packed rows in which all samples of a row attend to each other."""

    @property
    def sample_ids(self) -> Any:
        return np.sign(super().sample_ids)


def test_losses_of_pairs_do_not_depend_on_the_layout_unless_samples_see_each_other() -> None:
    found = layouts.pairs(**arguments(NETWORK, SHAPE))
    assert found["difference"] < 1e-5
    assert found["packed_fill"] > found["padded_fill"] == pytest.approx(0.47, abs=0.02)
    assert found["counts"]["pairs"] == SHAPE.samples

    config = run_config(NETWORK, SHAPE, precision="fp32", dropout=0.0, initializer_range=0.2)
    packed = micro_batch(replace(SHAPE, packing="rows"), NETWORK.vocab_size, 0)
    leaking = Leaking(packed.number, packed.samples, packed.layout, packed.pad_id)
    model = network_of(config, NETWORK)
    nsp_losses = [layouts.losses_by_pair(model, batch)[:, 1] for batch in (packed, leaking)]
    assert float((nsp_losses[0] - nsp_losses[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plain_loop_learns_and_keeps_fp32_master_weights(precision: str) -> None:
    loop, batches = PlainLoop(NETWORK, SHAPE, precision=precision, dropout=0.0), micro_batches(SHAPE, NETWORK)
    before = [weight.detach().clone() for weight in loop.masters]
    loop.step(batches)
    assert all(master.dtype == torch.float32 for master in loop.masters)
    moved = [not torch.equal(old, new) for old, new in zip(before, loop.masters, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    for weight, master in zip(loop.model.parameters(), loop.masters, strict=True):
        assert weight.dtype == getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision])
        assert torch.equal(weight, master.to(weight.dtype))


@pytest.mark.parametrize("contestant", [hugging_face, plain_loop])
def test_peers_count_the_tokens_of_their_steps(contestant: object) -> None:
    assert callable(contestant)
    found = contestant(**arguments(NETWORK, replace(SHAPE, fill=1.0)), precision="fp32", seconds=0.05)
    assert found["counts"]["tokens"] == SHAPE.samples * SHAPE.length * found["counts"]["steps"] > 0


def test_dimensions_are_those_of_the_papers() -> None:
    assert [network.name for network in (SMALL, BASE, LARGE)] == ["4L/256", "12L/768", "24L/1024"]
    assert BASE.bert(dropout=0.1)["intermediate_size"] == 3072
    assert set(FILLS) == {0.47, 1.0}
    assert set(LAYOUTS) == {"none", "rows"}
