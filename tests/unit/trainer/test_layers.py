"""Dropout by whole random numbers: as often as is asked, by the seed, with gradients where something was kept. Projections and GELU: the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from trainer.layers import DrawnDropout, ShortGelu, drop, drop_compiled, project_aligned, replace_dropout, replace_gelu, short_gelu
from trainer.objectives import IGNORED, loss_sums

Drop = Callable[[Tensor, float], Tensor]
WAYS = [
    pytest.param(drop, torch.float32, id="fp32"),
    pytest.param(drop, torch.bfloat16, id="bf16"),
    pytest.param(drop_compiled, torch.bfloat16, id="compiled"),
]


@pytest.mark.parametrize(("drop", "dtype"), WAYS)
@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.9])
def test_values_are_dropped_as_often_as_is_asked(probability: float, drop: Drop, dtype: torch.dtype) -> None:
    """Within five standard deviations; what is kept is scaled."""
    torch.manual_seed(1)
    values = torch.ones(1001, 999, dtype=dtype)  # no multiple of what a number decides
    found = drop(values, probability)
    share, deviation = (found == 0).double().mean().item(), (probability * (1 - probability) / values.numel()) ** 0.5
    assert abs(share - probability) < 5 * deviation
    assert found[found != 0].unique().tolist() == [torch.tensor(1 / (1 - probability), dtype=dtype).item()]


@pytest.mark.parametrize(("drop", "dtype"), WAYS)
def test_neighbours_and_passes_are_dropped_independently(drop: Drop, dtype: torch.dtype) -> None:
    """Values that share a random number, and masks that follow one another."""
    torch.manual_seed(2)
    first, second = (drop(torch.ones(400_000, dtype=dtype), 0.5).sign().double() for _ in range(2))
    for distance in (1, 2, 3, 4, 8):
        assert abs(torch.corrcoef(torch.stack([first[:-distance], first[distance:]]))[0, 1].item()) < 5 / len(first) ** 0.5
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 5 / len(first) ** 0.5


@pytest.mark.parametrize(("drop", "dtype"), WAYS)
def test_gradients_pass_where_something_was_kept(drop: Drop, dtype: torch.dtype) -> None:
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


@pytest.mark.full
def test_compiled_dropout_is_drawn_as_without_the_compiler() -> None:
    values = torch.randn(40, 30, dtype=torch.bfloat16, requires_grad=True)
    found: list[Tensor] = []
    for way in (drop_compiled, torch.compile(drop_compiled, dynamic=True)):
        torch.manual_seed(5)
        dropped = way(values, 0.3)
        found += [dropped, *torch.autograd.grad(dropped.sum(), values)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("way", [short_gelu, pytest.param(torch.compile(short_gelu, dynamic=True), marks=pytest.mark.full)])
def test_the_short_gelu_and_its_slope_are_right_to_the_last_bits(way: Callable[[Tensor], Tensor]) -> None:
    values = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    exact, exact_slopes = gelu_and_slopes(nn.functional.gelu, values)
    found, slopes = gelu_and_slopes(way, values.float())
    torch.testing.assert_close(found.double(), exact, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(slopes.double(), exact_slopes, rtol=3e-7, atol=3e-7)
    in_16_bits, torchs = gelu_and_slopes(way, values.bfloat16()), gelu_and_slopes(nn.functional.gelu, values.bfloat16())
    for ours, theirs in zip(in_16_bits, torchs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)


def gelu_and_slopes(gelu: Callable[[Tensor], Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    points = values.clone().requires_grad_()
    found = gelu(points)
    return found.detach(), torch.autograd.grad(found.sum(), points)[0]


def test_a_gelu_is_replaced_and_computes_as_before_where_nothing_is_compiled() -> None:
    network, values = nn.Sequential(GELUActivation(), nn.GELU()), torch.randn(100)
    replace_gelu(network)
    assert [type(layer) for layer in network] == [ShortGelu, nn.GELU]
    assert torch.equal(network[0](values), nn.functional.gelu(values))


@pytest.mark.parametrize("tokens", [97, 128])
@pytest.mark.parametrize("has_bias", [True, False])
def test_an_aligned_projection_has_the_same_losses_and_gradients(tokens: int, has_bias: bool) -> None:
    torch.manual_seed(6)
    hidden, labels = torch.randn(5, 64), torch.tensor([0, 96, 5, IGNORED, 7])
    weight, bias = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, requires_grad=True) if has_bias else None
    parameters = [weight, bias] if bias is not None else [weight]
    aligned, plain = project_aligned(hidden, weight, bias), nn.functional.linear(hidden, weight, bias)
    assert aligned.shape == (5, 128)
    torch.testing.assert_close(aligned[:, :tokens], plain)
    found, expected = (loss_sums(logits, labels, torch.zeros(1, 2), torch.tensor([IGNORED])) for logits in (aligned, plain))
    torch.testing.assert_close(found.mlm_loss, expected.mlm_loss)
    assert found.mlm_correct == expected.mlm_correct
    for each, other in zip(*(torch.autograd.grad(sums.mlm_loss, parameters) for sums in (found, expected)), strict=True):
        torch.testing.assert_close(each, other)
