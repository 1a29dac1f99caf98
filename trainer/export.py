"""Export: a committed checkpoint becomes a model folder that stock transformers loads, and is compared with the training code before it counts.

One process, no torch.distributed, no network. Owns `models/` of a run.
"""

import importlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, MaskwrightError, NotFoundError
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location, storage_errors, sync_folder
from trainer.checkpoint import Checkpoint, open_checkpoint
from trainer.config import RunConfig
from trainer.export_check import Agreement, check_export
from trainer.manifest import FileDigest, fsync_file
from trainer.model_card import CardFacts, render_model_card
from trainer.model_folder import publish
from trainer.networks import PretrainingNetwork, network_class
from trainer.quiet import quiet_transformers
from trainer.runlog import RunFolder
from trainer.verification import LINEAGE, LINEAGE_VERSION, verify_model


def export(run: RunFolder, config: RunConfig, corpus: Location, step: int | None = None, name: str = "final") -> Location:
    """Export the checkpoint of `step` (the newest by default) to `models/<name>` and return that folder.

    The folder appears at once, after stock transformers has been seen to compute the training code's logits from it. Exporting the same
    checkpoint again does nothing.

    Raises:
        NotFoundError: there is no such checkpoint.
        NoCheckpointError: it is damaged.
        ConfigError: `corpus` is not what the checkpoint was trained on.
        MaskwrightError: the exported model does not compute the same logits; nothing is left in `models/<name>` that was not there before.
    """
    checkpoint, target = open_checkpoint(run, step), run.models / name
    try:
        if not _is_done(target, checkpoint):
            _export(target, run, config, checkpoint, Mixture.open(corpus, config.data))
    finally:
        checkpoint.discard_copy()
    return target


