"""Whether an exported model is the trained one: loads it the way users will and compares logits. Reads the folder, writes nothing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForPreTraining, AutoTokenizer

from data_pipeline.errors import MaskwrightError
from trainer.architectures import longest_row
from trainer.networks import PretrainingNetwork, buffers_kept
from trainer.quiet import quiet_transformers

MAX_DIFFERENCE = 1e-4
"""Largest difference of a logit between stock transformers and the training code, both in fp32 on this machine."""

PROBE_TOLERANCE = {"fp32": 1e-4, "fp16": 0.00625, "bf16": 0.05}
"""Largest root-mean-square difference from the engine's own logits, as a share of their root mean square, by the engine's precision.

In bf16 two correct attention kernels differ by up to 0.017 on 12 layers, and fp32 from bf16 by as much."""

_SMALLEST_RMS = 0.01  # below it, a share means nothing: heads that have learned nothing give logits of about zero
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXT = [
    ("The committee met on Tuesday to discuss the new railway.", "It decided to wait for the engineer's report before spending more money."),
    ("Return a list of the files in the folder, sorted by name.", "The moon was already high when they reached the harbour."),
    ("Water boils at 100 degrees Celsius at sea level, but at about 70 on the highest mountains.", "Cooking takes longer there."),
    ("Yes.", "She opened the letter, read it twice, and put it back into the drawer without a word to anybody in the room."),
]


@dataclass(frozen=True)
class Agreement:
    """How close the exported model came. The first three compare fp32 logits of real text, None of heads that it does not have; the last three
    share the engine's precision. Under `objective: clm` the MLM logits are those of the next token."""

    mlm_max_difference: float
    nsp_max_difference: float | None
    masked_lm_max_difference: float
    probe_mlm_relative_difference: float
    probe_nsp_relative_difference: float | None
    probe_precision: str


def check_export(folder: Path, trained: PretrainingNetwork, probe: Path, precision: str) -> Agreement:
    """Compare stock transformers on `folder` with the trained network and with the engine's own logits in `probe`.

    Raises:
        MaskwrightError: they do not load or do not agree.
    """
    with quiet_transformers(), torch.no_grad():
        batch = _tokenize(folder, longest_row(trained.config))
        expected = trained.logits(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"])
        _load(AutoModel, folder, needed=set(cast(Any, trained).base_model.state_dict()))
        by_objective = _load(AutoModelForCausalLM if trained.is_causal else AutoModelForMaskedLM, folder)
        masked_lm = by_objective(**_own_inputs(trained, batch)).logits
        stock = _load(AutoModelForPreTraining, folder) if trained.has_pair_head else by_objective
        seen = {"mlm_logits": batch["attention_mask"].bool(), "nsp_logits": slice(None)}  # padding attends to what its kernel likes
        largest = {name: _largest(logits[seen[name]], expected[name][seen[name]]) for name, logits in _stock_logits(trained, stock, batch).items()}
        relative = _against_probe(trained, stock, load_file(probe), _DTYPES[precision])
    agreement = Agreement(
        mlm_max_difference=largest["mlm_logits"],
        nsp_max_difference=largest.get("nsp_logits"),
        masked_lm_max_difference=_largest(masked_lm[seen["mlm_logits"]], expected["mlm_logits"][seen["mlm_logits"]]),
        probe_mlm_relative_difference=relative["mlm_logits"],
        probe_nsp_relative_difference=relative.get("nsp_logits"),
        probe_precision=precision,
    )
    _require(agreement, folder)
    return agreement


def _require(agreement: Agreement, folder: Path) -> None:
    tolerance = PROBE_TOLERANCE[agreement.probe_precision]
    for what, found, limit in [
        ("token logits of stock transformers and of the training code", agreement.mlm_max_difference, MAX_DIFFERENCE),
        ("next-sentence logits of stock transformers and of the training code", agreement.nsp_max_difference, MAX_DIFFERENCE),
        ("logits of AutoModelForMaskedLM (or CausalLM) and of the training code", agreement.masked_lm_max_difference, MAX_DIFFERENCE),
        ("token logits now and when the checkpoint was taken", agreement.probe_mlm_relative_difference, tolerance),
        ("next-sentence logits now and when the checkpoint was taken", agreement.probe_nsp_relative_difference, tolerance),
    ]:
        if found is not None and not found <= limit:  # also when it is not a number
            raise MaskwrightError(
                f"the model exported to {folder} is not the trained one: {what} differ by {found:.2g}; at most {limit:g} is allowed",
                "Nothing was exported. Check that transformers has the version of the checkpoint's MANIFEST.json, and report it if so.",
            )


def _tokenize(folder: Path, max_length: int) -> dict[str, Tensor]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    first, second = zip(*_TEXT, strict=True)
    return dict(
        tokenizer(list(first), list(second), padding=True, truncation=True, max_length=max_length, return_tensors="pt", return_token_type_ids=True)
    )


def _load(auto_class: Any, folder: Path, needed: set[str] | None = None) -> Any:
    """The model by a class of transformers. `needed`: the weights that there are to find, where the class may have others: a pooler that was not
    pretrained."""
    model, report = auto_class.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(report["missing_keys"] if needed is None else needed & set(report["missing_keys"]))
    if missing or report["mismatched_keys"]:
        raise MaskwrightError(
            f"{auto_class.__name__} does not find all weights in {folder}: {missing[:5]}, {report['mismatched_keys']}",
            "Check that transformers has the version of the checkpoint's MANIFEST.json, and report it if so.",
        )
    return model.eval()


def _own_inputs(trained: PretrainingNetwork, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if trained.takes_token_types else ()))
    return {name: batch[name] for name in names}


def _stock_logits(trained: PretrainingNetwork, stock: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What stock transformers computes, under the names of `PretrainingNetwork.logits`."""
    output = stock(**_own_inputs(trained, batch))
    if not trained.has_pair_head:
        return {"mlm_logits": output.logits}
    return {"mlm_logits": output.prediction_logits, "nsp_logits": output.seq_relationship_logits}


def _against_probe(trained: PretrainingNetwork, stock: Any, probe: dict[str, Tensor], dtype: torch.dtype) -> dict[str, float]:
    with buffers_kept(stock):
        stock.to(dtype)
    seen = probe["attention_mask"].bool()  # padding attends to what its kernel likes
    found = _stock_logits(trained, stock, probe)
    places = {"mlm_logits": seen, "nsp_logits": slice(None)}
    return {name: _relative(logits[places[name]], probe[name][places[name]]) for name, logits in found.items()}


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())


def _relative(found: Tensor, expected: Tensor) -> float:
    difference, scale = (found.float() - expected.float()).square().mean().sqrt(), expected.float().square().mean().sqrt()
    return float(difference / max(float(scale), _SMALLEST_RMS))
