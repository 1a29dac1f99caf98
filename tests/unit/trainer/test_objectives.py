"""Losses, their weights and the network's forward pass, against transformers' own."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForPreTraining

from data_pipeline.errors import ConfigError, NotFoundError, UnreachableError
from data_pipeline.stream import MicroBatch
from tests.support.batches import EMPTY, VOCAB_SIZE, random_micro_batch, small_config, write_tokenizer
from trainer.batch import TensorBatch, tensor_batches
from trainer.config import ModelConfig
from trainer.model import build_model
from trainer.networks import PretrainingBert, as_loss_sums
from trainer.objectives import IGNORED, LossWeights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def model(tokenizer: str) -> PretrainingBert:
    return build(tokenizer)


def build(tokenizer: str, seed: int = 3, **changes: object) -> PretrainingBert:
    config = ModelConfig.model_validate(small_config().model.model_dump() | changes)
    return build_model(config, tokenizer, seed=seed, sequence_length=24, device=CPU)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def weighted_loss(model: PretrainingBert, batch: MicroBatch, parts: int = 1) -> float:
    """Forward and backward of a step that consists of `batch` alone."""
    weights = LossWeights.for_step(num_masked=batch.num_masked, num_pairs=batch.num_pairs, world_size=1)
    model.zero_grad()
    total = 0.0
    for part in tensor_batches(batch, parts):
        loss = weights.loss(as_loss_sums(model(part)))
        loss.backward()
        total += loss.item()
    return total


def test_loss_and_gradients_are_those_of_transformers(model: PretrainingBert) -> None:
    batch = random_micro_batch(1, num_samples=6)
    ours = weighted_loss(model, batch)
    our_gradients = gradients(model)

    stock = BertForPreTraining(model.config)
    stock.load_state_dict(model.state_dict())
    labels = torch.full((batch.layout.num_places,), -100)
    labels[torch.from_numpy(batch.mlm_positions)] = torch.from_numpy(batch.mlm_labels)
    part = tensor_batches(batch)[0]
    theirs = stock(
        input_ids=part.input_ids_RT,
        token_type_ids=part.token_type_ids_RT,
        attention_mask=part.sample_ids_RT.sign(),
        labels=labels.view(part.input_ids_RT.shape),
        next_sentence_label=part.nsp_labels_B,
    )
    theirs.loss.backward()
    assert ours == pytest.approx(theirs.loss.item(), rel=1e-6)
    their_gradients = gradients(stock)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_padded_rows_give_the_same_losses_and_gradients(model: PretrainingBert, attention: str, parts: int) -> None:
    """Twelve samples in fewer rows: a sample sees itself only, its positions start at 0, its own [CLS] gives its sentence prediction."""
    model.kernels = {"512": attention}
    padded, packed = (random_micro_batch(5, num_samples=12, num_tokens=32, packing=packing) for packing in ("none", "rows"))
    assert packed.layout.num_rows < padded.layout.num_rows
    expected, expected_gradients = weighted_loss(model, padded), gradients(model)
    assert weighted_loss(model, packed, parts) == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    for sums in zip(*(as_loss_sums(model(tensor_batches(batch)[0])).detached() for batch in (padded, packed)), strict=True):
        torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-5)


def test_correct_predictions_are_counted(model: PretrainingBert) -> None:
    batch = random_micro_batch(2, num_samples=8)
    part = tensor_batches(batch)[0]
    sums = as_loss_sums(model(part))
    mlm, nsp = model.logits(part.input_ids_RT, part.token_type_ids_RT, part.sample_ids_RT.sign()).values()
    guesses = mlm.flatten(0, 1)[part.mlm_positions_N].argmax(-1)
    assert int(sums.mlm_correct) == int((guesses == part.mlm_labels_N).sum())
    assert int(sums.nsp_correct) == sum(int(guess == label) for guess, label in zip(nsp.argmax(-1), part.nsp_labels_B, strict=True))


@pytest.mark.parametrize("parts", [2, 3, 6, 9])
def test_a_batch_computed_in_parts_is_the_same_batch(model: PretrainingBert, parts: int) -> None:
    batch = random_micro_batch(3, num_samples=6)
    whole, whole_gradients = weighted_loss(model, batch), gradients(model)
    assert len(tensor_batches(batch, parts)) == parts
    assert weighted_loss(model, batch, parts) == pytest.approx(whole, rel=1e-6)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, whole_gradients[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "batch",
    [EMPTY, random_micro_batch(4, masks=False), random_micro_batch(4, pairs=False), random_micro_batch(4, masks=False, pairs=False)],
    ids=["empty", "no masks", "no pairs", "neither"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(model: PretrainingBert, batch: MicroBatch, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    loss = weighted_loss(model, batch)
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    if batch.num_masked + batch.num_pairs == 0:
        assert loss == 0.0
        assert all(not gradient.any() for gradient in found.values())


def test_loss_is_computed_in_fp32_under_bf16(model: PretrainingBert) -> None:
    loss = as_loss_sums(model.to(torch.bfloat16)(tensor_batches(random_micro_batch(5))[0])).mlm_loss
    assert loss.dtype == torch.float32
    assert loss.item() != loss.bfloat16().float().item()


def test_a_seed_makes_the_weights_and_leaves_the_random_state_alone(tokenizer: str) -> None:
    before = torch.get_rng_state()
    first, again, other = build(tokenizer), build(tokenizer), build(tokenizer, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    assert first.cls.predictions.decoder.weight is first.bert.embeddings.word_embeddings.weight
    assert first.config.vocab_size == VOCAB_SIZE


def test_activation_checkpointing_changes_memory_only(tokenizer: str) -> None:
    plain, checkpointed = build(tokenizer, dropout=0.1), build(tokenizer, dropout=0.1, activation_checkpointing=True)
    assert checkpointed.is_gradient_checkpointing
    losses: list[float] = []
    for model in (plain, checkpointed):
        torch.manual_seed(11)
        losses.append(weighted_loss(model, random_micro_batch(6)))
    assert losses[0] == losses[1]
    for name, gradient in gradients(checkpointed).items():
        torch.testing.assert_close(gradient, gradients(plain)[name])


def masked_lm_folder(model: PretrainingBert, folder: Path) -> str:
    masked_lm = BertForMaskedLM(model.config)
    masked_lm.load_state_dict(model.state_dict(), strict=False)
    masked_lm.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["pretraining", "masked_lm"])
def test_init_from_loads_weights(model: PretrainingBert, tokenizer: str, tmp_path: Path, kind: str) -> None:
    if kind == "pretraining":
        model.save_pretrained(tmp_path / "model")
    else:
        masked_lm_folder(model, tmp_path / "model")
    loaded = build(tokenizer, seed=9, init_from=str(tmp_path / "model"), dropout=0.25)
    assert loaded.training
    assert loaded.config.hidden_dropout_prob == 0.25
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, value in model.state_dict().items():
        expected_equal = kind == "pretraining" or not ("pooler" in name or "seq_relationship" in name)
        if expected_equal:
            assert torch.equal(loaded.state_dict()[name], value), name
    again = build(tokenizer, seed=9, init_from=str(tmp_path / "model"), dropout=0.25)
    assert torch.equal(again.bert.pooler.dense.weight, loaded.bert.pooler.dense.weight)  # new heads come from the seed


def test_init_from_refuses_what_does_not_fit(model: PretrainingBert, tokenizer: str, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        build(tokenizer, init_from=str(tmp_path / "nowhere"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="not a model that transformers knows"):
        build(tokenizer, init_from=str(tmp_path / "nothing"))
    model.config.vocab_size = 50
    PretrainingBert(model.config).save_pretrained(tmp_path / "small")
    with pytest.raises(ConfigError, match=f"vocabulary of 50; the corpus' tokenizer has {VOCAB_SIZE}"):
        build(tokenizer, init_from=str(tmp_path / "small"))


def test_init_from_a_hub_that_does_not_answer(tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match="hub did not deliver"):
        build(tokenizer, init_from="nobody/nothing-of-that-name")


def test_init_from_reads_no_pickles(model: PretrainingBert, tokenizer: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        build(tokenizer, init_from=str(tmp_path / "model"))


def test_parts_keep_every_sample_and_label() -> None:
    batch = random_micro_batch(7, num_samples=5)
    parts: list[TensorBatch] = tensor_batches(batch, 3)
    assert torch.equal(torch.cat([part.input_ids_RT for part in parts]), torch.from_numpy(batch.input_ids))
    assert torch.equal(torch.cat([part.nsp_labels_B for part in parts]), torch.from_numpy(batch.nsp_labels))
    labels_N = torch.cat([part.mlm_labels_N for part in parts])
    assert torch.equal(labels_N[labels_N != IGNORED], torch.from_numpy(batch.mlm_labels))
    assert torch.equal(torch.cat([part.sample_ids_RT.sign().sum(1) for part in parts]), torch.from_numpy(batch.lengths))
    for part in parts:
        masked_N = part.mlm_positions_N[part.mlm_labels_N != IGNORED]
        assert bool((part.input_ids_RT.flatten()[masked_N] == 4).all())


@pytest.mark.parametrize("num_parts", [1, 3, 9])
def test_masked_positions_come_in_multiples_that_a_cpu_has_kernels_for(num_parts: int) -> None:
    """Parts without a mask, or without a row, have some, too."""
    sizes = {len(part.mlm_positions_N) for seed in range(8) for part in tensor_batches(random_micro_batch(seed, num_samples=5), num_parts)}
    assert {size % 16 for size in sizes} == {0}
    assert 0 not in sizes
    assert len(sizes) <= 3


def test_init_from_another_vocabulary_of_the_same_size_is_refused(model: PretrainingBert, tokenizer: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    write_tokenizer(str(tmp_path / "model"))
    build(tokenizer, init_from=str(tmp_path / "model"))
    definition = tmp_path / "model" / "tokenizer.json"
    definition.write_text(definition.read_text().replace('"w50"', '"other"'))
    with pytest.raises(ConfigError, match=f"another vocabulary than the corpus' tokenizer: 1 of {VOCAB_SIZE} tokens differ") as caught:
        build(tokenizer, init_from=str(tmp_path / "model"))
    assert "tokenizer.path" in caught.value.remedy


def test_the_network_has_a_row_for_every_id_although_ids_have_a_gap(tokenizer: str, tmp_path: Path) -> None:
    shutil.copytree(tokenizer, tmp_path / "gap")
    definition = tmp_path / "gap" / "tokenizer.json"
    definition.write_text(re.sub(rf'"w{VOCAB_SIZE - 1}": {VOCAB_SIZE - 1}\b', f'"w{VOCAB_SIZE - 1}": {VOCAB_SIZE + 2}', definition.read_text()))
    assert build(str(tmp_path / "gap")).config.vocab_size == VOCAB_SIZE + 3


def test_init_from_a_padded_vocabulary_is_taken_as_it_is(model: PretrainingBert, tokenizer: str, tmp_path: Path) -> None:
    model.config.vocab_size = 104
    PretrainingBert(model.config).save_pretrained(tmp_path / "padded")
    assert build(tokenizer, init_from=str(tmp_path / "padded")).config.vocab_size == 104
    write_tokenizer(str(tmp_path / "padded"))
    assert build(tokenizer, init_from=str(tmp_path / "padded")).bert.embeddings.word_embeddings.weight.shape[0] == 104


def test_init_from_damaged_weights_is_refused(model: PretrainingBert, tokenizer: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"no model\.safetensors that can be read"):
        build(tokenizer, init_from=str(tmp_path / "model"))
