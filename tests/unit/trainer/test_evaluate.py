"""Evaluation: refusals that name what to do, and filled masks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import ConfigError, NotFoundError
from tests.support.tiny_task import write_model, write_task
from trainer.classifier import build_classifier, save_classifier
from trainer.context import LocalContext
from trainer.evaluate import evaluate_model, fill_mask
from trainer.finetune_config import TaskConfig
from trainer.model_folder import Location, model_digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    write_task(folder / "task")
    write_model(folder / "model")
    return folder


def test_a_model_that_is_no_classifier_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="BertForPreTraining, which is not a classifier") as error:
        evaluate_model(str(folder / "model"), TaskConfig(name="t", path=str(folder / "task")), str(folder), LocalContext())
    assert "maskwright finetune" in error.value.remedy


def test_a_classifier_of_another_task_is_refused(folder: Path) -> None:
    network = build_classifier(str(folder / "model"), ("no", "yes"), "pretrained", 0)
    save_classifier(network, str(folder / "model"), {"max_length": 32}, Location.at(folder / "other"))
    with pytest.raises(ConfigError, match="labels are no, yes; task t has cooking, gardening, sailing"):
        evaluate_model(str(folder / "other"), TaskConfig(name="t", path=str(folder / "task")), str(folder), LocalContext())


def test_a_missing_model_is_named(folder: Path) -> None:
    with pytest.raises(NotFoundError, match=r"it has no config\.json"):
        evaluate_model(str(folder / "nowhere"), TaskConfig(name="t", path=str(folder / "task")), str(folder), LocalContext())


def test_masks_are_filled_in_order_with_falling_probabilities(folder: Path) -> None:
    places = fill_mask(str(folder / "model"), "boil the [MASK] and [MASK]", top_k=4)
    assert len(places) == 2
    for place in places:
        probabilities = [probability for _, probability in place]
        assert len(place) == 4
        assert probabilities == sorted(probabilities, reverse=True)
        assert 0.0 < sum(probabilities) < 1.0


def test_a_text_without_a_mask_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"the text has no \[MASK\]"):
        fill_mask(str(folder / "model"), "boil the salt")


def test_the_digest_of_a_model_covers_config_and_weights(folder: Path, tmp_path: Path) -> None:
    digest = model_digest(str(folder / "model"))
    copy = write_model(tmp_path / "copy")
    assert model_digest(str(copy)) == digest
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_digest(str(copy)) != digest


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    torch.save({"weight": torch.ones(1)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no readable model\.safetensors"):
        fill_mask(str(model), "boil the [MASK]")
    with pytest.raises(ConfigError, match=r"no readable model\.safetensors"):
        build_classifier(str(model), ("no", "yes"), "pretrained", 0)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"no readable model\.safetensors"):
        fill_mask(str(model), "boil the [MASK]")


@pytest.mark.parametrize("setting", ["1", None])
def test_quiet_leaves_progress_bars_as_they_were_without_a_warning(setting: str | None) -> None:
    """In a process of its own: the hub's library reads the variable when it is imported."""
    program = """
import warnings
warnings.simplefilter("error")
from transformers.utils import logging
from huggingface_hub.utils import are_progress_bars_disabled
from trainer.quiet import quiet_transformers
for _ in range(2):
    with quiet_transformers():
        assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled()
print(logging.is_progress_bar_enabled(), are_progress_bars_disabled())
"""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_PROGRESS_BARS"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": setting} if setting else {}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["False", "True"] if setting else ["True", "False"])
