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
    """(B, 2) mean MLM loss and NSP loss of each sample of a micro-batch; 0 where it has none."""
    import torch
    from torch.nn import functional

    from trainer.batch import tensor_batches
    from trainer.networks import Rows
    from trainer.objectives import IGNORED

    [whole] = tensor_batches(batch)
    with torch.no_grad():
        hidden = model._encode(Rows.of(whole)).flatten(0, 1)
        mlm_logits, nsp_logits = model._token_logits(hidden[whole.mlm_positions_N]), model._pair_logits(hidden[whole.starts_B][:, None])
    owners = whole.sample_ids_RT.flatten()[whole.mlm_positions_N] - 1
    losses = functional.cross_entropy(mlm_logits, whole.mlm_labels_N, reduction="none", ignore_index=IGNORED).double()
    count = torch.zeros(batch.num_samples, dtype=torch.float64).index_add_(0, owners, (whole.mlm_labels_N != IGNORED).double())
    mlm = torch.zeros_like(count).index_add_(0, owners, losses) / count.clamp(min=1)
    nsp = functional.cross_entropy(nsp_logits, whole.nsp_labels_B, reduction="none", ignore_index=IGNORED)
    return torch.stack([mlm, nsp.double()], dim=1)
