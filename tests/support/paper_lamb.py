"""LAMB, word for word: Algorithm 2 of You et al. 2020, one parameter after the other, in fp64. What `trainer.lamb` is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class PaperLamb:
    """Updates tensors from their `.grad`. Groups as torch's optimizers take them; `trust_ratio: False` in one means ratio 1."""

    param_groups: Sequence[dict[str, Any]]
    moments: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])
    t: int = 0

    @torch.no_grad()
    def step(self) -> None:
        """Lines 3 to 10, for every layer."""
        self.t += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                g, x = parameter.grad.double(), parameter.double()
                m, v = self.moments.get(id(parameter), (torch.zeros_like(g), torch.zeros_like(g)))
                m = beta1 * m + (1 - beta1) * g
                v = beta2 * v + (1 - beta2) * g**2
                self.moments[id(parameter)] = (m, v)
                m_hat = m / (1 - beta1**self.t)
                v_hat = v / (1 - beta2**self.t)
                r = m_hat / (v_hat.sqrt() + group["eps"])
                update = r + group["weight_decay"] * x
                phi, length = x.square().sum().sqrt(), update.square().sum().sqrt()
                ratio = phi / length if group.get("trust_ratio", True) and phi > 0 and length > 0 else 1.0
                parameter.copy_(x - group["lr"] * ratio * update)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
