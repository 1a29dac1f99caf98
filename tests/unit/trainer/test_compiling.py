"""Compiled layers: the same losses, gradients and dropout; compiled once, whatever shapes follow; refused where it cannot be."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import nn

from data_pipeline.errors import ConfigError, EnvironmentMismatchError
from tests.support.batches import EMPTY, random_micro_batch, small_config, write_tokenizer
from trainer.batch import TensorBatch, tensor_batches
from trainer.compiling import compile_layers, require_compiler
from trainer.config import RunConfig
from trainer.model import build_model
from trainer.networks import PretrainingNetwork

CPU = torch.device("cpu")


def network_of(folder: Path, **model: Any) -> tuple[RunConfig, PretrainingNetwork]:
    write_tokenizer(str(folder))
    config = small_config(model=small_config().model.model_dump() | {"compile": True} | model, objective={"sentence_objective": "none"})
    return config, build_model(config.model, str(folder), seed=3, sequence_length=24, device=CPU)


def losses_and_gradients(network: PretrainingNetwork, batch: TensorBatch) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    network.zero_grad()
    loss = network(batch)[0]
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.full
def test_compiled_layers_compute_what_they_did(tmp_path: Path) -> None:
    """Dropout included. After the first pass nothing is compiled any more: what a step computes does not depend on the shapes before it."""
    (config, compiled), (_, plain) = network_of(tmp_path, dropout=0.2), network_of(tmp_path, dropout=0.2)
    told: dict[str, Any] = {}
    first = compiled.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
    first.grad_dtype = None
    first.grad = torch.ones_like(first, dtype=torch.float64)  # as ZeRO may have it: of another type
    compile_layers(compiled, config, CPU, lambda kind, **details: told.update({kind: details}))
    assert list(told) == ["compiling", "compiled"]
    assert told["compiled"]["graph_breaks"] == 0
    assert first.grad is not None
    assert first.grad.dtype == torch.float64
    first.grad, first.grad_dtype = None, first.dtype
    assert compiled.state_dict().keys() == plain.state_dict().keys()

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs >= 1
    shapes = [(4, 24), (4, 16), (7, 24), (1, 24), (24, 24)]
    batches = [tensor_batches(random_micro_batch(3, num_samples=samples, num_tokens=tokens, pairs=False))[0] for samples, tokens in shapes]
    for batch in (*batches, tensor_batches(EMPTY)[0]):
        found, gradients = losses_and_gradients(compiled, batch)
        expected, expected_gradients = losses_and_gradients(plain, batch)
        assert found == pytest.approx(expected, rel=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        assert compiled.eval()(batches[0])[0].item() == pytest.approx(plain.eval()(batches[0])[0].item(), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_network_without_marked_layers_is_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        config = network_of(tmp_path)[1].config

    with pytest.raises(ConfigError, match="does not say what the layers of bert are"):
        compile_layers(Bare(), network_of(tmp_path)[0], CPU)  # pyright: ignore[reportArgumentType]


def test_what_it_is_compiled_with_must_be_there() -> None:
    with pytest.raises(EnvironmentMismatchError, match=r"C\+\+ compiler"):
        require_compiler(CPU, which=lambda name: None)
    require_compiler(CPU, which=lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"zero": {"stage": 3}}, "zero.stage 3, which takes parameters away"),
        ({"model": {"compile": True, "activation_checkpointing": True}}, "does not go with model.activation_checkpointing"),
        ({"batch": {"global_batch_size": 4, "micro_batch_size": 4, "split": 4}}, "needs two samples at once"),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**({"model": {"compile": True}} | sections))
