"""What may change when a run is continued."""

import shlex

import pytest

from data_pipeline.errors import ConfigError
from launcher.config import override_run_config
from launcher.continuation import changes, resolve_diff
from trainer.config import RunConfig

BASE = RunConfig(name="a")


def changed(*overrides: str) -> RunConfig:
    return override_run_config(BASE, overrides)


@pytest.mark.parametrize(
    "override",
    [
        *("zero.stage=3", "model.attention=sdpa", "model.compile=true"),
        *("zero.stage=3", "zero.offload_optimizer=cpu", "zero.bucket_elements=7", "zero.overlap=true"),
        "batch.split=2",
        "batch.loader_workers=1",
        "checkpoint.every_steps=7",
        "validation.micro_batches=3",
        "finetune.num_seeds=1",
        "storage=x",
    ],
)
def test_free_changes(override: str) -> None:
    (change,) = resolve_diff(BASE, changed(override), deliberate=False)
    assert str(change.path) == override.partition("=")[0]


@pytest.mark.parametrize(
    "override",
    [
        *("optimizer.lr=1e-3", "optimizer.eps=1e-8", "optimizer.weight_decay=0", "optimizer.clip_norm=2"),
        *("schedule.steps=2000000", "schedule.kind=cosine"),
    ],
)
def test_deliberate_changes_name_the_command(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_diff(BASE, changed(override), deliberate=False)
    assert f"maskwright resume a --set {override.partition('=')[0]}=" in caught.value.remedy
    assert resolve_diff(BASE, changed(override), deliberate=True)


def test_a_stable_run_is_made_longer_and_decays() -> None:
    stable = override_run_config(BASE, ("schedule.kind=wsd", "schedule.decay_steps=0"))
    longer = override_run_config(stable, ("schedule.steps=1100000", "schedule.decay_steps=100000"))
    assert [change.path for change in resolve_diff(stable, longer, deliberate=True)] == ["schedule.decay_steps", "schedule.steps"]


def test_the_command_that_is_named_can_be_pasted() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_diff(BASE, changed("optimizer.betas=[0.8, 0.9]", "schedule.kind=cosine"), deliberate=False)
    words = shlex.split(caught.value.remedy.partition(": ")[2])
    assert words == ["maskwright", "resume", "a", "--set", "optimizer.betas=[0.8, 0.9]", "--set", "schedule.kind=cosine"]
    assert override_run_config(BASE, words[4::2]) == changed("optimizer.betas=[0.8, 0.9]", "schedule.kind=cosine")


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "corpus.source=other.txt",
        "tokenizer.vocab_size=1000",
        "model.num_layers=3",
        "objective.mask_rate=0.3",
        "batch.micro_batch_size=16",
        "batch.global_batch_size=512",
        "optimizer.kind=lamb",
    ],
)
@pytest.mark.parametrize("deliberate", [True, False])
def test_refused_changes(override: str, deliberate: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_diff(BASE, changed(override), deliberate=deliberate)
    assert override.partition("=")[0] in caught.value.cause


def test_a_precision_may_be_left_to_the_run_and_not_changed() -> None:
    chosen = changed("precision=bf16")
    assert [change.path for change in resolve_diff(chosen, BASE, deliberate=False)] == ["precision"]
    assert [change.path for change in resolve_diff(BASE, chosen, deliberate=False)] == ["precision"]
    with pytest.raises(ConfigError, match="precision: 'bf16' -> 'fp32'"):
        resolve_diff(chosen, changed("precision=fp32"), deliberate=True)


def test_all_refusals_are_listed_and_nothing_changed_is_nothing() -> None:
    assert changes(BASE, BASE) == []
    with pytest.raises(ConfigError, match=r"mask_rate.*seed"):
        resolve_diff(BASE, changed("seed=1", "objective.mask_rate=0.3", "zero.stage=2"), deliberate=False)


@pytest.mark.parametrize(("steps_done", "setting"), [(300, "schedule.steps=100"), (100, "optimizer.lr=2e-3"), (100, "schedule.final_ratio=0.5")])
def test_what_no_step_would_follow_is_refused(steps_done: int, setting: str) -> None:
    base = changed("schedule.steps=100", "schedule.warmup_steps=10")
    given = override_run_config(base, [setting])
    before = override_run_config(base, [f"schedule.steps={steps_done}"])
    with pytest.raises(ConfigError, match=f"has taken {steps_done} steps already") as error:
        resolve_diff(before, given, deliberate=True, steps_done=steps_done)
    assert f"schedule.steps={2 * steps_done}" in error.value.remedy
    assert resolve_diff(before, override_run_config(before, [setting, "schedule.steps=400"]), deliberate=True, steps_done=steps_done)
    assert resolve_diff(base, override_run_config(base, ["finetune.epochs=7"]), deliberate=True, steps_done=100)
