"""Faults in the middle of a step, for tests: a NaN into a gradient, a batch without a finite loss, a spike, a hang; once, or each time.

A test's own processes call `install`. Worker processes of a real command have `tests/support/plugin` on their PYTHONPATH (see
`environment_of`), whose `sitecustomize` installs the fault as soon as the trainer is imported: the product knows nothing of it.
"""

import json
import math
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VARIABLE = "MASKWRIGHT_TEST_FAULT"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class NumericFault:
    """What goes wrong on the rank that computes a micro-batch, when it does."""

    kind: Literal["gradient", "batch", "spike", "weights", "hang"]
    """`gradient`: one NaN in one gradient; `batch`: neither loss nor gradients are finite; `spike`: a loss a hundred times as high; `weights`: a
    NaN in a weight once the step is done; `hang`: the rank's backward pass never ends, while its process lives."""
    micro_batch: int | None = None
    """None: whichever comes next."""
    once: str | None = None
    """A file that says that it has happened, in whatever attempt; None: it happens each time."""
    armed: str | None = None
    """A file without which it does not happen, and which it takes away."""

    def strikes(self, numbers: list[int]) -> bool:
        """Whether it happens while these micro-batches are computed."""
        if self.micro_batch is not None and self.micro_batch not in numbers:
            return False
        try:
            if self.armed is not None:
                Path(self.armed).unlink()
            if self.once is not None:
                Path(self.once).touch(exist_ok=False)
        except (FileNotFoundError, FileExistsError):
            return False
        return True


def environment_of(fault: NumericFault) -> dict[str, str]:
    """Environment of a command whose worker processes shall have the fault."""
    return {VARIABLE: json.dumps(asdict(fault)), "PYTHONPATH": f"{ROOT / 'tests/support/plugin'}:{ROOT}"}


def install_from_environment() -> None:
    """Called by the plugin once `trainer.pretrain` is imported."""
    install(NumericFault(**json.loads(os.environ[VARIABLE])))


def install(fault: NumericFault) -> None:
    """Put the fault into this process, in place of one that is there."""
    import torch

    from trainer import passes, pretrain
    from trainer.engine import Engine, StepOutcome
    from trainer.objectives import LossSums, LossWeights

    def faulty(engine: Engine, work: passes.StepWork, *arguments: Any, **named: Any) -> torch.Tensor:
        if not fault.strikes([batch.number for batch in work.part.batches]):
            return passes.forward_backward(engine, work, *arguments, **named)
        if fault.kind == "weights":
            spoil_after_step(engine)
            return passes.forward_backward(engine, work, *arguments, **named)
        parameter = engine.model.get_parameter("bert.encoder.layer.0.output.dense.weight")
        hooks = {"gradient": _with_nan, "hang": _hang}
        removal = parameter.register_hook(hooks[fault.kind]) if fault.kind in hooks else None
        if removal is None:
            engine.accumulate = accumulate_wrongly(engine)
        try:
            return passes.forward_backward(engine, work, *arguments, **named)
        finally:
            if removal is not None:
                removal.remove()
            else:
                del engine.accumulate

    def spoil_after_step(engine: Engine) -> None:
        right = engine.step

        def step(lr: float) -> StepOutcome:
            outcome = right(lr)
            next(engine.model.parameters()).data.view(-1)[0] = math.nan
            del engine.step
            return outcome

        engine.step = step

    def accumulate_wrongly(engine: Engine) -> Any:
        right, factor = engine.accumulate, math.nan if fault.kind == "batch" else 100.0

        def accumulate(batch: Any, weights: LossWeights, **named: Any) -> LossSums:
            sums = right(batch, LossWeights(weights.mlm * factor, weights.nsp * factor), **named)
            return LossSums(sums.mlm_loss * factor, sums.nsp_loss * factor, sums.mlm_correct, sums.nsp_correct)

        return accumulate

    pretrain.forward_backward = faulty


def _with_nan(gradient: Any) -> Any:
    spoiled = gradient.clone()
    spoiled.view(-1)[3] = math.nan
    return spoiled


def _hang(gradient: Any) -> None:
    del gradient
    threading.Event().wait()
