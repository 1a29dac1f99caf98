"""What a forward pass keeps, against what autograd really saves."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, ModernBertConfig

from tests.support.batches import small_config
from trainer.activations import Kernels, Pass, kept, kept_by_head, kept_layer, stored_layer
from trainer.batch import TensorBatch, bounds_of
from trainer.dimensions import Dimensions
from trainer.layers import replace_dropout
from trainer.networks import PretrainingBert, PretrainingGPT2, PretrainingModernBert

ROWS, WIDTH, PREDICTED, VOCABULARY = 6, 64, 13, 509
SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
KERNELS = Kernels(element_bytes=4, on_gpu=False, checkpointing=False, attention="eager")


def network_of(architecture: str, dropout: float, *, checkpointing: bool, attention: str = "eager") -> Any:
    """A small one, on the CPU, as the trainer would have it."""
    if architecture == "bert":
        kind, config = PretrainingBert, BertConfig(**SIZES, intermediate_size=80, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    elif architecture == "modernbert":
        drops = {"attention_dropout": dropout, "embedding_dropout": dropout, "mlp_dropout": dropout}
        kind, config = PretrainingModernBert, ModernBertConfig(**SIZES, **SPECIAL, intermediate_size=80, max_position_embeddings=96, **drops)
    else:
        drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        kind, config = PretrainingGPT2, GPT2Config(**SIZES, bos_token_id=1, eos_token_id=2, n_inner=80, n_positions=96, **drops)
    network = kind(config).train()
    network.kernels = {"64": attention}
    replace_dropout(network)
    if checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    return network


def batch_of(*, packed: bool) -> TensorBatch:
    """Full rows of one sample, or of two."""
    ids = torch.randint(5, VOCABULARY, (ROWS, WIDTH))
    half = (torch.arange(WIDTH) // (WIDTH // 2))[None].expand(ROWS, WIDTH).contiguous()
    starts = torch.arange(ROWS) * WIDTH
    sample_ids = half + 1 if packed else torch.ones_like(ids)
    return TensorBatch(
        input_ids_RT=ids,
        token_type_ids_RT=torch.zeros_like(ids),
        position_ids_RT=torch.arange(WIDTH)[None].expand(ROWS, WIDTH).contiguous() - (half * (WIDTH // 2) if packed else 0),
        sample_ids_RT=sample_ids,
        starts_B=torch.cat([starts, starts + WIDTH // 2]) if packed else starts,
        mlm_positions_N=torch.arange(PREDICTED) * 7,
        mlm_labels_N=torch.randint(5, VOCABULARY, (PREDICTED,)),
        nsp_labels_B=torch.zeros(2 * ROWS if packed else ROWS, dtype=torch.int64),
        bounds_S=torch.from_numpy(bounds_of(sample_ids.numpy())),
    )


def saved_bytes(network: Any, batch: TensorBatch) -> int:
    """What autograd saves in a forward pass, weights and the batch itself left out."""
    others = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers(), *vars(batch).values())}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in others:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []  # or one would lie where another one was
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(batch)
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2"])
def test_the_forward_pass_keeps_what_autograd_saves(architecture: str, dropout: float, packed: bool, attention: str, dtype: torch.dtype) -> None:
    """On a CPU, where one kernel (`sdpa`) has none for dropout: there scores are kept all the same."""
    network = network_of(architecture, dropout, checkpointing=False, attention=attention).to(dtype)
    kernels = replace(KERNELS, attention=attention, element_bytes=dtype.itemsize)
    dimensions, batch = Dimensions.read(network.config.to_dict(), dropout), Pass(ROWS, WIDTH, PREDICTED, packed)
    found = (kept(dimensions, batch, kernels) + kept_by_head(dimensions, batch, kernels)).num_bytes
    assert found == pytest.approx(saved_bytes(network, batch_of(packed=packed)), rel=0.008)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_checkpointing_keeps_inputs_of_layers(architecture: str) -> None:
    """Of ModernBERT autograd does not see the masks that a layer is to be computed again with."""
    network = network_of(architecture, 0.1, checkpointing=True)
    dimensions, batch = Dimensions.read(network.config.to_dict(), 0.1), Pass(ROWS, WIDTH, PREDICTED, packed=True)
    kernels = replace(KERNELS, checkpointing=True)
    found = (kept(dimensions, batch, kernels) + kept_by_head(dimensions, batch, kernels)).num_bytes
    assert found == pytest.approx(saved_bytes(network, batch_of(packed=True)), rel=0.03)
    assert stored_layer(dimensions, batch, kernels).num_bytes < kept_layer(dimensions, batch, kernels).num_bytes / 8


def test_one_kernel_keeps_no_scores() -> None:
    """On a GPU what a layer keeps grows with the tokens, not with the square of the row's width."""
    dimensions = Dimensions.of(small_config().model, VOCABULARY)
    one, steps = (Kernels(element_bytes=2, on_gpu=True, checkpointing=False, attention=attention) for attention in ("sdpa", "eager"))
    batches = [Pass(num_rows, width, 10, packed=False) for num_rows, width in ((64, 128), (16, 512))]
    short, long = (kept_layer(dimensions, batch, one).num_bytes for batch in batches)
    assert short == long
    scores = [batch.num_places * dimensions.num_heads * batch.width for batch in batches]
    grown = [kept_layer(dimensions, batch, steps).num_bytes - kept_layer(dimensions, batch, one).num_bytes for batch in batches]
    assert grown[1] / grown[0] == pytest.approx(scores[1] / scores[0], rel=0.05), "plain products keep them on a GPU as well"


@pytest.mark.parametrize(("vocab_size", "copied"), [(30_522, 30_528), (30_528, 0)])
def test_a_vocabulary_that_is_no_multiple_is_projected_by_a_copy(vocab_size: int, copied: int) -> None:
    dimensions, batch = Dimensions.of(small_config().model, vocab_size), Pass(8, 64, 10, packed=False)
    on_gpu = Kernels(element_bytes=2, on_gpu=True, checkpointing=False, attention="sdpa")
    head, plain = (kept_by_head(dimensions, batch, kernels).num_bytes for kernels in (on_gpu, replace(on_gpu, on_gpu=False)))
    assert head - plain == copied * dimensions.hidden_size * 2
