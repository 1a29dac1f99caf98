"""The pure parts of the loop: counters, cadences, refusals, records."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig

from data_pipeline.errors import ConfigError, DataCorruptError
from data_pipeline.index import CorpusIndex
from data_pipeline.mixture import Mixture
from data_pipeline.prepare import Prepared
from data_pipeline.storage import Location
from tests.support.batches import small_config, write_tokenizer
from trainer.engine import Engine, StepOutcome
from trainer.metrics import finite
from trainer.networks import PretrainingBert
from trainer.passes import dropout_seed
from trainer.pretrain import MAX_SKIPPED_STEPS, advanced, is_due, phase_of, require_own_tokenizer, stopped_at
from trainer.refusals import require_same_data, require_same_position
from trainer.runlog import RunFolder
from trainer.state import TrainState
from trainer.totals import StepCounts

NAN = float("nan")


def test_an_overflowed_step_counts_and_is_remembered() -> None:
    state = TrainState(step=7, micro_batches_consumed=28, tokens_seen=100)
    counts = StepCounts(tokens=50)
    applied = advanced(state, StepOutcome(1.0, applied=True), counts, 4, (2.5,))
    skipped = advanced(state, StepOutcome(NAN, applied=False), counts, 4, (2.5,))
    assert (applied.step, applied.micro_batches_consumed, applied.tokens_seen, applied.skipped_steps) == (8, 32, 150, ())
    assert (applied.recent_losses, skipped.recent_losses) == ((2.5,), ())
    assert (skipped.step, skipped.micro_batches_consumed, skipped.tokens_seen, skipped.skipped_steps) == (8, 32, 150, (7,))


def test_the_list_of_skipped_steps_is_bounded() -> None:
    state = TrainState()
    for _ in range(MAX_SKIPPED_STEPS + 5):
        state = advanced(state, StepOutcome(NAN, applied=False), StepCounts(), 1, ())
    assert len(state.skipped_steps) == MAX_SKIPPED_STEPS
    assert state.skipped_steps[-1] == MAX_SKIPPED_STEPS + 4


def test_cadence_includes_the_last_step() -> None:
    config = small_config()
    assert [step for step in range(1, 21) if is_due(step, 6, config)] == [6, 12, 18, 20]


def test_a_stop_says_what_is_saved() -> None:
    assert stopped_at(3).cause == "stopped at step 3 on request; it is saved"
    assert stopped_at(0).cause == "stopped on request before the first step; there was nothing to save"


@pytest.mark.parametrize(("step", "consumed"), [(0, 0), (3, 12), (5, 20), (7, 36), (20, 140)])
def test_a_checkpoint_at_another_data_position_is_refused(step: int, consumed: int) -> None:
    batch = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 24, "phases": [{"from_step": 5, "global_batch_size": 32}]}
    phases = small_config(batch=batch).phases
    require_same_position(TrainState(step=step, micro_batches_consumed=consumed), phases)
    with pytest.raises(ConfigError, match=f"step {step} has consumed {consumed + 1} micro-batches; by this configuration, {consumed}\n"):
        require_same_position(TrainState(step=step, micro_batches_consumed=consumed + 1), phases)


def test_phases_govern_from_their_first_step() -> None:
    batch = {"global_batch_size": 16, "micro_batch_size": 4, "sequence_length": 24, "phases": [{"from_step": 5, "sequence_length": 48}]}
    phases = small_config(batch=batch).phases
    assert [phase_of(phases, step).sequence_length for step in (0, 4, 5, 19)] == [24, 24, 48, 48]


@pytest.mark.parametrize("field", ["corpus_fingerprint", "tokenizer_digest"])
def test_other_data_is_refused(field: str) -> None:
    now = TrainState(corpus_fingerprint="a" * 64, tokenizer_digest="b" * 64)
    require_same_data(now, now)
    with pytest.raises(ConfigError, match="cccccccccccc"):
        require_same_data(TrainState(**{"corpus_fingerprint": "a" * 64, "tokenizer_digest": "b" * 64, field: "c" * 64}), now)


def test_dropout_seeds_differ_by_everything_that_they_depend_on() -> None:
    seeds = {dropout_seed(seed, number, piece) for seed in range(3) for number in range(50) for piece in range(4)}
    assert len(seeds) == 3 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_records_are_json() -> None:
    values = finite({"nsp_loss": NAN, "grad_norm": float("inf"), "loss": 1.5, "step": 3})
    assert json.loads(json.dumps(values, allow_nan=False)) == {"nsp_loss": None, "grad_norm": None, "loss": 1.5, "step": 3}


def test_fp16_without_a_gpu_is_refused_with_a_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    model = PretrainingBert(BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ConfigError) as caught:
        Engine.build(model, small_config(precision="fp16"))
    assert "bf16" in caught.value.remedy


def test_a_tokenizer_that_does_not_match_the_corpus_is_refused(tiny_corpus: Prepared, tmp_path: Path) -> None:
    require_own_tokenizer(Mixture.open(tiny_corpus.folder))
    copy = tmp_path / "corpus"
    shutil.copytree(tiny_corpus.folder.path, copy)
    shutil.rmtree(copy / "tokenizer")
    write_tokenizer(str(copy / "tokenizer"))
    with pytest.raises(DataCorruptError, match=r"tokenizer does not match the corpus: it has 97 tokens"):
        require_own_tokenizer(Mixture.of(replace(CorpusIndex.open(tiny_corpus.folder), folder=Location.at(copy))))


def test_a_record_cut_by_a_full_disk_does_not_stop_the_next_attempt(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path))
    run.append_metrics({"step": 0, "attempt": 1, "loss": 1.0})
    run.append_event("started", attempt=1)
    for path in (run.metrics.path, run.events.path):
        with path.open("a") as file:
            file.write('{"step": 1, "lo')
    run.append_metrics({"step": 1, "attempt": 2, "loss": 0.5})
    run.append_event("resumed", attempt=2)
    assert [record["loss"] for record in run.read_metrics()] == [1.0, 0.5]
    assert [event["kind"] for event in run.read_events()] == ["started", "resumed"]


def test_what_a_superseded_attempt_writes_late_does_not_count(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path))
    for attempt in (1, 2, 1):
        run.append_metrics({"step": 0, "attempt": attempt})
    assert [record["attempt"] for record in run.read_metrics()] == [2]
