"""The seam to DeepSpeed: one engine that accumulates, steps, saves and loads at every ZeRO stage with the same arithmetic.

All methods of `Engine` are collective: every rank calls them in the same order.
"""

import importlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.errors import ConfigError
from trainer.batch import TensorBatch
from trainer.config import RunConfig
from trainer.deepspeed_config import builds_own_adam, derive_deepspeed_config, require_compiler
from trainer.lamb import Lamb
from trainer.networks import PretrainingNetwork, as_loss_sums, buffers_kept
from trainer.objectives import LossSums, LossWeights
from trainer.optimizers import build_optimizer
from trainer.snapshot import Snapshot
from trainer.zero_reduce import Reduction
from trainer.zero_start import correct_start

__all__ = ["Engine", "StepOutcome", "derive_deepspeed_config", "training_device"]


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did: `applied` is False when the gradients were not finite, or were dropped, and nothing was changed."""

    grad_norm: float
    applied: bool


def training_device() -> torch.device:
    """This rank's device: the GPU that it was given, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class Engine:
    """A model, its optimizer and their ZeRO partitions. Build it with `Engine.build`."""

    def __init__(self, deepspeed_engine: Any, config: RunConfig, device: torch.device) -> None:
        self._deepspeed = deepspeed_engine
        self._files: Any = importlib.import_module("trainer.zero_files")  # imports deepspeed, which reads DS_ACCELERATOR when it is
        self._files.use_safe_files(deepspeed_engine)
        self._config = config
        self._veto: Any = importlib.import_module("trainer.zero_veto").Veto.over(deepspeed_engine)
        self._reduction = Reduction.over(deepspeed_engine)
        self.device = device

    @classmethod
    def build(cls, model: PretrainingNetwork, config: RunConfig) -> "Engine":
        """Partition `model` over the ranks of the default process group. `config.precision` is settled, not `auto`.

        Raises:
            ConfigError: the device cannot compute in the configured precision, or `zero.overlap` cannot be had in it.
            EnvironmentMismatchError: `zero.deepspeed` asks for what must be compiled, and there is no compiler; or torch is too old.
        """
        device = training_device()
        _refuse_unsupported_precision(config.precision, device)
        settings = derive_deepspeed_config(config, dist.get_world_size(), device.type)
        deepspeed = _import_deepspeed(device)
        require_compiler(settings, importlib.import_module("deepspeed.git_version_info").installed_ops)
        optimizer = build_optimizer(model, config.optimizer, deepspeeds_own=builds_own_adam(settings))
        with redirect_stdout(io.StringIO()), buffers_kept(model):  # rank 0 prints its memory for every parameter group
            wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
        if isinstance(optimizer, Lamb):
            optimizer.partitions = importlib.import_module("trainer.zero_load").partitions(wrapped, config.zero.stage)
        engine = cls(wrapped, config, device)
        correct_start(wrapped, config.zero.stage, config.precision)
        engine._apply_optimizer_settings()
        return engine

    @property
    def model(self) -> PretrainingNetwork:
        """The network; under ZeRO-3 its parameters are partitioned."""
        return self._deepspeed.module

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the network computes."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self._config.precision]

    @property
    def computes_behind(self) -> bool:
        """Whether the device computes a pass after its host has handed it out, and the host has time meanwhile."""
        return self.device.type == "cuda"

    @property
    def loss_scale(self) -> float:
        """Factor on the loss of fp16; 1 in other precisions."""
        return float(self._deepspeed.optimizer.loss_scale) if self._config.precision == "fp16" else 1.0

    @property
    def reduces_apart(self) -> bool:
        """Whether the time of reducing gradients can be told from that of the backward pass."""
        return self._reduction.is_apart

    def accumulate(self, batch: TensorBatch, weights: LossWeights, *, last: bool, enter: Callable[[str], None] = lambda phase: None) -> LossSums:
        """Forward and backward of one batch; `last` says that the step has no more, so that gradients are reduced.

        `enter` hears which begins, and `reduce` where gradients are reduced apart.
        """
        enter("forward")
        self._deepspeed.set_gradient_accumulation_boundary(last)
        sums = as_loss_sums(self._deepspeed(batch))
        enter("backward")
        loss = weights.loss(sums)
        if self._config.zero.stage == 0:
            loss = loss * self.loss_scale  # DeepSpeed 0.19 unscales the gradients at stage 0 but does not scale the loss
        with self._reduction.heard_by(enter):
            self._deepspeed.backward(loss, scale_wrt_gas=False)
        return sums

    def step(self, lr: float) -> StepOutcome:
        """Clip and update with learning rate `lr`, unless a gradient of any rank is not finite: then they are dropped.

        The norm that clipping needs, a sum over all ranks, says so before anything is changed.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        stage_0, precision, scale = self._config.zero.stage == 0, self._config.precision, self.loss_scale
        if stage_0 and precision == "fp32":
            grad_norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self._config.optimizer.clip_norm))
            if not math.isfinite(grad_norm):
                return self.drop()
            self._deepspeed.step()
            return StepOutcome(grad_norm, applied=True)
        self._deepspeed.step()
        grad_norm = float(self._deepspeed.get_global_grad_norm())
        return StepOutcome(grad_norm / scale if stage_0 else grad_norm, applied=bool(self._deepspeed.was_step_applied()))

    def drop(self) -> StepOutcome:
        """Forget the gradients that were accumulated: the next step is as if they had never been."""
        self._veto.drop_gradients()
        return StepOutcome(math.nan, applied=False)

    def evaluate(self, batch: TensorBatch) -> LossSums:
        """Losses of one batch without dropout and without a graph."""
        with self._evaluating():
            return as_loss_sums(self._deepspeed(batch))

    def logits(self, input_ids_BT: Tensor, token_type_ids_BT: Tensor, attention_mask_BT: Tensor) -> dict[str, Tensor]:
        """`PretrainingNetwork.logits` as fp32 on the CPU, computed in the training precision without dropout."""
        with self._evaluating():
            found = self.model.logits(*(tensor.to(self.device) for tensor in (input_ids_BT, token_type_ids_BT, attention_mask_BT)))
            return {name: logits.cpu() for name, logits in found.items()}

    def snapshot(self, into: Snapshot) -> None:
        """Add this rank's files to a snapshot; `load` takes them from the folder that they are written to."""
        self._files.snapshot_engine(self._deepspeed, into)

    def load(self, folder: Path) -> None:
        """Continue from what `snapshot` took at the same world size, ZeRO stage and precision: bit for bit.

        Optimizer settings are the config's, not the checkpoint's. Files are read as data: a pickle with code in it is refused.

        Raises:
            DataCorruptError: a file is unreadable, or holds anything but tensors and plain values.
        """
        self._files.load_engine(self._deepspeed, folder)
        self._apply_optimizer_settings()

    def load_from_other_layout(self, folder: Path) -> None:
        """Continue from what `snapshot` took at another world size or ZeRO stage: the same weights and moments, in other parts.

        Optimizer settings are the config's, not the checkpoint's.

        Raises:
            DataCorruptError: a file is missing, unreadable, or holds anything but tensors and plain values.
            ConfigError: the checkpoint is of another network, or in fp16, whose loss scale is not carried over yet.
        """
        if self._config.precision == "fp16":
            raise ConfigError(
                "a run in fp16 cannot change its world size, ZeRO stage, offload or zero.deepspeed yet",
                "Resume with the workers and `zero` that it had.",
            )
        zero_state, zero_load = importlib.import_module("trainer.zero_state"), importlib.import_module("trainer.zero_load")
        zero_load.give_state(self._deepspeed, self._config.zero.stage, zero_state.open_state(folder))
        self._apply_optimizer_settings()

    @contextmanager
    def _evaluating(self) -> Generator[None]:
        self._deepspeed.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._deepspeed.train()

    def _apply_optimizer_settings(self) -> None:
        settings = self._config.optimizer
        decays = (settings.weight_decay, 0.0)  # in the order of `optimizers.parameter_groups`
        for group, weight_decay in zip(self._deepspeed.optimizer.param_groups, decays, strict=True):
            group.update(betas=settings.betas, eps=settings.eps, weight_decay=weight_decay)


def _refuse_unsupported_precision(precision: str, device: torch.device) -> None:
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision fp16 needs a GPU; this rank has none", "Set precision to bf16 (the same range as fp32, no loss scale) or fp32.")


def _import_deepspeed(device: torch.device) -> Any:
    """Import and initialise DeepSpeed on top of the process group that is there."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("LOCAL_RANK", "0")
    else:
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses a GPU; Ray may number ranks otherwise than devices
    deepspeed: Any = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # it calls names that torch renames
    if device.type == "cpu":
        # The shared-memory all-reduce would be compiled on first use, and spins for ever when a peer is killed. Gloo does neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of optimizers that its authors have not tested with ZeRO; we have."""
    return "untested optimizer" not in record.getMessage()
