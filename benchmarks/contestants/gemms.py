"""Child's side of `train_gemm`: the matrix products that a forward and backward pass runs, recorded, and run again bare."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from benchmarks.children import Measurement
from benchmarks.contestants.training import network_of, run_config
from benchmarks.contestants.training_batches import micro_batches
from benchmarks.training import Network, Shape

_OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Where the two factors of an operation begin among its arguments."""
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5
"""Of a fused attention kernel: scores and output; in the backward pass scores again, and the gradients of values, scores, queries and keys."""


@dataclass(frozen=True)
class Factor:
    """A matrix, or a batch of them, as it lies in memory."""

    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """A matrix product, or a batch of them."""

    left: Factor
    right: Factor
    dtype: Any

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * prod(self.left.size) * self.right.size[-1]


def rates(network: dict[str, Any], shape: dict[str, Any], precision: str, seconds: float) -> Measurement:
    """FLOP/s by CPU time of forward and backward passes (ours) and of their products run bare (peer), by turns, at least twice each."""
    import torch

    torch.set_num_threads(1)
    run = forward_backward(Network(**network), Shape(**shape), precision)
    run()
    products = record(run)
    bare = replay(products)
    bare()
    flops = sum(product.flops * count for product, count in products.items())
    ours_s, bare_s, rounds, begun = 0.0, 0.0, 0, time.perf_counter()
    while rounds < 2 or time.perf_counter() - begun < seconds:
        ours_s, bare_s, rounds = ours_s + cpu_seconds(run), bare_s + cpu_seconds(bare), rounds + 1
    return {
        "ours_flops_per_s": rounds * flops / ours_s,
        "bare_flops_per_s": rounds * flops / bare_s,
        "precision": precision,
        "counts": {"rounds": rounds, "products": sum(products.values()), "different": len(products), "gflop": flops / 1e9},
    }


def forward_backward(network: Network, shape: Shape, precision: str) -> Callable[[], None]:
    """A forward and backward pass of our network without dropout, without an engine around it."""
    import torch

    from trainer.batch import tensor_batches
    from trainer.networks import as_loss_sums
    from trainer.objectives import IGNORED, LossWeights

    config = run_config(network, shape, precision=precision, dropout=0.0)
    model = network_of(config, network)
    model = model.to(torch.bfloat16) if precision == "bf16" else model
    [batch] = tensor_batches(micro_batches(shape, network)[0])
    weights = LossWeights.for_step(num_masked=int((batch.mlm_labels_N != IGNORED).sum()), num_pairs=shape.samples, world_size=1)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        weights.loss(as_loss_sums(model(batch))).backward()

    return run


def cpu_seconds(run: Callable[[], None]) -> float:
    """Of one call."""
    started_at = time.process_time()
    run()
    return time.process_time() - started_at


def record(run: Callable[[], None]) -> Counter[Product]:
    """The products that `run` makes, with the layout of their factors, and how often; those inside a fused attention kernel as it makes them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: Counter[Product] = Counter()

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.update(products_of(function.overloadpacket.__name__, args))
            return function(*args, **(kwargs or {}))

    with Recorder():
        run()
    return found


def products_of(operation: str, arguments: Any) -> Counter[Product]:
    """The products of one operation of torch; pure."""
    if operation in _OPERANDS:
        left, right = arguments[_OPERANDS[operation] :][:2]
        return Counter([Product(_factor(left), _factor(right), left.dtype)])
    if "attention" in operation:
        is_backward = "backward" in operation
        queries, keys = arguments[int(is_backward) :][:2]
        return attention_products(tuple(queries.shape), keys.shape[-2], queries.dtype, is_backward=is_backward)
    return Counter()


def attention_products(queries: tuple[int, ...], num_keys: int, dtype: Any, *, is_backward: bool) -> Counter[Product]:
    """What a fused kernel multiplies: half of the forward and two of the five backward products have the inner dimension of a head; pure."""
    *batch, num_queries, width = queries
    heads = prod(batch)
    inner = Product(_dense(heads, num_queries, width), _dense(heads, width, num_keys), dtype)
    outer = Product(_dense(heads, num_queries, num_keys), _dense(heads, num_keys, width), dtype)
    total, num_inner = (_BACKWARD_PRODUCTS, 2) if is_backward else (_FORWARD_PRODUCTS, 1)
    return Counter({inner: num_inner, outer: total - num_inner})


def replay(products: Counter[Product]) -> Callable[[], None]:
    """All products again as often, on matrices of their own, into memory that is there."""
    import torch

    calls: list[tuple[Callable[..., Any], Any, Any, Any, int]] = []
    for product, count in products.items():
        left, right = (_filled(factor, product.dtype) for factor in (product.left, product.right))
        multiply = torch.mm if left.ndim == 2 else torch.bmm
        calls.append((multiply, left, right, multiply(left, right), count))

    def bare() -> None:
        for multiply, left, right, result, count in calls:
            for _ in range(count):
                multiply(left, right, out=result)

    return bare


def _factor(tensor: Any) -> Factor:
    return Factor(tuple(tensor.shape), tuple(tensor.stride()))


def _dense(*size: int) -> Factor:
    return Factor(size, tuple(prod(size[place + 1 :]) for place in range(len(size))))


def _filled(factor: Factor, dtype: Any) -> Any:
    """A matrix of ones: what memory happens to hold may be numbers that are slow to multiply."""
    import torch

    return torch.empty_strided(factor.size, factor.stride, dtype=dtype).fill_(1.0)
