"""Child's side of the training benchmarks: the Hugging Face Trainer as `run_mlm` sets it up, and a plain torch loop with fp32 master weights."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from typing import Any

from benchmarks.children import Measurement, timed_rate
from benchmarks.contestants.training import LR, counts_of, network_of, run_config
from benchmarks.contestants.training_batches import micro_batches, stock_inputs
from benchmarks.training import Network, Shape

_MANY = 1_000_000
_WARM_UP_S = 0.5


def hugging_face(network: dict[str, Any], shape: dict[str, Any], precision: str, seconds: float) -> Measurement:
    """`Trainer` over stock `BertForPreTraining`, everything at its default but for what would write: the same batches, ready as tensors."""
    import torch
    from transformers import BertConfig, BertForPreTraining, Trainer, TrainingArguments

    torch.set_num_threads(1)
    dimensions, batches = Network(**network), micro_batches(Shape(**shape), Network(**network))
    clock = Clock(seconds, [batch.num_tokens for batch in batches])
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        trainer = Trainer(
            model=BertForPreTraining(BertConfig(**dimensions.bert(dropout=0.1))),
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=True,
                bf16=precision == "bf16",
                max_steps=_MANY,
                per_device_train_batch_size=1,
                train_sampling_strategy="sequential",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=_MANY,
            ),
            train_dataset=_Turns([stock_inputs(batch) for batch in batches]),  # pyright: ignore[reportArgumentType]
            data_collator=_only,
            callbacks=[_stopping_with(clock)],
        )
        trainer.train()
    return {"precision": precision, **clock.measurement()}


class Clock:
    """`timed_rate` for a loop that is not ours: `tick` after each step, until it says that the time is over."""

    def __init__(self, seconds: float, tokens: Sequence[int], now: Callable[[], float] = time.perf_counter) -> None:
        self._seconds = seconds
        self._tokens = cycle(tokens)
        self._now = now
        self._begun = now()
        self._started: tuple[float, float] | None = None
        self._ended = (0.0, 0.0)
        self._counts = {"tokens": 0, "steps": 0}

    def tick(self) -> bool:
        """A step was taken; returns whether it was the last. Those of the warm-up do not count, and the first is always one of them."""
        tokens, wall = next(self._tokens), self._now()
        if self._started is None:
            if wall - self._begun >= _WARM_UP_S:
                self._started = (wall, time.process_time())
            return False
        self._counts = {"tokens": self._counts["tokens"] + tokens, "steps": self._counts["steps"] + 1}
        self._ended = (wall, time.process_time())
        return wall - self._started[0] >= self._seconds

    def measurement(self) -> Measurement:
        """As `timed_rate` returns it."""
        assert self._started is not None
        wall, cpu = (end - start for end, start in zip(self._ended, self._started, strict=True))
        rates = {f"{name}_per_s": count / cpu for name, count in self._counts.items()}
        return {"cpu_s": cpu, "wall_s": wall, "wall_share": wall / cpu, **rates, "counts": self._counts}


class _Turns:
    """A data set in which the batches take turns."""

    def __init__(self, batches: Sequence[dict[str, Any]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return _MANY

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._batches[number % len(self._batches)]


def _only(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return dict(batches[0])


def _stopping_with(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            control.should_training_stop = clock.tick()

    return Stopping()


class PlainLoop:
    """Our network under a loop in plain torch: gradients accumulated in fp32, clipping, fused AdamW on fp32 master weights.

    Of several ranks each has such a loop, and torch's DDP sums their gradients, in the precision of the weights and once a step. They have equal
    batches, so that nothing has to be asked about their counts; torch.distributed is initialised.
    """

    def __init__(self, network: Network, shape: Shape, *, precision: str, dropout: float, world_size: int = 1) -> None:
        import torch

        from trainer.engine import training_device
        from trainer.optimizers import parameter_groups

        self._torch: Any = torch
        self._device = training_device()
        config = run_config(network, shape, precision=precision, dropout=dropout)
        self.model = network_of(config, network).to(self._device)
        self._has_masters = precision == "bf16"
        masters = [parameter.detach().clone() for parameter in self.model.parameters()] if self._has_masters else []
        if self._has_masters:
            self.model = self.model.to(torch.bfloat16)
        self._weights = list(self.model.parameters())
        self.masters = masters or self._weights
        self._world_size = world_size
        self._replica: Any = self.model if world_size == 1 else torch.nn.parallel.DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        for weight in self._weights if self._has_masters and world_size == 1 else ():
            weight.grad_dtype = torch.float32  # autograd then adds up 16-bit gradients in fp32, without a copy; DDP wants those of the weights' type
        groups = parameter_groups(_Parameters(self.masters), config.optimizer)  # pyright: ignore[reportArgumentType]
        self._optimizer = torch.optim.AdamW(groups, fused=True)
        self._clip_norm = config.optimizer.clip_norm

    def step(self, batches: Sequence[Any]) -> None:
        """An optimizer step over the micro-batches."""
        from trainer.batch import tensor_batches
        from trainer.networks import as_loss_sums
        from trainer.objectives import LossWeights

        num_masked, num_pairs = (sum(getattr(batch, name) for batch in batches) for name in ("num_masked", "num_pairs"))
        size = self._world_size
        weights = LossWeights.for_step(num_masked=size * num_masked, num_pairs=size * num_pairs, world_size=size)
        for number, batch in enumerate(batches, start=1):
            with self._replica.no_sync() if size > 1 and number < len(batches) else nullcontext():
                weights.loss(as_loss_sums(self._replica(tensor_batches(batch)[0].to(self._device)))).backward()
        if self._has_masters:
            for master, weight in zip(self.masters, self._weights, strict=True):
                master.grad = weight.grad.float()
        self._torch.nn.utils.clip_grad_norm_(self.masters, self._clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = LR
        self._optimizer.step()
        self._give_weights()

    def _give_weights(self) -> None:
        """The new weights to the network, and no gradients any more."""
        if self._has_masters:
            with self._torch.no_grad():
                self._torch._foreach_copy_(self._weights, self.masters)
            for master in self.masters:
                master.grad = None
        self.model.zero_grad()


class _Parameters:
    """Tensors where `parameter_groups` expects a module."""

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._tensors = tensors

    def parameters(self) -> Iterator[Any]:
        return iter(self._tensors)


def plain_loop(
    network: dict[str, Any], shape: dict[str, Any], precision: str, seconds: float, accumulation: int = 1, dropout: float = 0.1
) -> Measurement:
    """Tokens a second of `PlainLoop`."""
    import torch

    torch.set_num_threads(1)
    dimensions, form = Network(**network), Shape(**shape)
    loop = PlainLoop(dimensions, form, precision=precision, dropout=dropout)
    return {"precision": precision, **timed_rate(_steps(loop, micro_batches(form, dimensions), accumulation), seconds)}


def _steps(loop: PlainLoop, batches: Sequence[Any], accumulation: int) -> Iterator[dict[str, int]]:
    turns = cycle(batches)
    while True:
        chosen = list(islice(turns, accumulation))
        loop.step(chosen)
        yield counts_of(chosen)
