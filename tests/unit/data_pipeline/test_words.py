"""Which tokens continue a word, for each way in which tokenizers mark it."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data_pipeline.errors import ConfigError
from data_pipeline.words import continues_word

TEXT = ["the unbelievable transformation of international organisations, transformed internationally"] * 20


def _trained(model: Any, trainer: Any, pre_tokenizer: Any) -> Tokenizer:
    tokenizer: Any = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


WORDPIECE = _trained(
    models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(vocab_size=60, special_tokens=["[UNK]"]), pre_tokenizers.BertPreTokenizer()
)
BYTE_LEVEL = _trained(
    models.BPE(), trainers.BpeTrainer(vocab_size=60), pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])
)
METASPACE = _trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=60), pre_tokenizers.Metaspace())


@pytest.mark.parametrize("tokenizer", [WORDPIECE, BYTE_LEVEL, METASPACE], ids=["WordPiece", "byte-level BPE", "Metaspace"])
def test_words_are_put_together_again(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode("the transformation of unbelievable organisations")
    continues = continues_word(tokenizer.to_str().encode(), 200)[np.array(encoded.ids)]
    words = ["".join(group) for group in np.split(encoded.tokens, np.flatnonzero(~continues)[1:])]
    clean = [word.replace("##", "").strip("Ġ▁") for word in words]
    assert clean == ["the", "transformation", "of", "unbelievable", "organisations"]
    assert continues.any()


def test_a_tokenizer_without_marks_is_refused() -> None:
    plain = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    definition = json.loads(plain.to_str())
    definition["model"].pop("continuing_subword_prefix", None)
    with pytest.raises(ConfigError, match="does not mark where words start"):
        continues_word(json.dumps(definition).encode(), 2)
