"""LAMB against the paper's update, word for word."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.paper_lamb import PaperLamb
from trainer.lamb import Lamb

STEPS = 5
SETTINGS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def weights_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).mul(10.0**place).to(dtype) for place, shape in enumerate(shapes)]


def groups_of(weights: list[Tensor], num_plain: int) -> list[dict[str, Any]]:
    adapted, plain = weights[num_plain:], weights[:num_plain]
    return [{"params": adapted, **SETTINGS}, {"params": plain, **SETTINGS, "weight_decay": 0.0, "trust_ratio": False}]


def lamb(weights: list[Tensor], **changes: Any) -> Lamb:
    return Lamb(weights, **(SETTINGS | changes))


def train(optimizer: Any, weights: list[Tensor], steps: range) -> None:
    """The gradients depend on the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for place, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64).mul(0.1**place).to(weight.dtype)
        optimizer.step()


shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple), min_size=1, max_size=5)


@given(shapes, st.integers(0, 5), st.sampled_from([(torch.float32, 2e-5, 1e-6), (torch.float64, 1e-12, 0.0)]))
def test_the_paper_s_update(shapes: list[tuple[int, ...]], num_plain: int, precision: tuple[torch.dtype, float, float]) -> None:
    dtype, rtol, atol = precision
    found, expected = weights_of(shapes, dtype), weights_of(shapes, dtype)
    train(Lamb(groups_of(found, num_plain), lr=1.0), found, range(STEPS))
    train(PaperLamb(groups_of(expected, num_plain)), expected, range(STEPS))
    for one, other, start in zip(found, expected, weights_of(shapes, dtype), strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
        assert not torch.equal(one, start)


def test_a_matrix_moves_by_lr_times_its_length() -> None:
    [weight] = weights_of([(30, 40)], torch.float64)
    before = weight.clone()
    train(lamb([weight]), [weight], range(1))
    assert float((weight - before).norm() / before.norm()) == pytest.approx(SETTINGS["lr"])


def test_a_norm_of_zero_means_ratio_one() -> None:
    """A matrix that starts at zero moves as by Adam; one whose update is zero stays."""
    zero, still, silent = torch.zeros(3, 3), torch.ones(3, 3), torch.zeros(2)
    zero.grad, still.grad, silent.grad = torch.full((3, 3), 0.5), torch.zeros(3, 3), torch.zeros(2)
    lamb([zero, still, silent], weight_decay=0.0).step()
    torch.testing.assert_close(zero, torch.full((3, 3), -SETTINGS["lr"]))
    assert torch.equal(still, torch.ones(3, 3))
    assert torch.equal(silent, torch.zeros(2))


def test_without_trust_ratio_it_is_adamw() -> None:
    """Where there is no decay: AdamW's is not part of the update."""
    found, expected = weights_of([(3, 4), (5,)], torch.float64), weights_of([(3, 4), (5,)], torch.float64)
    plain: Any = SETTINGS | {"weight_decay": 0.0}
    train(Lamb([{"params": found, "trust_ratio": False}], **plain), found, range(STEPS))
    train(torch.optim.AdamW(expected, **plain), expected, range(STEPS))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_has_no_gradient_stays() -> None:
    moved, left = torch.ones(2, 2), torch.ones(3)
    moved.grad = torch.ones(2, 2)
    optimizer = lamb([moved, left])
    optimizer.step()
    assert torch.equal(left, torch.ones(3))
    assert list(optimizer.state) == [moved]


def test_a_saved_state_continues_to_the_bit() -> None:
    whole, halves = weights_of([(3, 4), (5,)], torch.float32), weights_of([(3, 4), (5,)], torch.float32)
    train(lamb(whole), whole, range(STEPS))
    first, second = lamb(halves), lamb(halves)
    train(first, halves, range(2))
    second.load_state_dict(first.state_dict())
    train(second, halves, range(2, STEPS))
    assert all(torch.equal(one, other) for one, other in zip(whole, halves, strict=True))
    assert {name: value.dtype for name, value in second.state[halves[0]].items()} == dict.fromkeys(("step", "exp_avg", "exp_avg_sq"), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_not_waited_for_and_does_the_same() -> None:
    shapes: list[tuple[int, ...]] = [(300, 40), (7,), (64, 64), (5,)]
    expected, found = weights_of(shapes, torch.float32), [weight.cuda() for weight in weights_of(shapes, torch.float32)]
    train(Lamb(groups_of(expected, 2), lr=1.0), expected, range(1))
    for weight, other in zip(found, expected, strict=True):
        assert other.grad is not None
        weight.grad = other.grad.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        Lamb(groups_of(found, 2), lr=1.0).step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for weight, other in zip(found, expected, strict=True):
        torch.testing.assert_close(weight.cpu(), other)
