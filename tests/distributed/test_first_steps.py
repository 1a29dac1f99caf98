"""Every ZeRO stage takes the same first steps as a plain torch + transformers loop with an fp32 master copy of the weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertForPreTraining

from data_pipeline.stream import MicroBatch
from tests.support.batches import random_micro_batch, small_config, write_tokenizer
from tests.support.checkpoints import write_engine
from tests.support.distributed import run_distributed
from tests.support.paper_lamb import PaperLamb
from trainer.batch import tensor_batches
from trainer.config import RunConfig
from trainer.engine import Engine
from trainer.model import build_model
from trainer.objectives import LossWeights
from trainer.optimizers import parameter_groups
from trainer.schedule import learning_rate
from trainer.zero_state import consolidate

NUM_STEPS, MICRO_BATCHES = 3, 4
WEIGHT_DECAY = 5.0
"""Large, so that weights decayed once too often would show."""
TOLERANCE = {
    "fp32": [1e-4] * 4,
    # Relative error of what three steps changed; one step too many or too few would be 0.3. Stages 1 and 2 do the same operations as the
    # plain loop. Stage 0 adds the two gradients of the tied embedding in fp32 instead of bf16. Stage 3 replaces `linear` by a version
    # that lets go of gathered weights, and rounds once more before it adds the bias; AdamW magnifies that where gradients are small.
    "bf16": [1e-2, 1e-4, 1e-4, 1e-1],
}
CPU = torch.device("cpu")
Weights = dict[str, Tensor]


def config_of(stage: int, precision: str, kind: str = "adamw") -> RunConfig:
    optimizer = {"kind": kind, "lr": 1e-3, "weight_decay": WEIGHT_DECAY, "clip_norm": 1.0}
    return small_config(zero={"stage": stage}, precision=precision, optimizer=optimizer)


def batches_of(step: int) -> list[MicroBatch]:
    return [random_micro_batch(step * MICRO_BATCHES + place) for place in range(MICRO_BATCHES)]


def plain_loop(tokenizer: str, config: RunConfig) -> tuple[list[float], list[float], Weights]:
    """Losses, gradient norms and final master weights of NUM_STEPS steps on the whole batch, with stock transformers' forward pass."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    ours = build_model(config.model, tokenizer, seed=config.seed, sequence_length=24, device=CPU)
    model = BertForPreTraining(ours.config)
    model.load_state_dict(ours.state_dict())
    model = model.to(dtype)
    masters = {name: parameter.detach().float().requires_grad_() for name, parameter in model.named_parameters()}
    decayed = [master for master in masters.values() if master.ndim > 1]
    others = [master for master in masters.values() if master.ndim <= 1]
    settings: Any = {"betas": config.optimizer.betas, "eps": config.optimizer.eps, "lr": 0.0}
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY, **settings}, {"params": others, "weight_decay": 0.0, **settings}]
    optimizer = torch.optim.AdamW(groups) if config.optimizer.kind == "adamw" else PaperLamb([groups[0], groups[1] | {"trust_ratio": False}])
    losses: list[float] = []
    norms: list[float] = []
    for step in range(NUM_STEPS):
        batches = batches_of(step)
        num_masked, num_pairs = sum(b.num_masked for b in batches), sum(b.num_pairs for b in batches)
        losses.append(sum(backward(model, masters, batch, num_masked, num_pairs) for batch in batches))
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(masters.values()), config.optimizer.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer.lr, config.schedule, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
    return losses, norms, {name: master.detach() for name, master in masters.items()}


def backward(model: BertForPreTraining, masters: Weights, batch: MicroBatch, num_masked: int, num_pairs: int) -> float:
    """Add a micro-batch's gradients to the masters' in fp32; returns its share of the loss."""
    part = tensor_batches(batch)[0]
    labels = torch.full((part.input_ids_RT.numel(),), -100)
    labels[torch.from_numpy(batch.mlm_positions)] = torch.from_numpy(batch.mlm_labels)
    output = model(input_ids=part.input_ids_RT, token_type_ids=part.token_type_ids_RT, attention_mask=part.sample_ids_RT.sign())
    cross_entropy = torch.nn.functional.cross_entropy
    mlm = cross_entropy(output.prediction_logits.float().flatten(0, 1), labels, reduction="sum") / num_masked
    nsp = cross_entropy(output.seq_relationship_logits.float(), part.nsp_labels_B, reduction="sum") / num_pairs
    (mlm + nsp).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        masters[name].grad = gradient if masters[name].grad is None else masters[name].grad + gradient
        parameter.grad = None
    return (mlm + nsp).item()


