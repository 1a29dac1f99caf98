"""Architectures other than BERT: the same losses as stock transformers, packed or padded, and clear words about what does not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from data_pipeline.errors import ConfigError
from data_pipeline.masking import Tokens, next_tokens
from data_pipeline.packing import LAYOUTS, Packing
from data_pipeline.stream import MicroBatch
from data_pipeline.window import Finished
from tests.support.batches import EMPTY, SPECIAL, VOCAB_SIZE, random_micro_batch, small_config, write_tokenizer
from trainer.batch import tensor_batches
from trainer.classifier import build_classifier
from trainer.config import ModelConfig
from trainer.export import without_end
from trainer.model import build_model, require_buildable
from trainer.networks import PretrainingNetwork, as_loss_sums, buffers_kept
from trainer.objectives import LossWeights

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_heads": 2, "max_positions": 64, "dropout": 0.0}
ARCHITECTURES = ["modernbert", "gpt2", "roberta", "distilbert", "electra"]
WINDOWED: dict[str, Any] = {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    write_tokenizer(folder)
    return folder


def build(tokenizer: str, architecture: str, **changes: Any) -> PretrainingNetwork:
    settings = {"transformers": WINDOWED} if architecture == "modernbert" else {}
    config = ModelConfig.model_validate(SMALL | {"architecture": architecture} | settings | changes)
    return build_model(config, tokenizer, seed=3, sequence_length=32, device=CPU)


def causal(number: int, packing: Packing = "none") -> MicroBatch:
    """Random samples whose next tokens are to be predicted."""
    masked = random_micro_batch(number, num_samples=12, num_tokens=32, masks=False, pairs=False)
    lengths, ids = masked.samples.lengths, masked.samples.token_ids
    positions, labels = next_tokens(Tokens(ids, lengths, lengths, np.arange(len(lengths), dtype=np.uint64)))
    samples = Finished(ids, lengths, lengths, positions, labels, masked.samples.nsp_labels)
    return MicroBatch(number, samples, LAYOUTS[packing](lengths, 32), SPECIAL["pad"])


def batch_for(network: PretrainingNetwork, packing: Packing = "none") -> MicroBatch:
    if network.is_causal:
        return causal(5, packing)
    return random_micro_batch(5, num_samples=12, num_tokens=32, pairs=False, packing=packing)


def loss_and_gradients(network: PretrainingNetwork, batch: MicroBatch, parts: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    weights = LossWeights.for_step(num_masked=batch.num_masked, num_pairs=batch.num_pairs, world_size=1)
    network.zero_grad()
    total = 0.0
    for part in tensor_batches(batch, parts):
        loss = weights.loss(as_loss_sums(network(part)))
        loss.backward()
        total += loss.item()
    return total, gradients(network)


def gradients(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.grad is not None}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_transformers(tokenizer: str, architecture: str) -> None:
    network = build(tokenizer, architecture)
    batch = batch_for(network)
    ours, our_gradients = loss_and_gradients(network, batch)

    stock = network.stock(network.config)
    stock.load_state_dict(network.state_dict())
    part = tensor_batches(batch)[0]
    logits = stock(input_ids=part.input_ids_RT, attention_mask=part.sample_ids_RT.sign()).logits.flatten(0, 1)
    loss = nn.functional.cross_entropy(logits[part.mlm_positions_N], part.mlm_labels_N)
    loss.backward()
    assert ours == pytest.approx(loss.item(), rel=1e-6)
    assert_close(our_gradients, gradients(stock))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["modernbert", "gpt2"])
def test_packed_and_padded_rows_give_the_same_losses_and_gradients(tokenizer: str, architecture: str, attention: str) -> None:
    network = build(tokenizer, architecture)
    network.kernels = {"512": attention}
    padded, packed = (batch_for(network, packing) for packing in ("none", "rows"))
    assert packed.layout.num_rows < padded.layout.num_rows
    expected, expected_gradients = loss_and_gradients(network, padded)
    for parts in (1, 2):
        found, found_gradients = loss_and_gradients(network, packed, parts)
        assert found == pytest.approx(expected, rel=1e-6)
        assert_close(found_gradients, expected_gradients)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_every_parameter_a_gradient_of_zero(tokenizer: str, architecture: str, dtype: torch.dtype) -> None:
    network = build(tokenizer, architecture).to(dtype)
    loss, found = loss_and_gradients(network, EMPTY)
    assert loss == 0.0
    assert found.keys() == dict(network.named_parameters()).keys()
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("architecture", ["bert", "esm", *ARCHITECTURES])
def test_a_projection_to_more_tokens_than_there_are_changes_nothing(tokenizer: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is computed on a GPU. ESM adds a bias of its own to the logits."""
    network = build(tokenizer, architecture)
    batch = tensor_batches(batch_for(network))[0]
    found: list[tuple[float, float, dict[str, torch.Tensor]]] = []
    for aligned in (False, True):
        monkeypatch.setattr("trainer.layers._is_for_tensor_cores", lambda values, aligned=aligned: aligned)
        network.zero_grad()
        mlm_loss, _, mlm_correct, _ = network(batch)
        mlm_loss.backward()
        gradients = {name: each.grad.clone() for name, each in network.named_parameters() if each.grad is not None}
        found.append((mlm_loss.item(), mlm_correct.item(), gradients))
    (loss, correct, gradients), (others_loss, others_correct, others) = found
    assert (others_loss, others_correct) == (pytest.approx(loss, rel=1e-6), correct)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    ids_BT = torch.full((2, 8), 7)
    assert network.logits(ids_BT, torch.zeros_like(ids_BT), torch.ones_like(ids_BT))["mlm_logits"].shape == (2, 8, VOCAB_SIZE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers_where_weights_are_large(tokenizer: str, architecture: str) -> None:
    """As in a trained network: what attends to what then shows."""
    network: Any = build(tokenizer, architecture, initializer_range=0.5).eval()
    stock = network.stock(network.config).eval()
    stock.load_state_dict(network.state_dict())
    part = tensor_batches(batch_for(network))[0]
    mask_BT = part.sample_ids_RT.sign()
    with torch.no_grad():
        ours = network.logits(part.input_ids_RT, torch.zeros_like(mask_BT), mask_BT)["mlm_logits"]
        theirs = stock(input_ids=part.input_ids_RT, attention_mask=mask_BT).logits
    torch.testing.assert_close(ours[mask_BT.bool()], theirs[mask_BT.bool()], rtol=1e-4, atol=1e-4)


def test_a_token_does_not_see_those_after_it(tokenizer: str) -> None:
    network = build(tokenizer, "gpt2").eval()
    ids_BT = torch.randint(5, VOCAB_SIZE, (1, 16), generator=torch.Generator().manual_seed(0))
    changed_BT = ids_BT.clone()
    changed_BT[0, 9:] = 7
    first, second = (network.logits(ids, torch.zeros_like(ids), torch.ones_like(ids))["mlm_logits"] for ids in (ids_BT, changed_BT))
    torch.testing.assert_close(first[:, :9], second[:, :9])
    assert not torch.allclose(first[:, 9:], second[:, 9:])


def test_dimensions_dropout_and_special_tokens_reach_the_network(tokenizer: str) -> None:
    gpt2 = build(tokenizer, "gpt2", dropout=0.25).config
    assert (gpt2.n_embd, gpt2.n_layer, gpt2.n_head, gpt2.n_positions, gpt2.n_inner) == (32, 2, 2, 64, 128)
    assert (gpt2.resid_pdrop, gpt2.embd_pdrop, gpt2.attn_pdrop) == (0.25, 0.25, 0.25)
    assert (gpt2.bos_token_id, gpt2.eos_token_id, gpt2.pad_token_id) == (SPECIAL["cls"], SPECIAL["sep"], SPECIAL["pad"])
    modern = build(tokenizer, "modernbert").config
    assert (modern.intermediate_size, modern.local_attention, modern.pad_token_id) == (48, 8, SPECIAL["pad"])
    assert build(tokenizer, "roberta").config.max_position_embeddings == 64 + SPECIAL["pad"] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "robberta"}, "robberta"),
        ({"architecture": "llama"}, "no masked language model of that name"),
        ({"architecture": "gpt2", "transformers": {"activation_functoin": "relu"}}, "nearest: activation_function"),
        ({"architecture": "gpt2", "transformers": {"n_inner": 12}}, "n_inner is derived"),
        ({"architecture": "gpt2", "transformers": {"n_embd": 12}}, "n_embd is derived"),
        ({"architecture": "gpt2", "transformers": {"to_dict": 1}}, "gpt2 has no such setting"),
        ({"architecture": "bert", "transformers": {"vocab_size": 12}}, "vocab_size is derived"),
        ({"architecture": "electra", "max_positions": 24}, "a row of 32 tokens does not pass through electra"),
    ],
)
def test_what_does_not_fit_is_refused(tokenizer: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tokenizer, **changes)


