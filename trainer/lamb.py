"""`Lamb`, an optimizer for large batches (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2), on whole parameters or
on the flat vectors of ZeRO.

With gradient g, weights w, decay c and bias-corrected moments as in Adam, each parameter moves by -lr * |w| / |u| * u with
u = m / (sqrt(v) + eps) + c * w: phi is the identity, and the trust ratio |w| / |u| is 1 where a norm is 0. Groups with `trust_ratio=False`
move by -lr * u, as biases and layer norms do in the paper's own code and in NVIDIA's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# Torch's own optimizers are made of these functions on lists: on CUDA they take a few launches, however many parameters there are.


@dataclass(frozen=True)
class Partition:
    """Whose elements lie in a flat vector of this rank. Norms of parameters are sums over all `ranks`, padding belongs to none."""

    places: Sequence[tuple[int, int]]
    """(first element, number of elements) of each parameter that has any here."""
    parameters: Tensor
    """(len(places),), int64, on the vector's device: the number of each, by which all ranks know it."""
    num_parameters: int
    """Of the network."""
    ranks: Any
    """Process group over which the parameters are partitioned."""

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Views of the parameters' elements."""
        return [vector.narrow(0, at, length) for at, length in self.places]

    def total(self, norms_2P: Tensor) -> Tensor:
        """Norms (2, parts) of whole parameters, from those of the parts that lie here. One small all-reduce, in fp64."""
        squares = torch.zeros(2, self.num_parameters, dtype=torch.float64, device=norms_2P.device)
        squares.index_copy_(1, self.parameters, norms_2P.double().square())
        dist.all_reduce(squares, group=self.ranks)
        return squares.sqrt().index_select(1, self.parameters)


class Lamb(torch.optim.Optimizer):
    """LAMB. Its state is that of torch's fused AdamW: `exp_avg`, `exp_avg_sq`, and `step`, on the device, for which nothing here waits."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust_ratio": True}
        super().__init__(params, defaults | {"fused": True})  # by which torch puts a `step` that it loads on the device
        self.partitions: Mapping[Tensor, Partition] = {}
        """Of each tensor in `params`; none where these are whole parameters. While there are any, `step` is collective."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody here has a closure
        """Update the weights from their gradients. Tensors without one are left as they are."""
        for group in self.param_groups:
            weights: list[Tensor] = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            updates = self._updates(weights, group)
            if not group["trust_ratio"]:
                torch._foreach_add_(weights, updates, alpha=-group["lr"])
            elif not self.partitions:
                _move(weights, updates, group["lr"], None)
            else:
                for weight, update in zip(weights, updates, strict=True):
                    partition = self.partitions[weight]
                    _move(partition.parts(weight), partition.parts(update), group["lr"], partition)

    def _updates(self, weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Advance the moments; returns u. Torch's fused Adam does nearly all in one pass: from weights of 0, lr -1 leads to u without decay."""
        states = [self._state(weight) for weight in weights]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        gradients: list[Any] = [weight.grad for weight in weights]
        updates = [torch.zeros_like(weight) for weight in weights]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            *(updates, gradients, means, squares, [], steps),
            lr=-1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        return updates

    def _state(self, weight: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            step = torch.zeros((), dtype=torch.float32, device=weight.device)
            state.update(step=step, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        return state


def _move(weights: list[Tensor], updates: list[Tensor], lr: float, partition: Partition | None) -> None:
    """Move parameters, or the parts of them that lie here, by their trust ratio."""
    if partition and not weights:
        partition.total(torch.zeros(2, 0, device=partition.parameters.device))  # nothing but padding lies here; the sum is everybody's
        return
    norms_2P = torch.stack(torch._foreach_norm([*weights, *updates])).view(2, -1).double()
    if partition:
        norms_2P = partition.total(norms_2P)
    ratios_P = torch.where((norms_2P > 0).all(0), norms_2P[0] / norms_2P[1], 1.0).to(weights[0].dtype)
    # One launch for each parameter: a ratio on the device can be spread over several only by writing it down for every element.
    torch._foreach_addcmul_(weights, updates, list(ratios_P.unbind()), value=-lr)
