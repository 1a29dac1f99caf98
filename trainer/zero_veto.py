"""`Veto`, how an update is refused: it stands where DeepSpeed's optimizers ask whether fp16 gradients have overflowed.

Asked without a veto, it says no at once. DeepSpeed would search every gradient there (7 % of a step, measured), although the norm that it
computes next says the same, and refuses the step just so: a norm over the gradients of all ranks is not finite if one gradient is not.
"""

from collections.abc import Callable
from typing import Any


class Veto:
    """Refuses steps of a DeepSpeed engine's optimizer. Build it with `Veto.over`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._dropping = False

    @classmethod
    def over(cls, engine: Any) -> "Veto":
        """Take the place of the overflow check of the optimizer that DeepSpeed has chosen for the ZeRO stage and the precision."""
        veto, optimizer = cls(engine), engine.optimizer
        if hasattr(optimizer, "overflow_checker"):  # stage 0 in 16 bits
            optimizer.overflow_checker.check = veto._check
        elif hasattr(optimizer, "_overflow_check_and_loss_scale_update"):  # stage 3
            optimizer._overflow_check_and_loss_scale_update = veto._check
        elif hasattr(optimizer, "check_grad_overflow"):  # stages 1 and 2
            optimizer.check_grad_overflow = True  # so that it asks, and looks at the norm in bf16 too
            optimizer.check_overflow = veto._check
        if getattr(optimizer, "cpu_offload", False):
            optimizer.reset_cpu_buffers = veto._forgetting(optimizer.reset_cpu_buffers)
        return veto

    def drop_gradients(self) -> None:
        """Forget what was accumulated since the last step, and leave everything else as it was, the loss scale included."""
        optimizer = self._engine.optimizer
        if not hasattr(optimizer, "_update_scale"):  # stage 1 in bf16 and stage 0 in fp32 keep gradients nowhere else
            optimizer.zero_grad()
            return
        self._dropping, optimizer._update_scale = True, lambda *_: None
        try:
            self._engine.step()
        finally:
            self._dropping = False
            del optimizer._update_scale  # the class' own is back

    def _check(self, *_: Any, **__: Any) -> bool:
        self._engine.optimizer.overflow = self._dropping
        return self._dropping

    def _forgetting(self, reset_cpu_buffers: Callable[[], None]) -> Callable[[], None]:
        """Where the state is offloaded DeepSpeed keeps the reduced gradients of a step that it refuses, and adds the next step's to them."""

        def reset() -> None:
            reset_cpu_buffers()
            self._engine.optimizer.averaged_gradients.clear()

        return reset
