"""Child's side of `train_packing`: the losses of each pair in padded and in packed rows."""

from dataclasses import replace
from typing import Any

from benchmarks.children import Measurement
from benchmarks.contestants.training import network_of, run_config
from benchmarks.contestants.training_batches import micro_batch
from benchmarks.training import Network, Shape

_INITIALIZER_RANGE = 0.2
"""Ten times the usual: attention then matters in a network that has not been trained, and who attends to whom shows in the losses."""


def pairs(network: dict[str, Any], shape: dict[str, Any]) -> Measurement:
    """The largest difference of a pair's losses between the layouts, in fp32 without dropout, and the share of places that hold a token."""
    import torch

    torch.set_num_threads(1)
    dimensions, padded = Network(**network), replace(Shape(**shape), packing="none")
    config = run_config(dimensions, padded, precision="fp32", dropout=0.0, initializer_range=_INITIALIZER_RANGE)
    model = network_of(config, dimensions)
    batches = [micro_batch(form, dimensions.vocab_size, 0) for form in (padded, replace(padded, packing="rows"))]
    losses = [losses_by_pair(model, batch) for batch in batches]
    return {
        "difference": float((losses[0] - losses[1]).abs().max()),
        "padded_fill": batches[0].fill,
        "packed_fill": batches[1].fill,
        "counts": {"pairs": len(losses[0])},
    }


def losses_by_pair(model: Any, batch: Any) -> Any:
    """(B, 2) mean MLM loss and NSP loss of each sample: the whole micro-batch is computed, and the labels of one sample at a time count."""
    import torch

    from trainer.batch import tensor_batches
    from trainer.objectives import IGNORED

    [whole] = tensor_batches(batch)
    owners = whole.sample_ids_RT.flatten()[whole.mlm_positions_N]
    found: list[list[float]] = []
    for sample in range(batch.num_samples):
        mine = owners == sample + 1
        labels = torch.where(mine, whole.mlm_labels_N, IGNORED)
        nsp = torch.where(torch.arange(batch.num_samples) == sample, whole.nsp_labels_B, IGNORED)
        with torch.no_grad():
            mlm_loss, nsp_loss, *_ = model(replace(whole, mlm_labels_N=labels, nsp_labels_B=nsp))
        found.append([float(mlm_loss) / max(1, int(mine.sum())), float(nsp_loss)])
    return torch.tensor(found, dtype=torch.float64)
