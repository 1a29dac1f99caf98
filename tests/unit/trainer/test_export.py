"""An exported model loads in stock transformers, gives the trained network's logits, or does not appear."""

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.config import DataConfig, ObjectiveConfig
from data_pipeline.errors import ConfigError, DataCorruptError, EnvironmentMismatchError, MaskwrightError, NoCheckpointError, NotFoundError
from data_pipeline.index import CorpusIndex
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location
from tests.support.checkpoints import GOLDEN, GOLDEN_MODEL, golden_run, resign, run_config
from trainer import export as export_module
from trainer.checkpoint import list_checkpoints
from trainer.export import LINEAGE, export
from trainer.runlog import RunFolder
from trainer.verification import verify_model

os.environ.setdefault("DS_ACCELERATOR", "cpu")
GOLDEN_EXPORT = GOLDEN.with_name("model-format-1")
CONFIG = run_config(1, model=GOLDEN_MODEL)


@pytest.fixture
def run(tmp_path: Path, tiny_corpus: Prepared) -> RunFolder:
    """A run on the tiny corpus with checkpoints of steps 1 and 2."""
    folder = golden_run(tmp_path / "a-run", 1, 2)
    for checkpoint in list_checkpoints(folder):
        resign(checkpoint.folder, train_state=replace(checkpoint.state, corpus_fingerprint=fingerprint(tiny_corpus)))
    losses = {"mlm_loss": 5.4321, "nsp_loss": 0.7, "mlm_accuracy": 0.1, "nsp_accuracy": 0.5, "unigram_entropy": 6.0}
    folder.append_event("validation", attempt=1, step=2, **losses)
    return folder


def no_progress(*_: int) -> None:
    pass


def fingerprint(corpus: Prepared) -> str:
    return CorpusIndex.open(corpus.folder).fingerprint


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Any connection fails; returns an empty folder in the place of the Hugging Face cache."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def test_a_run_that_skips_damage_is_exported_without_a_shard(run: RunFolder, tiny_corpus: Prepared, tmp_path: Path) -> None:
    shutil.copytree(tiny_corpus.folder.url, tmp_path / "copy")
    (tmp_path / "copy" / "train-000000.tar").unlink()
    damaged = Location.at(tmp_path / "copy")
    with pytest.raises(DataCorruptError, match="is missing"):
        export(run, CONFIG, damaged)
    assert (export(run, CONFIG.model_copy(update={"data": DataConfig(on_damage="skip")}), damaged) / LINEAGE).exists()


@pytest.mark.usefixtures("offline")
def test_stock_transformers_gives_the_same_logits(run: RunFolder, tiny_corpus: Prepared, offline: Path) -> None:
    from transformers import AutoModelForPreTraining, AutoTokenizer

    from trainer.export import load_trained

    folder = export(run, CONFIG, tiny_corpus.folder)
    assert folder.url == str(run.models.path / "final")
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", LINEAGE} <= set(folder.children())
    trained = load_trained(list_checkpoints(run)[-1])
    stock: Any = AutoModelForPreTraining.from_pretrained(folder.url)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder.url)
    batch = tokenizer(["the of and", "a"], ["to in that is", "it"], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = stock.eval()(**batch)
        mlm_logits, nsp_logits = trained.logits(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]).values()
    assert float((output.prediction_logits - mlm_logits).abs().max()) <= 1e-4
    assert float((output.seq_relationship_logits - nsp_logits).abs().max()) <= 1e-4
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.float32}
    assert json.loads((folder / "config.json").read_bytes())["architectures"] == ["BertForPreTraining"]
    assert list(offline.iterdir()) == []


def test_lineage_and_card_say_where_it_comes_from(run: RunFolder, tiny_corpus: Prepared) -> None:
    folder = export(run, CONFIG, tiny_corpus.folder, step=2, name="second")
    lineage = json.loads((folder / LINEAGE).read_bytes())
    assert (lineage["format_version"], lineage["run"], lineage["step"]) == (1, "a-run", 2)
    assert lineage["checkpoint_digest"] == list_checkpoints(run)[-1].manifest.digest
    assert lineage["corpus_fingerprint"] == fingerprint(tiny_corpus)
    assert set(lineage["files"]) == set(folder.children()) - {LINEAGE}
    assert lineage["verification"]["mlm_max_difference"] <= 1e-4
    card = (folder / "README.md").read_bytes().decode()
    assert "library_name: transformers" in card
    assert "| Optimizer steps | 2 of 20 |" in card
    assert "| Masked-language modelling loss | 5.4321 nats |" in card


