"""A micro-batch as the tensors that the model takes."""

from typing import Any

import numpy as np
import torch

from data_pipeline.micro_batch import MicroBatch


def to_tensors(batch: MicroBatch) -> dict[str, torch.Tensor]:
    """Ids, segments, positions and samples by place, where samples start, masked places and all labels."""
    arrays: dict[str, Any] = {
        "input_ids": batch.input_ids,
        "token_type_ids": batch.token_type_ids,
        "position_ids": batch.position_ids,
        "sample_ids": batch.sample_ids,
        "starts": batch.starts,
        "mlm_positions": batch.mlm_positions,
        "mlm_labels": batch.mlm_labels,
        "nsp_labels": batch.nsp_labels,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for name, array in arrays.items()}
