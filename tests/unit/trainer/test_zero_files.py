"""DeepSpeed's files are read as data only, and give back the fp32 weights (engines at every stage: see tests/distributed)."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DataCorruptError
from tests.support.checkpoints import GOLDEN, plant_payload

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from trainer.zero_files import read_file
from trainer.zero_state import consolidate

FILES = sorted(path.name for path in (GOLDEN / "zero").glob("*.pt"))


def test_the_golden_checkpoint_gives_the_same_weights() -> None:
    weights = consolidate(GOLDEN / "zero")
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    assert digest.hexdigest() == json.loads(GOLDEN.with_suffix(".json").read_text())["weights_sha256"]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert torch.equal(weights["cls.predictions.decoder.weight"], weights["bert.embeddings.word_embeddings.weight"])


@pytest.mark.parametrize("file", FILES)
def test_a_payload_does_not_run(tmp_path: Path, file: str) -> None:
    folder, witness = tmp_path / "zero", tmp_path / "witness"
    shutil.copytree(GOLDEN / "zero", folder)
    plant_payload(folder / file, witness)
    torch.load(folder / file, weights_only=False)
    assert witness.exists()  # it is a payload: plain unpickling runs it
    witness.unlink()
    with pytest.raises(DataCorruptError, match=file):
        read_file(folder / file)
    with pytest.raises(DataCorruptError, match=file):
        consolidate(folder)
    assert not witness.exists()


def test_a_missing_partition_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(GOLDEN / "zero", folder)
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(DataCorruptError, match="of 1 ranks instead of 2"):
        consolidate(folder)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"not a pickle")
    with pytest.raises(DataCorruptError, match=r"x\.pt"):
        read_file(tmp_path / "x.pt")


def test_partitions_of_the_wrong_ranks_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "zero"
    shutil.copytree(GOLDEN / "zero", folder)
    first, second = (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    shutil.copy(GOLDEN / "zero" / second.name, first)
    shutil.copy(GOLDEN / "zero" / first.name, second)
    with pytest.raises(DataCorruptError):
        consolidate(folder)
