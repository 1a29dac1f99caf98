"""The network: `BertForPreTraining` of transformers with a forward pass that projects to the vocabulary only where tokens are masked.

Parameters keep their transformers names, so that exported weights load in stock transformers. Shape suffixes: B samples, R rows, T places
of a row, D hidden width, N masked positions, V vocabulary.
"""

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertForPreTraining, PreTrainedTokenizerBase

from data_pipeline.errors import ConfigError, MaskwrightError, NotFoundError, UnreachableError
from trainer.batch import TensorBatch
from trainer.config import ModelConfig
from trainer.objectives import LossSums, loss_sums


class PretrainingBert(BertForPreTraining):
    """BERT with both heads. Submodules are called as modules: under ZeRO-3 their hooks gather the parameters."""

    def forward(self, batch: TensorBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The fields of `LossSums`, as a plain tuple because DeepSpeed's hooks look for tensors in tuples.

        All parameters are in the graph whatever the batch holds. Never waits for the device.
        """
        one_each = len(batch.starts_B) == len(batch.input_ids_RT)
        # Positions that all rows share are added up in one sum, not token by token in 16 bits.
        position_ids = torch.arange(batch.input_ids_RT.shape[1], device=batch.input_ids_RT.device)[None] if one_each else batch.position_ids_RT
        attend_R1TT = within_samples(batch.sample_ids_RT, one_each=one_each)
        hidden_RTD = self._encode(batch.input_ids_RT, batch.token_type_ids_RT, position_ids, attend_R1TT).flatten(0, 1)
        first_B1D, masked_ND = hidden_RTD.index_select(0, batch.starts_B)[:, None], hidden_RTD.index_select(0, batch.mlm_positions_N)
        mlm_logits_NV, nsp_logits_B2 = self._heads(masked_ND, first_B1D)
        sums = loss_sums(mlm_logits_NV, batch.mlm_labels_N, nsp_logits_B2, batch.nsp_labels_B)
        return sums.mlm_loss, sums.nsp_loss, sums.mlm_correct, sums.nsp_correct

    def logits(self, input_ids_BT: Tensor, token_type_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 MLM logits (B, T, V) and NSP logits (B, 2) of a sample a row, for comparison with stock transformers."""
        position_ids_1T = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
        attend_B11T = within_samples(attention_mask_BT, one_each=True)
        hidden_BTD = self._encode(input_ids_BT, token_type_ids_BT, position_ids_1T, attend_B11T)
        mlm_logits, nsp_logits = self._heads(hidden_BTD, hidden_BTD)
        return mlm_logits.float(), nsp_logits.float()

    def _encode(self, input_ids_RT: Tensor, token_type_ids_RT: Tensor, position_ids_RT: Tensor, attend_R1TT: Tensor) -> Tensor:
        """`BertModel.forward`, which cannot take a mask of its own for each row and pools only the first place of one."""
        embedded_RTD = self.bert.embeddings(input_ids=input_ids_RT, token_type_ids=token_type_ids_RT, position_ids=position_ids_RT)
        if self.config._attn_implementation == "eager":  # pyright: ignore[reportPrivateUsage]  # it adds the mask to the scores
            lowest = torch.finfo(embedded_RTD.dtype).min
            attend_R1TT = torch.zeros_like(attend_R1TT, dtype=embedded_RTD.dtype).masked_fill(~attend_R1TT, lowest)
        return self.bert.encoder(embedded_RTD, attention_mask=attend_R1TT).last_hidden_state

    def _heads(self, hidden: Tensor, first_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """MLM logits of `hidden`, NSP logits of the first place of each of `first_BTD`."""
        return self.cls.predictions(hidden), self.cls.seq_relationship(cast(nn.Module, self.bert.pooler)(first_BTD))


def within_samples(sample_ids_RT: Tensor, *, one_each: bool) -> Tensor:
    """Which places attend to which: (R, 1, T, T), or (R, 1, 1, T) where each row holds one sample and padding.

    Padding attends to padding or to the row's sample, never to nothing: a softmax over nothing is not a number.
    """
    if one_each:
        return sample_ids_RT.bool()[:, None, None, :]
    return (sample_ids_RT[:, :, None] == sample_ids_RT[:, None, :])[:, None]


def as_loss_sums(output: tuple[Tensor, Tensor, Tensor, Tensor]) -> LossSums:
    """What `PretrainingBert.forward` returned."""
    return LossSums(*output)


def attention_implementation(device: torch.device) -> str:
    """Attention kernel by device: on a CPU, SDPA's bf16 kernel takes twice the time of plain matrix products."""
    return "sdpa" if device.type == "cuda" else "eager"


def build_model(
    config: ModelConfig, tokenizer_folder: str, *, seed: int, sequence_length: int, device: torch.device, reentrant_checkpointing: bool = False
) -> PretrainingBert:
    """The network in fp32 on the CPU, in training mode: initialised under `seed`, or with the weights of `init_from`.

    `sequence_length` is the longest row it will see. Leaves torch's random state as it was.

    Raises:
        ConfigError: `init_from` does not fit the tokenizer, the architecture or the sequence length.
        NotFoundError: `init_from` is not there.
        UnreachableError: the hub cannot be reached.
    """
    from data_pipeline.tokenizer import load_tokenizer, vocabulary_of

    tokenizer = load_tokenizer(tokenizer_folder)
    vocab_size = vocabulary_of(tokenizer).size  # not len(tokenizer): ids may have gaps
    attention = attention_implementation(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.init_from is None:
            model = PretrainingBert(_bert_config(config, vocab_size, cast(int, tokenizer.pad_token_id), attention))
        else:
            model = _load_weights(config, config.init_from, vocab_size, sequence_length, attention)
            require_same_vocabulary(config.init_from, tokenizer)
    if config.activation_checkpointing:
        # ZeRO-3 frees parameters after the forward pass; only the re-entrant kind gathers them again before it recomputes.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant_checkpointing})
    return model.train()


def _bert_config(config: ModelConfig, vocab_size: int, pad_token_id: int, attention: str) -> BertConfig:
    result = BertConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.intermediate_size or 4 * config.hidden_size,
        max_position_embeddings=config.max_positions,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        initializer_range=config.initializer_range,
        pad_token_id=pad_token_id,
    )
    result._attn_implementation = attention  # pyright: ignore[reportPrivateUsage]
    return result


def _load_weights(config: ModelConfig, source: str, vocab_size: int, sequence_length: int, attention: str) -> PretrainingBert:
    found = _read_config(source)
    if found.model_type != "bert":
        raise ConfigError(f"model.init_from {source} is a {found.model_type} model; expected bert", "Choose a BERT folder or hub id.")
    if found.vocab_size < vocab_size:  # more is padding, which GPUs like; `require_same_vocabulary` looks at the tokens
        raise ConfigError(
            f"model.init_from {source} has a vocabulary of {found.vocab_size}; the corpus' tokenizer has {vocab_size}",
            "Prepare the corpus with the model's own tokenizer: set tokenizer.path to the same folder or hub id.",
        )
    if found.max_position_embeddings < sequence_length:
        raise ConfigError(
            f"batch.sequence_length {sequence_length} exceeds the {found.max_position_embeddings} positions of model.init_from {source}",
            "Choose a shorter sequence_length.",
        )
    found.hidden_dropout_prob = found.attention_probs_dropout_prob = config.dropout
    try:
        return PretrainingBert.from_pretrained(
            source, config=found, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation=attention
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.init_from {source} holds no model.safetensors that can be read: {_first_line(error)}",
            "Weights are read from safetensors only; convert the model with save_pretrained(..., safe_serialization=True).",
        ) from error


def require_same_vocabulary(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that was trained on other tokens than `tokenizer`'s, however many. One that comes without a tokenizer cannot be told.

    Raises:
        ConfigError: a token has another id.
    """
    from data_pipeline.tokenizer import load_tokenizer

    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in ("tokenizer.json", "vocab.txt")):
        return  # transformers would make up a tokenizer of special tokens alone
    try:
        theirs = load_tokenizer(source).get_vocab()
    except MaskwrightError:
        return
    ours = tokenizer.get_vocab()
    different = [token for token, number in ours.items() if theirs.get(token) != number]
    if different:
        raise ConfigError(
            f"model.init_from {source} has another vocabulary than the corpus' tokenizer: {len(different)} of {len(ours)} tokens differ",
            "Prepare the corpus with the model's own tokenizer: set tokenizer.path to the same folder or hub id.",
        )


def _read_config(source: str) -> Any:
    if not Path(source).expanduser().exists() and _looks_like_a_path(source):
        raise NotFoundError(f"model.init_from {source} does not exist", "Check the path.")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or Path(source).expanduser().exists():
            cause = f"model.init_from {source} is not a model that transformers knows: {_first_line(error)}"
            raise ConfigError(cause, "It needs the config.json of a BERT model.") from error
        raise UnreachableError(
            f"model.init_from {source} is not a folder, and the hub did not deliver it: {_first_line(error)}",
            "Check the name and the network, or download the model and give its folder.",
        ) from error


def _looks_like_a_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.count("/") != 1


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
