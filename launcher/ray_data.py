"""The seam to Ray Data: runs the pure per-partition functions of `prepare` on the cluster (starts Ray tasks)."""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray.data

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class RayExecutor:
    """`data_pipeline.executor.Executor` on Ray Data: one task per item, results streamed back in the order of the items."""

    home: str
    """The driver's current folder: relative paths mean the same in every task."""

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See `Executor.map`. Items and results travel pickled, because Ray Data's blocks are Arrow tables."""
        if not items:
            return
        _be_quiet()
        rows = [{"item": pickle.dumps(item)} for item in items]
        settings = {"function": pickle.dumps(function), "home": self.home}
        run_batch: Any = _run_batch  # Ray's type of a batch function knows no keyword arguments
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(run_batch, batch_size=None, fn_kwargs=settings)
        for row in dataset.iter_rows():
            failed, value = pickle.loads(row["result"])
            if failed:
                raise value
            yield value


def _run_batch(batch: Any, function: bytes, home: str) -> dict[str, Any]:
    """Runs inside a Ray task. Errors return as values, so that the driver raises them as they were, unretried and unwrapped."""
    os.chdir(home)
    call = pickle.loads(function)
    return {"result": [_outcome(call, pickle.loads(item)) for item in batch["item"]]}


def _outcome(function: Callable[[Any], Any], item: Any) -> bytes:
    try:
        return pickle.dumps((False, function(item)))
    except Exception as error:  # noqa: BLE001  # it is raised again in the driver
        return pickle.dumps((True, error))


def _be_quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)
