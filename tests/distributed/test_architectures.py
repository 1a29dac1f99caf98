"""Other architectures and causal language modelling: trained under ZeRO, resumed bit for bit, exported, and read by stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import InterruptedRunError
from data_pipeline.storage import Location
from tests.support.batches import small_config
from tests.support.contexts import StoppingContext
from tests.support.corpus import small_corpus
from tests.support.distributed import run_distributed
from trainer.classifier import build_classifier
from trainer.config import RunConfig
from trainer.context import LocalContext
from trainer.export import export
from trainer.pretrain import pretrain
from trainer.runlog import RunFolder

STEPS = 6
ALONE = {"sentence_objective": "none"}
Variant = tuple[str, int, str, str]
SAMPLE: list[Variant] = [("gpt2", 1, "bf16", "rows"), ("modernbert", 3, "bf16", "rows"), ("roberta", 2, "fp32", "none")]
REST: list[Variant] = [
    *[("gpt2", stage, precision, packing) for stage, precision, packing in ((0, "bf16", "none"), (2, "bf16", "rows"), (3, "bf16", "rows"))],
    *[("modernbert", stage, precision, packing) for stage, precision, packing in ((0, "bf16", "none"), (1, "fp32", "rows"), (2, "bf16", "rows"))],
    *[("distilbert", 1, "bf16", "none"), ("electra", 3, "bf16", "none")],
]


def config_of(variant: Variant) -> RunConfig:
    architecture, stage, precision, packing = variant
    return small_config(
        objective="clm" if architecture == "gpt2" else ALONE,
        precision=precision,
        zero={"stage": stage},
        model={"architecture": architecture, "num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.1},
        batch={"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 32, "packing": packing},
        schedule={"steps": STEPS, "warmup_steps": 2},
        checkpoint={"every_steps": 100},
        validation={"every_steps": 100, "micro_batches": 2},
    )


def folder_of(root: str, variant: Variant, name: str) -> str:
    return f"{root}/{'-'.join(map(str, variant))}-{name}"


def whole_and_halves(rank: int, world_size: int, variants: list[Variant], corpus: str, root: str) -> None:
    """Each run uninterrupted, and stopped before step 3 and resumed."""
    for variant in variants:
        config = config_of(variant)
        pretrain(config, corpus, folder_of(root, variant, "whole"), LocalContext(rank, world_size), 1)
        halves = folder_of(root, variant, "halves")
        with pytest.raises(InterruptedRunError):
            pretrain(config, corpus, halves, StoppingContext(rank, world_size, at=3), 1)
        pretrain(config, corpus, halves, LocalContext(rank, world_size), 2)


def exact(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record[name] for name in ("step", "loss", "mlm_loss", "mlm_accuracy", "grad_norm", "lr", "batch_digest")}


@pytest.mark.parametrize("variants", [pytest.param(SAMPLE, id="sample"), pytest.param(REST, id="rest", marks=pytest.mark.full)])
def test_an_architecture_trains_resumes_bit_for_bit_and_loads_in_transformers(tmp_path: Path, variants: list[Variant]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    corpus = small_corpus(tmp_path)
    run_distributed(whole_and_halves, 2, (variants, corpus, str(tmp_path)), timeout_s=100)
    for variant in variants:
        whole, halves = (RunFolder(Location.at(folder_of(str(tmp_path), variant, name))) for name in ("whole", "halves"))
        records = whole.read_metrics()
        assert [record["step"] for record in records] == list(range(STEPS))
        assert [exact(record) for record in halves.read_metrics()] == [exact(record) for record in records]
        assert records[-1]["mlm_loss"] < records[0]["mlm_loss"]
        assert records[0]["nsp_loss"] is None

        folder = export(halves, config_of(variant), Location.at(corpus)).url  # compares logits of text with the training code's
        auto_class: Any = AutoModelForCausalLM if variant[0] == "gpt2" else AutoModelForMaskedLM
        network, tokenizer = auto_class.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        inputs = tokenizer(["the of and", "a"], padding=True, return_tensors="pt")
        assert "token_type_ids" not in inputs
        assert (tokenizer.sep_token_id in inputs["input_ids"]) == (variant[0] != "gpt2"), "a text to be continued has no end"
        with torch.no_grad():
            assert bool(network(**inputs).logits.isfinite().all())
            classifier = build_classifier(folder, ["no", "yes"], "pretrained", seed=0)
            assert classifier(**inputs).logits.shape == (2, 2)
        card = (Path(folder) / "README.md").read_text()
        assert auto_class.__name__ in card
        assert ("text-generation" in card) == (variant[0] == "gpt2")
