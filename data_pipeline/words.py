"""Which tokens of a tokenizer continue the word before them: what whole-word and span masking need (pure)."""

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import ConfigError

_WORD_STARTS = {"ByteLevel": ("Ġ", "Ċ", "ĉ"), "Metaspace": ("▁",)}


def continues_word(definition: bytes, size: int) -> NDArray[np.bool_]:
    """For each id below `size`, whether its token continues a word, from the bytes of a tokenizer.json.

    WordPiece marks continuations with a prefix (`##`); byte-level BPE and Metaspace mark the start of a word by the space before it.

    Raises:
        ConfigError: the tokenizer marks neither.
    """
    tokenizer: dict[str, Any] = json.loads(definition)
    model: dict[str, Any] = tokenizer["model"]
    vocabulary: dict[str, int] = _vocabulary(model)
    prefix, starts = model.get("continuing_subword_prefix"), _start_marks(tokenizer)
    if prefix:
        continuations = [number for token, number in vocabulary.items() if token.startswith(prefix)]
    elif starts:
        continuations = [number for token, number in vocabulary.items() if not token.startswith(starts)]
    else:
        raise ConfigError(
            f"the corpus' tokenizer ({model.get('type')}) does not mark where words start, so words and spans cannot be masked whole",
            "Set objective.mask_unit to token, or choose a WordPiece, byte-level BPE or SentencePiece tokenizer.",
        )
    result = np.zeros(size, dtype=np.bool_)
    result[continuations] = True
    return result


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    stored = model["vocab"]
    return stored if isinstance(stored, dict) else {token: number for number, (token, _) in enumerate(stored)}


def _start_marks(tokenizer: dict[str, Any]) -> tuple[str, ...]:
    outer: dict[str, Any] = tokenizer.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = [outer, *outer.get("pretokenizers", [])]
    return tuple(mark for part in parts for mark in _WORD_STARTS.get(str(part.get("type")), ()))