@pytest.mark.parametrize("architecture", ["gpt2", "roberta"])
def test_init_from_continues_a_model_of_the_architecture(tokenizer: str, tmp_path: Path, architecture: str) -> None:
    network: Any = build(tokenizer, architecture)
    stock = network.stock(network.config)
    stock.load_state_dict(network.state_dict())
    stock.save_pretrained(tmp_path)
    loaded = build(tokenizer, architecture, init_from=str(tmp_path), dropout=0.5)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=0, atol=0)
    assert (loaded.config.resid_pdrop if architecture == "gpt2" else loaded.config.hidden_dropout_prob) == 0.5
    with pytest.raises(ConfigError, match=f"is a {architecture} model; expected bert"):
        build(tokenizer, "bert", init_from=str(tmp_path))


def test_a_model_without_a_padding_token_is_given_one(tokenizer: str, tmp_path: Path) -> None:
    stock: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, n_embd=32, n_layer=1, n_head=2, n_positions=64))
    assert stock.config.pad_token_id is None
    stock.save_pretrained(tmp_path)
    write_tokenizer(str(tmp_path))
    assert build(tokenizer, "gpt2", init_from=str(tmp_path)).config.pad_token_id == SPECIAL["pad"]
    classifier = build_classifier(str(tmp_path), ["no", "yes"], "pretrained", seed=0)
    assert classifier(input_ids=torch.full((2, 8), 7)).logits.shape == (2, 2)