def test_the_same_checkpoint_is_exported_once(run: RunFolder, tiny_corpus: Prepared) -> None:
    folder = export(run, CONFIG, tiny_corpus.folder)
    before = {path.name: path.stat().st_mtime_ns for path in folder.path.iterdir()}
    export(run, CONFIG, tiny_corpus.folder)
    assert {path.name: path.stat().st_mtime_ns for path in folder.path.iterdir()} == before
    (folder.path / "model.safetensors").write_bytes(b"damaged")
    assert [problem.file for problem in verify_model(folder, no_progress)] == ["model.safetensors"]
    export(run, CONFIG, tiny_corpus.folder)
    assert verify_model(folder, no_progress) == []
    export(run, CONFIG, tiny_corpus.folder, step=1)
    assert json.loads((folder / LINEAGE).read_bytes())["step"] == 1
    assert run.models.children() == ["final"]


def test_the_golden_model_is_still_read(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    assert verify_model(Location.at(GOLDEN_EXPORT), no_progress) == []
    model: Any = AutoModelForMaskedLM.from_pretrained(GOLDEN_EXPORT)
    assert len(AutoTokenizer.from_pretrained(GOLDEN_EXPORT)) == model.config.vocab_size
    (tmp_path / LINEAGE).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(EnvironmentMismatchError, match=r"lineage\.json has format_version 2"):
        verify_model(Location.at(tmp_path), no_progress)


def perturb_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files get one weight wrong."""
    save = export_module._save_stock  # pyright: ignore[reportPrivateUsage]

    def save_wrong(trained: Any, folder: Path) -> None:
        weight = trained.bert.encoder.layer[0].attention.self.value.weight
        with torch.no_grad():
            weight[0, 0] += 1.0
            save(trained, folder)
            weight[0, 0] -= 1.0

    monkeypatch.setattr(export_module, "_save_stock", save_wrong)


def perturb_consolidation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files and the comparison with our forward pass agree, but the weights are not the engine's."""
    load = export_module.load_trained

    def load_wrong(checkpoint: Any) -> Any:
        trained = load(checkpoint)
        with torch.no_grad():
            embeddings = trained.bert.embeddings.word_embeddings.weight
            embeddings.copy_(embeddings.roll(1, dims=0))
        return trained

    monkeypatch.setattr(export_module, "load_trained", load_wrong)


@pytest.mark.parametrize(
    ("perturb", "message"), [(perturb_export, "of the training code differ"), (perturb_consolidation, "when the checkpoint was taken")]
)
def test_a_wrong_weight_fails_the_export(run: RunFolder, tiny_corpus: Prepared, monkeypatch: pytest.MonkeyPatch, perturb: Any, message: str) -> None:
    perturb(monkeypatch)
    with pytest.raises(MaskwrightError, match=message):
        export(run, CONFIG, tiny_corpus.folder)
    assert run.models.children() == []


def test_what_cannot_be_exported_is_refused(run: RunFolder, tiny_corpus: Prepared, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no checkpoint of step 7"):
        export(run, CONFIG, tiny_corpus.folder, step=7)
    with pytest.raises(NotFoundError, match="has no committed checkpoint"):
        export(RunFolder(Location.at(tmp_path / "none")), CONFIG, tiny_corpus.folder)
    with pytest.raises(NotFoundError, match="not an exported model"):
        verify_model(Location.at(tmp_path), no_progress)
    newest = list_checkpoints(run)[-1]
    resign(newest.folder, train_state=replace(newest.state, corpus_fingerprint="f" * 64))
    with pytest.raises(ConfigError, match="was trained on corpus ffffffffffff"):
        export(run, CONFIG, tiny_corpus.folder)
    (newest.folder / "zero/config.json").write_text("{}")
    with pytest.raises(NoCheckpointError, match=r"zero/config\.json"):
        export(run, CONFIG, tiny_corpus.folder)


def test_the_card_of_a_run_whose_validation_had_nothing_to_predict(run: RunFolder, tiny_corpus: Prepared) -> None:
    nothing = {"mlm_loss": None, "nsp_loss": None, "mlm_accuracy": None, "nsp_accuracy": None, "unigram_entropy": 6.0}
    run.append_event("validation", attempt=1, step=2, **nothing)
    card = (export(run, CONFIG, tiny_corpus.folder) / "README.md").read_bytes().decode()
    assert card.startswith("---\nlibrary_name")
    assert "| Next-sentence loss | not measured |" in card
    assert "| Loss of guessing by word frequency | 6.0000 nats |" in card
    assert "Pretrained with masked-language modelling and next-sentence prediction by" in card
    other = CONFIG.model_copy(update={"objective": ObjectiveConfig(sentence_objective="sop")})
    card = (export(run, other, tiny_corpus.folder, name="sop") / "README.md").read_bytes().decode()
    assert "modelling and sentence-order prediction by" in card
    assert "| Sentence-order loss | not measured |" in card
