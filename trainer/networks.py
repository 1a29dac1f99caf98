"""The networks: classes of transformers that compute losses from a `TensorBatch`, and project to the vocabulary only where something is predicted.

Parameters keep their transformers names, so that exported weights load in stock transformers. Shape suffixes: B samples, R rows, T places
of a row, D hidden width, N places to predict, V vocabulary.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, BertForPreTraining, GPT2LMHeadModel, ModernBertForMaskedLM

from data_pipeline.errors import ConfigError
from trainer.attention import head_width, kernel_for, mask_of, registered, varlen_runs
from trainer.batch import TensorBatch, bounds_of
from trainer.known_architectures import why_unknown
from trainer.objectives import LossSums, loss_sums

PAIR_CLASSES = 2


@dataclass(frozen=True)
class Rows:
    """What the encoder reads, each (R, T)."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    """(R, T), or (1, T) where all rows share them: their gradients are then added up in one sum, not token by token in 16 bits."""
    sample_ids: Tensor
    """1, 2, … for samples, 0 for padding."""
    one_each: bool
    """Whether every row holds one sample, and padding after it."""
    bounds_S: Tensor
    """Where samples and padding begin, as `trainer.batch.bounds_of` says."""

    @classmethod
    def of(cls, batch: TensorBatch) -> "Rows":
        """The rows of a micro-batch."""
        one_each = len(batch.starts_B) == len(batch.input_ids_RT)
        positions = _counting(batch.input_ids_RT) if one_each else batch.position_ids_RT
        return cls(batch.input_ids_RT, batch.token_type_ids_RT, positions, batch.sample_ids_RT, one_each, batch.bounds_S)

    @classmethod
    def padded(cls, input_ids_BT: Tensor, token_type_ids_BT: Tensor, attention_mask_BT: Tensor) -> "Rows":
        """A sample a row, as a tokenizer of transformers gives them."""
        bounds_S = torch.from_numpy(bounds_of(attention_mask_BT.numpy(force=True))).to(input_ids_BT.device)
        return cls(input_ids_BT, token_type_ids_BT, _counting(input_ids_BT), attention_mask_BT, one_each=True, bounds_S=bounds_S)

    @property
    def attend(self) -> Tensor:
        """Which places attend to which: (R, 1, T, T), or (R, 1, 1, T) where each row holds one sample and padding.

        Padding attends to padding or to the row's sample, never to nothing: a softmax over nothing is not a number.
        """
        if self.one_each:
            return self.sample_ids.bool()[:, None, None, :]
        return (self.sample_ids[:, :, None] == self.sample_ids[:, None, :])[:, None]


class PretrainingNetwork(nn.Module):
    """What the trainer asks of a network: a mix-in before a class of transformers. Submodules are called as modules: under ZeRO-3 their hooks
    gather the parameters."""

    stock: ClassVar[Any]
    """The class of transformers that reads the exported weights."""
    has_pair_head: ClassVar[bool] = False
    """Whether it says how two segments belong together."""
    takes_token_types: ClassVar[bool] = False
    """Whether it is told which segment a token is of."""
    is_causal: ClassVar[bool] = False
    """Whether a token attends to those before it only."""
    takes_bounds: ClassVar[bool] = False
    """Whether its layers hand the mask to the attention kernel as it is, so that it may be the bounds of samples."""
    sum_losses: Callable[[Tensor, Tensor, Tensor, Tensor], LossSums] = staticmethod(loss_sums)
    """Logits and labels of tokens, then those of pairs; on a GPU `trainer.compiling` puts a compiled one here."""
    kernels: Mapping[str, str] = {}
    """Attention kernels by row length, see `trainer.attention.Table`; empty for the one that the network was built with."""
    config: Any
    _supports_sdpa: bool

    def forward(self, batch: TensorBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of `LossSums`, as a plain tuple because DeepSpeed's hooks look for tensors in tuples.

        All parameters are in the graph whatever the batch holds. Never waits for the device (`PretrainingMaskedLM` may).
        """
        hidden_RTD = self._hidden(Rows.of(batch)).flatten(0, 1)
        first_B1D, chosen_ND = hidden_RTD.index_select(0, batch.starts_B)[:, None], hidden_RTD.index_select(0, batch.mlm_positions_N)
        token_logits_NV, pair_logits_B2 = self._token_logits(chosen_ND), self._pair_logits(first_B1D)
        sums = self.sum_losses(token_logits_NV, batch.mlm_labels_N, pair_logits_B2, batch.nsp_labels_B)
        return sums.mlm_loss, sums.nsp_loss, sums.mlm_correct, sums.nsp_correct

    def logits(self, input_ids_BT: Tensor, token_type_ids_BT: Tensor, attention_mask_BT: Tensor) -> dict[str, Tensor]:
        """In fp32, `mlm_logits` (B, T, V) and, where there is a head for pairs, `nsp_logits` (B, 2) of a sample a row."""
        hidden_BTD = self._hidden(Rows.padded(input_ids_BT, token_type_ids_BT, attention_mask_BT))
        found = {"mlm_logits": self._token_logits(hidden_BTD)[..., : self.config.vocab_size].float()}
        return found | {"nsp_logits": self._pair_logits(hidden_BTD).float()} if self.has_pair_head else found

    def candidate_kernels(self) -> list[str]:
        """Attention kernels that the architecture has on its device in its precision."""
        weight = next(self.parameters())
        has_varlen = self.takes_bounds and varlen_runs(weight.device, weight.dtype, head_width(self.config))
        return [name for name, has in (("eager", True), ("sdpa", self._supports_sdpa), ("varlen", has_varlen)) if has]

    def require_kernel(self, name: str) -> None:
        """Refuse an attention kernel that the architecture lacks; `auto` chooses among those that it has.

        Raises:
            ConfigError: it has none of that name.
        """
        if name not in ("auto", *self.candidate_kernels()):
            raise ConfigError(
                f"model.attention {name}: {self.config.model_type} has no such attention on this device in this precision",
                f"Set model.attention to auto or {' or '.join(self.candidate_kernels())}.",
            )

    def _hidden(self, rows: Rows) -> Tensor:
        """(R, T, D), with the kernel for rows of this length, which transformers looks up in each forward pass."""
        if self.kernels:
            kernel = kernel_for(self.kernels, rows.input_ids.shape[1])
            upcasts = kernel == "eager" and getattr(self.config, "reorder_and_upcast_attn", False)  # a GPT-2 that has a kernel of its own
            self.config._attn_implementation = registered(kernel) if self.takes_bounds and not upcasts else kernel
        return self._encode(rows)

    def _encode(self, rows: Rows) -> Tensor:
        """(R, T, D)"""
        raise NotImplementedError

    def _token_logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, V), or more, see `trainer.layers.AlignedLinear`"""
        raise NotImplementedError

    def _pair_logits(self, first_BTD: Tensor) -> Tensor:
        """(B, 2), from the first place of each of `first_BTD`; zeros where there is no such head."""
        return first_BTD.new_zeros(len(first_BTD), PAIR_CLASSES)

    def _as_mask(self, rows: Rows, attend: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
        """Which places attend to which, as the attention kernel takes it; what it does not need is not computed."""
        mask = mask_of(self.config._attn_implementation)
        return rows.bounds_S[None, None, None] if mask is None else mask(attend(), dtype)


class PretrainingBert(PretrainingNetwork, BertForPreTraining):  # pyright: ignore[reportIncompatibleMethodOverride]
    """BERT with both heads (Devlin et al. 2019)."""

    stock = BertForPreTraining
    has_pair_head = True
    takes_token_types = True
    takes_bounds = True

    def _encode(self, rows: Rows) -> Tensor:
        """`BertModel.forward`, which cannot take a mask of its own for each row and pools only the first place of one."""
        embedded_RTD = self.bert.embeddings(input_ids=rows.input_ids, token_type_ids=rows.token_type_ids, position_ids=rows.position_ids)
        return self.bert.encoder(embedded_RTD, attention_mask=self._as_mask(rows, lambda: rows.attend, embedded_RTD.dtype)).last_hidden_state

    def _token_logits(self, hidden: Tensor) -> Tensor:
        return self.cls.predictions(hidden)

    def _pair_logits(self, first_BTD: Tensor) -> Tensor:
        return self.cls.seq_relationship(cast(nn.Module, self.bert.pooler)(first_BTD))


class PretrainingModernBert(PretrainingNetwork, ModernBertForMaskedLM):  # pyright: ignore[reportIncompatibleMethodOverride]
    """ModernBERT (Warner et al. 2024): rotary positions, and layers that attend to a window alone."""

    stock = ModernBertForMaskedLM
    takes_bounds = True

    def _encode(self, rows: Rows) -> Tensor:
        dtype = self.model.embeddings.tok_embeddings.weight.dtype
        attends = {"full_attention": lambda: rows.attend, "sliding_attention": lambda: self._near(rows)}
        masks: Any = {kind: self._as_mask(rows, attend, dtype) for kind, attend in attends.items()}
        return self.model(input_ids=rows.input_ids, attention_mask=masks, position_ids=rows.position_ids).last_hidden_state

    def _near(self, rows: Rows) -> Tensor:
        """(R, 1, T, T): `Rows.attend` within the window of a layer."""
        places_T = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
        distance_TT = (places_T[:, None] - places_T[None, :]).abs()
        near = rows.attend & (distance_TT <= self.config.sliding_window)
        return near | ((distance_TT == 0) & ~near.any(-1, keepdim=True))  # padding far behind its row's sample, see `Rows.attend`

    def _token_logits(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.head(hidden))


class PretrainingGPT2(PretrainingNetwork, GPT2LMHeadModel):  # pyright: ignore[reportIncompatibleMethodOverride]
    """GPT-2 (Radford et al. 2019), which predicts the next token."""

    stock = GPT2LMHeadModel
    is_causal = True
    takes_bounds = True

    def _encode(self, rows: Rows) -> Tensor:
        num_places = rows.input_ids.shape[1]

        def earlier() -> Tensor:
            return rows.attend & torch.ones(num_places, num_places, dtype=torch.bool, device=rows.input_ids.device).tril()

        mask = self._as_mask(rows, earlier, self.transformer.wte.weight.dtype)
        return self.transformer(input_ids=rows.input_ids, attention_mask=mask, position_ids=rows.position_ids, use_cache=False).last_hidden_state

    def _token_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class PretrainingMaskedLM(PretrainingNetwork):
    """Any other masked language model, a sample a row, through its own forward pass: it projects to the vocabulary everywhere."""

    def _encode(self, rows: Rows) -> Tensor:
        """(R, T, V): the head is a part of the stock forward pass."""
        if not rows.one_each:
            raise ConfigError(f"{self.config.model_type} cannot keep the samples of a row apart", "Set batch.packing to none.")
        return self.stock.forward(self, input_ids=rows.input_ids, attention_mask=rows.sample_ids.bool().long()).logits

    def _token_logits(self, hidden: Tensor) -> Tensor:
        return hidden


_NETWORKS: dict[str, type[PretrainingNetwork]] = {
    "bert": PretrainingBert,
    "modernbert": PretrainingModernBert,
    "gpt2": PretrainingGPT2,
}


@cache
def network_class(architecture: str) -> Any:
    """The class of an architecture's networks, by the `model_type` of transformers.

    Raises:
        ConfigError: transformers has no masked language model of that name.
    """
    if architecture in _NETWORKS:
        return _NETWORKS[architecture]
    problem = why_unknown(architecture)
    if problem is not None:
        raise ConfigError(problem, "Correct model.architecture.")
    mapping: Any = AutoModelForMaskedLM._model_mapping  # pyright: ignore[reportPrivateUsage]  # there is no public way from a name to a class
    stock = mapping[type(AutoConfig.for_model(architecture))]
    return type(f"Pretraining{stock.__name__}", (PretrainingMaskedLM, stock), {"stock": stock})


def as_loss_sums(output: tuple[Tensor, Tensor, Tensor, Tensor]) -> LossSums:
    """What `PretrainingNetwork.forward` returned."""
    return LossSums(*output)


@contextmanager
def buffers_kept(network: nn.Module) -> Generator[None]:
    """Give the network's floating-point buffers back the values that they had: who casts weights to 16 bits casts them too, and the frequencies of
    rotary positions do not bear it."""
    before = {name: buffer.clone() for name, buffer in network.named_buffers() if buffer.is_floating_point()}
    yield
    for name, buffer in before.items():
        owner, _, attribute = name.rpartition(".")
        module = network.get_submodule(owner)
        setattr(module, attribute, buffer.to(getattr(module, attribute).device))


def _counting(ids_RT: Tensor) -> Tensor:
    return torch.arange(ids_RT.shape[1], device=ids_RT.device)[None]
