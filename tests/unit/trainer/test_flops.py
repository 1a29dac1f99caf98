"""Useful operations of a step, against published figures and formulas."""

import pytest
import torch
from transformers import BertConfig, GPT2Config, ModernBertConfig

from trainer.flops import StepFlops
from trainer.networks import PretrainingBert, PretrainingGPT2, PretrainingModernBert
from trainer.totals import StepCounts

LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)


def counts_of(length: int, share: float, samples: int = 1000) -> StepCounts:
    """Samples of one length, of which `share` is predicted."""
    return StepCounts(masked=int(samples * length * share), tokens=samples * length, samples=samples, squared_lengths=samples * length**2)


@pytest.mark.parametrize(("config", "length", "expected"), [(BertConfig(), 128, 545e6), (BertConfig(), 512, 588e6), (LARGE, 512, 1992e6)])
def test_bert(config: BertConfig, length: int, expected: float) -> None:
    """Operations per token of base and large at 15 % masked tokens, head at masked places only."""
    with torch.device("meta"):
        flops = StepFlops.of(PretrainingBert(config))
    counts = counts_of(length, 0.15)
    assert flops.of_step(counts) / counts.tokens == pytest.approx(expected, rel=0.01)


def test_gpt2_attends_to_half_of_the_places_and_predicts_at_all() -> None:
    with torch.device("meta"):
        flops = StepFlops.of(PretrainingGPT2(GPT2Config()))
    counts = counts_of(1024, 1.0)
    expected = 6 * (12 * 12 * 768**2 + 768 * 50257) + 6 * 12 * 768 * 1024
    assert flops.of_step(counts) / counts.tokens == pytest.approx(expected, rel=1e-3)


def test_a_window_bounds_what_is_attended_to() -> None:
    with torch.device("meta"):
        near, far = (StepFlops.of(PretrainingModernBert(ModernBertConfig(local_attention=each))) for each in (128, 16384))
    short, long = counts_of(64, 0.3), counts_of(1024, 0.3)
    assert near.of_step(short) == far.of_step(short)
    layers = sum(reach is not None for _, reach in near.attention)
    assert far.of_step(long) - near.of_step(long) == pytest.approx(6 * layers * 2 * 768 * long.tokens * (1024 - 129), rel=1e-6)