def test_what_cannot_be_built_is_refused_before_text_is_prepared(tmp_path: Path) -> None:
    require_buildable(small_config())
    for model, message in [({"architecture": "robberta"}, "robberta"), ({"architecture": "modernbert", "transformers": {"x": 1}}, "no such setting")]:
        with pytest.raises(ConfigError, match=message):
            require_buildable(small_config(model=model, objective={"sentence_objective": "none"}))
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"<e>": 0, "a": 1}, [])), bos_token="<e>", eos_token="<e>").save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="has no mask token"):
        require_buildable(small_config(tokenizer={"path": str(tmp_path)}))
    require_buildable(small_config(tokenizer={"path": str(tmp_path)}, objective="clm", model={"architecture": "gpt2"}))


def test_a_text_that_is_to_be_continued_has_no_end() -> None:
    start, text, end = {"SpecialToken": {"id": "[CLS]"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "[SEP]"}}
    template = {"type": "TemplateProcessing", "single": [start, text, end], "pair": [start, text, end, text, end], "special_tokens": {}}
    found = without_end({"version": "1.0", "post_processor": template})
    assert found["post_processor"] == template | {"single": [start, text], "pair": [start, text, end, text]}
    for other in ({"post_processor": None}, {"post_processor": {"type": "ByteLevel"}}, found):
        assert without_end(other) == other


def test_casting_weights_spares_the_frequencies_of_positions(tokenizer: str) -> None:
    network = build(tokenizer, "modernbert")
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with buffers_kept(network):
        network.bfloat16()
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert any("inv_freq" in name for name in before)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
