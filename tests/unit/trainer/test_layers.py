"""Dropout by whole random numbers: as often as is asked, by the seed, with gradients where something was kept."""

from typing import Any

import pytest
import torch
from torch import nn

from trainer.layers import DrawnDropout, drop, replace_dropout

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_values_are_dropped_as_often_as_is_asked(probability: float, dtype: torch.dtype) -> None:
    """Within five standard deviations; what is kept is scaled."""
    torch.manual_seed(1)
    values = torch.ones(1001, 999, dtype=dtype)  # no multiple of what a number decides
    found = drop(values, probability)
    share, deviation = (found == 0).double().mean().item(), (probability * (1 - probability) / values.numel()) ** 0.5
    assert abs(share - probability) < 5 * deviation
    assert found[found != 0].unique().tolist() == [torch.tensor(1 / (1 - probability), dtype=dtype).item()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_and_passes_are_dropped_independently(dtype: torch.dtype) -> None:
    """Values that share a random number, and masks that follow one another."""
    torch.manual_seed(2)
    first, second = (drop(torch.ones(400_000, dtype=dtype), 0.5).sign().double() for _ in range(2))
    for distance in (1, 2, 3, 4, 8):
        assert abs(torch.corrcoef(torch.stack([first[:-distance], first[distance:]]))[0, 1].item()) < 5 / len(first) ** 0.5
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / len(first) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_pass_where_something_was_kept(dtype: torch.dtype) -> None:
    values = torch.full((6, 5, 4), 2.0, dtype=dtype).transpose(0, 1).requires_grad_()
    torch.manual_seed(3)
    found = drop(values, 0.3)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert found.shape == values.shape
    assert torch.equal(gradient * 2, found)
    torch.manual_seed(3)
    assert torch.equal(drop(values, 0.3), found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_dropped_as_torch_does(dtype: torch.dtype) -> None:
    values = torch.ones(100, dtype=dtype)
    torch.manual_seed(4)
    found = drop(values, 0.5)
    torch.manual_seed(4)
    assert torch.equal(found, nn.functional.dropout(values, 0.5))


def test_nothing_is_dropped_in_evaluation_or_at_0_and_nothing_drawn() -> None:
    layer, values = DrawnDropout(0.5), torch.ones(8)
    before = torch.get_rng_state()
    assert layer.eval()(values) is values
    assert DrawnDropout(0.0).train()(values) is values
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_a_network_is_replaced_and_nothing_else() -> None:
    class Own(nn.Dropout):
        """Of an architecture that computes it in its own way."""

    network: Any = nn.Sequential(nn.Dropout(0.25), nn.Linear(2, 2), Own(0.5))
    replace_dropout(network)
    assert [type(layer) for layer in network] == [DrawnDropout, nn.Linear, Own]
    assert network[0].p == 0.25