def engine_loop(rank: int, world_size: int, tokenizer: str, folder: str, runs: list[tuple[int, str, str]]) -> list[tuple[list[float], list[float]]]:
    """Losses and gradient norms by run; the master weights are saved below `folder`."""
    results: list[tuple[list[float], list[float]]] = []
    for stage, precision, kind in runs:
        config = config_of(stage, precision, kind)
        model = build_model(config.model, tokenizer, seed=config.seed, sequence_length=24, device=CPU)
        engine = Engine.build(model, config)
        losses: list[float] = []
        norms: list[float] = []
        for step in range(NUM_STEPS):
            loss, norm = engine_step(engine, config, batches_of(step), step, rank, world_size)
            losses.append(loss)
            norms.append(norm)
        target = Path(folder) / f"{stage}-{precision}" / "zero"
        target.mkdir(parents=True, exist_ok=True)
        write_engine(engine, target)
        results.append((losses, norms))
    return results


def engine_step(engine: Engine, config: RunConfig, batches: list[MicroBatch], step: int, rank: int, world_size: int) -> tuple[float, float]:
    num_masked, num_pairs = sum(b.num_masked for b in batches), sum(b.num_pairs for b in batches)
    weights = LossWeights.for_step(num_masked=num_masked, num_pairs=num_pairs, world_size=world_size)
    share = np.array_split(np.arange(len(batches)), world_size)[rank]
    sums = torch.zeros(4, dtype=torch.float64)
    for place in share:
        sums += engine.accumulate(tensor_batches(batches[place])[0], weights, last=place == share[-1]).detached()
    torch.distributed.all_reduce(sums)
    outcome = engine.step(learning_rate(config.optimizer.lr, config.schedule, step))
    assert outcome.applied
    return float(sums[0] / num_masked + sums[1] / num_pairs), outcome.grad_norm


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize(("precision", "kind"), [("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "lamb"), ("bf16", "lamb")])
def test_all_stages_start_like_a_plain_loop(tokenizer: str, tmp_path: Path, precision: str, kind: str) -> None:
    torch.set_num_threads(1)
    losses, norms, weights = plain_loop(tokenizer, config_of(0, precision, kind))
    assert min(norms) > 1.0, "the test must see clipping"
    initial = plain_start(tokenizer, precision)
    found = run_distributed(engine_loop, 2, (tokenizer, str(tmp_path), [(stage, precision, kind) for stage in range(4)]), timeout_s=90)
    assert found[0] == found[1]
    for stage, (stage_losses, stage_norms) in enumerate(found[0]):
        tolerance = 1e-6 if precision == "fp32" else 1e-3
        assert stage_losses == pytest.approx(losses, rel=tolerance), f"stage {stage}"
        assert stage_norms == pytest.approx(norms, rel=10 * tolerance), f"stage {stage}"
        masters = consolidate(tmp_path / f"{stage}-{precision}" / "zero")
        for name, weight in weights.items():
            if name.endswith("key.bias"):
                continue  # softmax does not see it: its gradient is rounding noise, which AdamW blows up
            moved, expected = masters[name] - initial[name], weight - initial[name]
            error = float((moved - expected).norm() / expected.norm())
            assert error < TOLERANCE[precision][stage], f"stage {stage}, {name}: {error}"


def plain_start(tokenizer: str, precision: str) -> Weights:
    config = config_of(0, precision)
    model = build_model(config.model, tokenizer, seed=config.seed, sequence_length=24, device=CPU)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return {name: parameter.detach().to(dtype).float() for name, parameter in model.named_parameters()}


def test_biases_and_layer_norms_do_not_decay(tokenizer: str) -> None:
    config = config_of(0, "fp32")
    model = build_model(config.model, tokenizer, seed=0, sequence_length=24, device=CPU)
    decayed, others = parameter_groups(model, config.optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == WEIGHT_DECAY
    assert others["weight_decay"] == 0.0
    assert all(names[id(parameter)].endswith("weight") and "LayerNorm" not in names[id(parameter)] for parameter in decayed["params"])
    assert all(names[id(parameter)].endswith("bias") or "LayerNorm" in names[id(parameter)] for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)