def _export(target: Location, run: RunFolder, config: RunConfig, checkpoint: Checkpoint, corpora: Mixture) -> None:
    if checkpoint.state.corpus_fingerprint != corpora.fingerprint:
        raise ConfigError(
            f"{checkpoint.location} was trained on corpus {checkpoint.state.corpus_fingerprint[:12]}; this one is {corpora.fingerprint[:12]}",
            "Name the corpus of the run.",
        )
    partial = target.path.with_name(f"{target.name}.partial") if target.is_local else Path(tempfile.mkdtemp(prefix="maskwright-model-"))
    try:
        with storage_errors(str(target)):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(partial, run, config, checkpoint, corpora)
            _publish(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_done(target: Location, checkpoint: Checkpoint) -> bool:
    try:
        lineage: Any = (target / LINEAGE).read_json()
    except (NotFoundError, ValueError):
        return False
    return bool(lineage.get("checkpoint_digest") == checkpoint.manifest.digest and not verify_model(target, lambda *_: None))


def _write(partial: Path, run: RunFolder, config: RunConfig, checkpoint: Checkpoint, corpora: Mixture) -> None:
    trained = load_trained(checkpoint)
    _save_stock(trained, partial)
    _copy_tokenizer(Path(corpora.tokenizer_folder), partial, trained)
    agreement = check_export(partial, trained, checkpoint.probe, checkpoint.manifest.circumstances.precision)
    facts = _facts(run, config, checkpoint, trained, agreement)
    (partial / "README.md").write_text(render_model_card(facts), encoding="utf-8")
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    for path in files.values():
        path.chmod((partial / "README.md").stat().st_mode)  # safetensors makes its file readable for nobody else
        fsync_file(path)
    lineage = {
        "format_version": LINEAGE_VERSION,
        "run": run.root.name,
        "step": checkpoint.step,
        "attempt": checkpoint.manifest.attempt,
        "checkpoint_digest": checkpoint.manifest.digest,
        "corpus_fingerprint": corpora.fingerprint,
        "tokenizer_digest": corpora.tokenizer_digest,
        "versions": checkpoint.manifest.circumstances.versions,
        "files": {name: asdict(FileDigest.of(path)) for name, path in files.items()},
        "verification": asdict(agreement),
    }
    Location.at(partial / LINEAGE).write_json(lineage)


def load_trained(checkpoint: Checkpoint) -> PretrainingNetwork:
    """The training code's network with a checkpoint's fp32 weights, in evaluation mode on the CPU.

    Raises:
        MaskwrightError: the weights are not this network's.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
    zero_files: Any = importlib.import_module("trainer.zero_files")
    weights: dict[str, Tensor] = importlib.import_module("trainer.zero_state").consolidate(checkpoint.zero_folder)
    settings: Any = json.loads((checkpoint.zero_folder / zero_files.MODEL_CONFIG).read_bytes())
    kind = network_class(settings["model_type"])
    model = kind(kind.config_class.from_dict({**settings, "dtype": "float32"}))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise MaskwrightError(
            f"{checkpoint.zero_folder} does not hold this network's weights: {error}", "Export it with the release that wrote it."
        ) from error
    return model.eval()


def _save_stock(trained: PretrainingNetwork, folder: Path) -> None:
    """config.json and model.safetensors, written by stock transformers' own class: no name of ours gets into them."""
    stock = trained.stock(trained.config)
    stock.load_state_dict(trained.state_dict(), strict=True)
    with quiet_transformers():
        stock.save_pretrained(folder)


def _copy_tokenizer(source: Path, folder: Path, trained: PretrainingNetwork) -> None:
    """The corpus' tokenizer; for a network without token types as one that gives none, which some would take for tokens; for a causal one as one
    that puts no end behind a text, which is to be continued."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)
    settings: dict[str, Any] = {}
    if not trained.takes_token_types:
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    if trained.is_causal:
        definition = json.loads((folder / "tokenizer.json").read_bytes())
        if (open_ended := without_end(definition)) != definition:
            (folder / "tokenizer.json").write_text(json.dumps(open_ended, indent=2, ensure_ascii=False), encoding="utf-8")
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # BERT's own makes its template anew
    if settings:
        file = Location.at(folder / "tokenizer_config.json")
        file.write_json(file.read_json() | settings)


def without_end(definition: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's definition, whose template ends with no special token; pure."""
    processor: dict[str, Any] = definition.get("post_processor") or {}
    if processor.get("type") != "TemplateProcessing":
        return definition
    open_ended = {name: processor[name][:-1] if "SpecialToken" in processor[name][-1] else processor[name] for name in ("single", "pair")}
    return {**definition, "post_processor": {**processor, **open_ended}}


def _facts(run: RunFolder, config: RunConfig, checkpoint: Checkpoint, trained: PretrainingNetwork, agreement: Agreement) -> CardFacts:
    measured = [e for e in run.read_events() if e["kind"] == "validation" and (e["step"] or 0) <= checkpoint.step]
    return CardFacts(
        name=run.root.name,
        architecture=trained.config.model_type,
        is_causal=trained.is_causal,
        layers=trained.config.num_hidden_layers,
        width=trained.config.hidden_size,
        num_parameters=sum(parameter.numel() for parameter in trained.parameters()),
        vocab_size=trained.config.vocab_size,
        objective=config.objective.sentence_objective,
        corpus=config.corpus_label,
        fingerprint=checkpoint.state.corpus_fingerprint,
        steps=checkpoint.step,
        planned_steps=config.schedule.steps,
        tokens=checkpoint.state.tokens_seen,
        batch_size=config.batch.global_batch_size,
        sequence_length=max(config.batch.sequence_lengths),
        learning_rate=config.optimizer.lr,
        precision=checkpoint.manifest.circumstances.precision,
        checkpoint=checkpoint.manifest.digest,
        validation=measured[-1] if measured else None,
        max_difference=max(agreement.mlm_max_difference, agreement.nsp_max_difference or 0.0),
    )


def _publish(partial: Path, to: Location) -> None:
    if not to.is_local:
        lineage = (partial / LINEAGE).read_bytes()
        (partial / LINEAGE).unlink()
        publish(partial, to)
        (to / LINEAGE).write_bytes(lineage)  # last: with it the model counts
        return
    sync_folder(partial)
    target = to.path
    aside = target.with_name(f"{target.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
