"""Attention kernels: which rows get which, what is measured, and networks that switch between them."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.bert import modeling_bert

from data_pipeline.errors import ConfigError
from tests.support.batches import random_micro_batch, small_config, write_tokenizer
from trainer.attention import KERNELS, Shape, faster, fastest_kernels, kernel_for, mask_of, measured, shape_of, table_in_words, usual_kernel
from trainer.batch import bounds_of, tensor_batches
from trainer.choices import possible_kernels
from trainer.config import RunConfig
from trainer.model import build_model
from trainer.networks import PretrainingNetwork

CPU = torch.device("cpu")
OF_A_CPU = ["eager", "sdpa"]
PHASES = {"sequence_length": 32, "phases": [{"from_step": 10, "sequence_length": 64}]}


def network_of(folder: Any, **model: Any) -> tuple[RunConfig, PretrainingNetwork]:
    write_tokenizer(str(folder))
    base, pairs = small_config(), {} if model.get("architecture", "bert") == "bert" else {"objective": {"sentence_objective": "none"}}
    batch = base.batch.model_dump() | PHASES
    config = small_config(model=base.model.model_dump() | {"attention": "auto"} | model, batch=batch, **pairs)
    return config, build_model(config.model, str(folder), seed=3, sequence_length=64, device=CPU)


def test_rows_get_the_kernel_of_the_shortest_that_are_as_long() -> None:
    table = {"1024": "c", "128": "a", "512": "b"}
    assert [kernel_for(table, length) for length in (1, 128, 129, 512, 513, 1024, 2000)] == ["a", "a", "b", "b", "c", "c", "c"]
    assert table_in_words(table) == "a up to 128 tokens, b up to 512 tokens, c up to 1024 tokens"
    assert table_in_words({"128": "a", "512": "a"}) == "a"


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"eager": 1.0, "sdpa": 0.5}, "sdpa"),
        ({"eager": 1.0, "sdpa": 0.95}, "eager"),  # noise
        ({"eager": 1.0, "sdpa": 2.0}, "eager"),
    ],
)
def test_another_kernel_than_the_usual_one_must_gain(seconds: dict[str, float], chosen: str) -> None:
    assert faster(seconds, "eager") == chosen


def test_a_run_has_a_kernel_for_each_of_its_lengths(tmp_path: Any) -> None:
    config, network = network_of(tmp_path)
    found = fastest_kernels(config, network.config, network.candidate_kernels(), CPU)
    assert found.keys() == {"32", "64"}
    assert set(found.values()) <= set(OF_A_CPU)
    assert fastest_kernels(config, None, ["eager"], CPU) == {"32": "eager", "64": "eager"}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kernel_is_measured_and_random_numbers_stay(packed: bool, is_causal: bool) -> None:
    before = torch.get_rng_state()
    shape = Shape(rows=2, heads=2, length=24, head_width=8, packed=packed, is_causal=is_causal, dtype=torch.float32, dropout=0.1)
    seconds = measured(OF_A_CPU, shape, CPU)
    assert list(seconds) == OF_A_CPU
    assert all(0 < spent < 10 for spent in seconds.values())
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_measured_has_the_shape_of_the_run_and_is_bounded(tmp_path: Any) -> None:
    config, network = network_of(tmp_path)
    assert shape_of(config, network.config, 32, CPU) == Shape(4, 2, 32, 16, packed=False, is_causal=False, dtype=torch.float32, dropout=0.0)
    large = shape_of(config, network.config, 2048, CPU)
    assert (large.rows, large.length) == (1, 2048)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta"])
def test_a_network_switches_by_the_length_of_rows(tmp_path: Any, architecture: str) -> None:
    _, network = network_of(tmp_path, architecture=architecture)
    short, long = (tensor_batches(random_micro_batch(1, num_tokens=length, pairs=False))[0] for length in (24, 64))
    expected = [network(batch)[0].item() for batch in (short, long)]
    network.kernels = {"32": "sdpa", "64": "eager"}
    for batch, kernel, loss in zip((short, long, short), ("sdpa", "eager", "sdpa"), (*expected, expected[0]), strict=True):
        assert network(batch)[0].item() == pytest.approx(loss, rel=1e-5)
        assert network.config._attn_implementation == (kernel if architecture == "roberta" else f"maskwright_{kernel}")


@pytest.mark.parametrize("kernel", OF_A_CPU)
@pytest.mark.parametrize("packing", ["none", "rows"])
def test_dropout_follows_the_seed_in_both_kernels_of_a_cpu(tmp_path: Any, packing: Any, kernel: str) -> None:
    _, network = network_of(tmp_path, dropout=0.3)
    network.kernels = {"64": kernel}
    batch = tensor_batches(random_micro_batch(1, num_samples=8, num_tokens=32, packing=packing))[0]

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return network(batch)[0].item()

    assert loss(5) == loss(5) != loss(6)
    network.eval()
    assert loss(5) == loss(6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_plain_products_compute_what_bert_s_own_do(packed: bool, dtype: torch.dtype) -> None:
    """But for dropout, which falls elsewhere."""
    query, key, value = (torch.randn(3, 2, 24, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    samples = 1 + torch.arange(24) // 9
    attend = (samples[:, None] == samples)[None, None] if packed else (samples < 3)[None, None, None]
    layer: Any = torch.nn.Identity()
    found, expected = (
        forward(layer, query, key, value, mask_of("eager")(attend, dtype), scaling=0.3)[0]  # pyright: ignore[reportOptionalCall]
        for forward in (KERNELS["eager"].forward, modeling_bert.eager_attention_forward)
    )
    assert torch.equal(found, expected)
    for ours, theirs in zip(*(torch.autograd.grad(each.float().square().sum(), (query, key, value)) for each in (found, expected)), strict=True):
        assert torch.equal(ours, theirs)


def test_a_kernel_that_the_architecture_lacks_is_refused(tmp_path: Any) -> None:
    _, network = network_of(tmp_path, architecture="deberta-v2")
    assert network.candidate_kernels() == ["eager"]
    with pytest.raises(ConfigError, match="deberta-v2 has no such attention"):
        network.require_kernel("sdpa")
    for name in ("auto", "eager"):
        network.require_kernel(name)


def test_plain_products_are_usual_on_a_cpu_and_sdpa_on_a_gpu() -> None:
    assert (usual_kernel(CPU), usual_kernel(torch.device("cuda"))) == ("eager", "sdpa")
    assert usual_kernel(torch.device("cuda"), ["eager"]) == "eager", "of an architecture that has no other"


def test_a_kernel_that_does_not_fit_into_memory_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def short_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(KERNELS, "eager", replace(KERNELS["eager"], forward=short_of_memory))
    shape = Shape(rows=2, heads=2, length=24, head_width=8, packed=False, is_causal=False, dtype=torch.float32, dropout=0.1)
    seconds = measured(["eager", "sdpa"], shape, CPU)
    assert seconds["eager"] == math.inf
    assert faster(seconds, "eager") == "sdpa"


def test_bounds_are_where_samples_and_padding_begin() -> None:
    """Equal numbers side by side in two rows are two samples; padding between samples or at the end stands for itself."""
    packed = np.array([[1, 1, 2, 2, 0], [3, 0, 0, 4, 4], [4, 4, 4, 4, 4]])
    assert bounds_of(packed).tolist() == [0, 2, 4, 5, 6, 8, 10, 15]
    assert bounds_of(np.ones((2, 3), np.int64)).tolist() == [0, 3, 6]
    for batch in (random_micro_batch(2), random_micro_batch(2, packing="rows")):
        whole, bounds = tensor_batches(batch)[0], tensor_batches(batch)[0].bounds_S
        pieces = [set(piece.tolist()) for piece in whole.sample_ids_RT.flatten().tensor_split(bounds[1:-1].tolist())]
        assert all(len(piece) == 1 for piece in pieces)
        assert set(whole.starts_B.tolist()) <= set(bounds.tolist())


def test_a_kernel_for_gpus_is_no_candidate_elsewhere(tmp_path: Any) -> None:
    _, network = network_of(tmp_path)
    assert network.candidate_kernels() == OF_A_CPU
    with pytest.raises(ConfigError, match=r"no such attention on this device"):
        network.require_kernel("varlen")


def test_a_kernel_that_was_chosen_elsewhere_gives_way_to_the_usual_one() -> None:
    """As on the CPUs of a run that was begun on GPUs."""
    assert possible_kernels({"128": "sdpa", "512": "varlen"}, OF_A_CPU, "eager") == {"128": "sdpa", "512": "eager"}
