"""What a micro-batch takes of memory beside the model's state: what the forward pass keeps for the backward pass, and what that works with (pure).

What is kept is counted tensor by tensor, as autograd saves them; tests hold the sums against what it really saves. R rows of T places, N of them
predicted, are one pass: a micro-batch, or a part of it (`batch.split`).
"""

from dataclasses import dataclass

from trainer.dimensions import ALIGNED_ROWS, Dimensions
from trainer.tensors import NOTHING, Tensors

_FP32 = 4
_HIDDEN = {"bert": 8, "modernbert": 8, "gpt2": 8}
"""(R, T, D) tensors of a layer: its input, query, key, value, what attention gives, and those around two norms and the feed-forward part."""
_HIDDEN_MASKS = {"bert": 2, "modernbert": 1, "gpt2": 2}
"""Dropout masks among them."""
_INNER = {"bert": 2, "modernbert": 4, "gpt2": 5}
"""(R, T, inner) tensors: around the activation function; `gpt2` computes its own in steps."""
_INNER_MASKS = {"bert": 0, "modernbert": 1, "gpt2": 0}


@dataclass(frozen=True)
class Pass:
    """The shape of one pass."""

    num_rows: int
    width: int
    """Places of a row, padding included."""
    num_predicted: int
    """Of all rows together."""
    packed: bool
    """Whether rows hold several samples, each of which attends to itself."""

    @property
    def num_places(self) -> int:
        """R * T."""
        return self.num_rows * self.width


@dataclass(frozen=True)
class Kernels:
    """How the network is computed."""

    element_bytes: int
    """Of weights and activations: 2 in bf16 and fp16, 4 in fp32."""
    on_gpu: bool
    """There a dropout mask takes a byte an element; on a CPU it is an element."""
    checkpointing: bool
    """Layers keep their input only, and are computed once more in the backward pass."""
    attention: str
    """`eager`, or one kernel, which keeps no scores: `sdpa`, or on a GPU `varlen`, which takes no mask. On a CPU `sdpa` has none for dropout, and
    computes in steps all the same."""

    def keep_scores(self, dropout: float) -> bool:
        """Whether attention keeps its scores for the backward pass."""
        return self.attention == "eager" or not (self.on_gpu or dropout == 0)


def kept(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """All that the encoder's forward pass keeps."""
    return stored_layer(network, batch, kernels) * network.num_layers + kept_outside(network, batch, kernels)


def stored_layer(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """What a layer keeps until its turn in the backward pass: all, or its input where it is computed once more."""
    return _hidden(network, batch, kernels) if kernels.checkpointing else kept_layer(network, batch, kernels)


def kept_layer(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """What the backward pass of a layer needs."""
    kind = network.architecture
    tensors = _hidden(network, batch, kernels) * _HIDDEN[kind] + _inner(network, batch, kernels) * _INNER[kind]
    if network.dropout > 0:
        tensors += _mask(_hidden(network, batch, kernels), kernels) * _HIDDEN_MASKS[kind]
        tensors += _mask(_inner(network, batch, kernels), kernels) * _INNER_MASKS[kind]
    return tensors + _attention(network, batch, kernels) + _norm(batch) * 2


def kept_outside(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """What is kept outside of layers: around the embeddings and the last norm, and the masks of attention that layers are computed again with."""
    hidden, is_modern = _hidden(network, batch, kernels), network.architecture == "modernbert"
    # ModernBERT has a norm after its embeddings and one at the end, but none before its first attention.
    tensors = (hidden + _norm(batch)) * (2 if is_modern and kernels.checkpointing else 1)
    if network.dropout > 0:
        tensors += _mask(hidden, kernels)
    if is_modern:
        tensors += _angles(network, batch, kernels) * 4
    return tensors + _own_mask(network, batch, kernels) * ((2 if is_modern else 1) if kernels.checkpointing else 0)


def kept_by_head(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """What the head keeps, its logits included."""
    hidden = Tensors.of(batch.num_predicted * network.hidden_size * kernels.element_bytes, 1 if network.architecture == "gpt2" else 4)
    return hidden + logits(network, batch) + _aligned_projection(network, kernels)


def logits(network: Dimensions, batch: Pass) -> Tensors:
    """Logits over the vocabulary, in fp32, at the places that are predicted. The head keeps as much once, and its gradient takes it twice more."""
    return Tensors.of(batch.num_predicted * network.vocab_size * _FP32)


def _aligned_projection(network: Dimensions, kernels: Kernels) -> Tensors:
    """The copy of the projection to the vocabulary that `trainer.layers` computes with on a GPU, where its rows do not come out even."""
    missing = -network.vocab_size % ALIGNED_ROWS
    if not missing or not kernels.on_gpu or kernels.element_bytes == _FP32:
        return NOTHING
    return Tensors.of((network.vocab_size + missing) * network.hidden_size * kernels.element_bytes)


def work_of_layer(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """What the backward pass of a layer works with beside what was kept: gradients on either side of its feed-forward part."""
    gates = 2 if network.architecture == "modernbert" else 1
    return _hidden(network, batch, kernels) * 2 + _inner(network, batch, kernels) * (1 + gates)


def _hidden(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    return Tensors.of(batch.num_places * network.hidden_size * kernels.element_bytes)


def _inner(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    return Tensors.of(batch.num_places * network.inner_size * kernels.element_bytes)


def _mask(values: Tensors, kernels: Kernels) -> Tensors:
    """Dropout masks of some values."""
    share = 1 / kernels.element_bytes if kernels.on_gpu else 1.0
    return Tensors(tuple((size * share, number) for size, number in values))


def _attention(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """Scores, (R, heads, T, T): their softmax, and where there is dropout its mask and what it leaves. One kernel keeps a number a row of them, and
    ModernBERT's value as it gets it: a part of query, key and value in one tensor, of which plain products keep a copy."""
    rows = batch.num_places * network.num_heads
    if not kernels.keep_scores(network.dropout):
        whole = _hidden(network, batch, kernels) * (2 if network.architecture == "modernbert" else 0)
        mask = NOTHING if kernels.attention == "varlen" else _own_mask(network, batch, kernels)
        return Tensors.of(rows * _FP32) + mask + whole
    if kernels.attention == "sdpa" and kernels.element_bytes != _FP32:  # in steps on a CPU, which copies its inputs to fp32
        return Tensors.of(rows * batch.width * _FP32, 3) + _hidden(network, batch, kernels) * 3
    scores = Tensors.of(rows * batch.width * kernels.element_bytes)
    return scores * 2 + _mask(scores, kernels) if network.dropout > 0 else scores


def _own_mask(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """Which places attend to which, (R, T, T), or (R, T) in layers that see all of rows that hold one sample; the mean of the layers.

    GPUs' kernels make numbers of it for each layer."""
    near = sum(reach is not None for reach in network.reaches) / network.num_layers
    square = 1.0 if batch.packed or network.architecture == "gpt2" else near
    places = Tensors.of(batch.num_places * kernels.element_bytes)
    return places * (1 - square) + Tensors.of(batch.num_places * batch.width * kernels.element_bytes) * square


def _angles(network: Dimensions, batch: Pass, kernels: Kernels) -> Tensors:
    """Sines or cosines of the turns of query and key by their positions, which differ by row where rows hold several samples."""
    places = batch.num_places if batch.packed else batch.width
    return Tensors.of(places * network.hidden_size / network.num_heads * kernels.element_bytes)


def _norm(batch: Pass) -> Tensors:
    """Mean and deviation of each place."""
    return Tensors.of(batch.num_places * _FP32, 2)
