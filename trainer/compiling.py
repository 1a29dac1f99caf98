"""torch.compile of a network's layers, all of it before step 1: what a step computes must not depend on the shapes of the steps before it (R3)."""

import importlib.util
import os
import shutil
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.utils
import torch._inductor.config
import torch.fx.experimental._config
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from data_pipeline.errors import ConfigError, EnvironmentMismatchError
from trainer.batch import TensorBatch, bounds_of
from trainer.config import RunConfig
from trainer.dimensions import MASKED_MULTIPLE
from trainer.networks import PretrainingNetwork
from trainer.objectives import IGNORED, loss_sums

_MOST_GRAPHS = 64
"""Of one layer: for each attention kernel, kind of mask and kind of layer one."""


def nobody(kind: str, **details: Any) -> None:
    """Is told of events that another rank records, or nobody."""
    del kind, details


def compile_layers(network: PretrainingNetwork, config: RunConfig, device: torch.device, tell: Callable[..., None] = nobody) -> None:
    """Compile the layers of `network`, and on a GPU its loss, for training, in place: parameters keep their names. `tell` hears of the events
    `compiling` and `compiled`, which says how often the compiler gave up (`graph_breaks`).

    Each attempt compiles for the same made-up micro-batches, with rows and places left open; whatever fits none of these graphs (validation, a batch
    of one row) runs as it would without. On a CPU dropout draws the same numbers as without. `network` has its kernels, is on `device` and in its
    precision.

    Raises:
        ConfigError: transformers does not mark the layers of this architecture.
        EnvironmentMismatchError: torch finds nothing to compile with.
    """
    require_compiler(device)
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"model.compile: transformers does not say what the layers of {network.config.model_type} are", "Set model.compile to false."
        )
    tell("compiling", layers=len(layers))
    started_at = time.monotonic()
    shapes = (config.batch.split, sorted(config.batch.largest_micro_batches.items()), config.batch.row_packing, _share_predicted(config))
    _configure(device, tag=repr((*shapes, sorted(network.kernels.items()), torch.get_num_threads())))
    for layer in layers:
        layer.compile(dynamic=True)
    if device.type == "cuda":  # a CPU gains nothing
        network.sum_losses = torch.compile(loss_sums, dynamic=True)
    broken = _num_graph_breaks()
    random_kept = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with random_kept, _gradients_aside(network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler tells its own developers what it could not do
        for batch in _made_up_batches(config):
            _forward_backward(network, batch.to(device))
    torch.compiler.set_stance("eager_on_recompile")
    tell("compiled", seconds=round(time.monotonic() - started_at, 1), graph_breaks=_num_graph_breaks() - broken)


def require_compiler(device: torch.device, which: Callable[[str], str | None] = shutil.which) -> None:
    """Refuse to compile where nothing can: a CPU needs a C++ compiler, a GPU Triton.

    Raises:
        EnvironmentMismatchError: it is missing.
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise EnvironmentMismatchError("model.compile needs Triton, which is not installed", "Install triton, or set model.compile to false.")
    elif which(compiler := os.environ.get("CXX", "g++")) is None:
        raise EnvironmentMismatchError(
            f"model.compile needs a C++ compiler, but there is no {compiler} on the PATH",
            "Install one (Debian: `apt install g++`), name it in CXX, or set model.compile to false.",
        )


def _configure(device: torch.device, tag: str) -> None:
    """Forget what this process has compiled, and let nothing but the made-up batches decide what comes out; `tag` names them in torch's cache."""
    torch._dynamo.reset()
    torch.compiler.set_stance("default")
    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._inductor.config.fallback_random = device.type == "cpu"  # a GPU draws within the kernel that drops out
    torch._inductor.config.compile_threads = 1  # no processes that outlive a rank
    torch.fx.experimental._config.use_duck_shape = False  # 128 rows of 128 places: equal by chance
    torch.compiler.config.cache_key_tag = tag


@contextmanager
def _gradients_aside(network: nn.Module) -> Generator[None]:
    """Without gradients: where they are of another type than their parameters (`zero_buckets`), the compiler leaves out what reads these."""
    gradients = {parameter: parameter.grad for parameter in network.parameters()}
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _num_graph_breaks() -> int:
    """Places at which the compiler has given up a layer in this process: none, if all of it is to be compiled."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _made_up_batches(config: RunConfig) -> Iterator[TensorBatch]:
    """For each length of the run, rows that hold one sample, and where they are packed, rows that hold two."""
    samples = (1, 2) if config.batch.row_packing == "rows" else (1,)
    for (length, micro_batch_size), samples_a_row in product(sorted(config.batch.largest_micro_batches.items(), reverse=True), samples):
        rows = max(2, micro_batch_size // config.batch.split)  # one row is a shape of its own
        yield _made_up(rows, length, samples_a_row, _share_predicted(config))


def _share_predicted(config: RunConfig) -> float:
    """Of the places of a row."""
    return config.objective.mask_rate if config.objective.kind == "mlm" else 1.0


def _made_up(rows: int, length: int, samples_a_row: int, predicted: float) -> TensorBatch:
    """Rows of zeros, without labels; the last place of a row is padding. A share of the places is to be predicted, as of real ones: by how many there
    are the compiler decides how it sums up over the vocabulary."""
    ids_RT, places_T = torch.zeros(rows, length, dtype=torch.int64), torch.arange(length)
    sample_ids_RT = (1 + places_T * samples_a_row // length).expand(rows, -1).clone()
    sample_ids_RT[:, -1] = 0
    positions_RT = places_T.expand(rows, -1).contiguous()  # only memory of its own can be pinned
    starts_B = (torch.arange(rows)[:, None] * length + torch.arange(samples_a_row) * (length // samples_a_row)).flatten()
    predicted_N = torch.arange(max(1, round(predicted * rows * length / MASKED_MULTIPLE)) * MASKED_MULTIPLE) % (rows * length)
    unlabelled_N, unlabelled_B = torch.full_like(predicted_N, IGNORED), torch.full_like(starts_B, IGNORED)
    bounds_S = torch.from_numpy(bounds_of(sample_ids_RT.numpy()))
    return TensorBatch(ids_RT, ids_RT, positions_RT, sample_ids_RT, starts_B, predicted_N, unlabelled_N, unlabelled_B, bounds_S)


def _forward_backward(network: PretrainingNetwork, batch: TensorBatch) -> None:
    """A pass whose gradients nobody sees: they are asked for, not accumulated, so that DeepSpeed does not hear of them."""
    mlm_loss, nsp_loss, *_ = network(batch)
    parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
    torch.autograd.grad(mlm_loss + nsp_loss, parameters, allow_unused=True)
