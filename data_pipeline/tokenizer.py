"""The tokenizer: trained (WordPiece, the same in every process) or loaded; its digest and its vocabulary."""

import hashlib
import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import ConfigError, MaskwrightError, NotFoundError, too_few_documents
from data_pipeline.masking import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ROLES = ("pad", "unk", "cls", "sep", "mask")
_STAND_INS = {"cls": "bos", "sep": "eos", "pad": "eos", "unk": "eos"}
"""What takes the place of a special token in tokenizers that are made for causal models, as GPT-2's: a text lies between begin and end."""
_ALPHABET = 1000
_COUNTED_DOCUMENTS = 64
_MIN_COUNT = 2
_PLACEHOLDER = re.compile(r"\[unused\d+\]")


def load_tokenizer(folder: str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a folder or the Hugging Face hub; never runs code that comes with it.

    Raises:
        NotFoundError: no such folder or hub id.
        ConfigError: it is damaged, lacks a special token and what could stand in for it, or has no fast implementation.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises bare Exception
        raise _not_loaded(folder, error) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"the tokenizer {folder} has no fast implementation", "Choose one with a tokenizer.json.")
    for role, stand_in in _STAND_INS.items():
        if getattr(tokenizer, f"{role}_token_id") is None:
            setattr(tokenizer, f"{role}_token", getattr(tokenizer, f"{stand_in}_token"))
    missing = [f"{role}_token" for role in _STAND_INS if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise ConfigError(f"the tokenizer {folder} has no {', '.join(missing)}", "Choose a tokenizer made for language models.")
    return tokenizer


def _not_loaded(folder: str, error: Exception) -> MaskwrightError:
    if isinstance(error, (OSError, ValueError)) and not (Path(folder) / "tokenizer.json").exists():
        where = "found no tokenizer in it" if Path(folder).is_dir() else "there is no such folder, and the hub did not supply it"
        return NotFoundError(f"cannot load the tokenizer {folder}: {where}", "Check tokenizer.path, and the network for a hub id.")
    reason = str(error).strip().partition("\n")[0]
    return ConfigError(f"the tokenizer {folder} is damaged: {reason}", "Restore its files from a copy, or choose another tokenizer.path.")


def tokenizer_digest(folder: str) -> str:
    """SHA-256 over what decides a text's token ids: the fast tokenizer's definition and its special tokens."""
    return loaded_digest(load_tokenizer(folder))


def loaded_digest(tokenizer: "PreTrainedTokenizerFast") -> str:
    """See `tokenizer_digest`."""
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("padding", "truncation"):  # of the last call, not of the tokenizer
        definition.pop(setting, None)
    return hashlib.sha256(json.dumps([definition, special], sort_keys=True).encode()).hexdigest()


def vocabulary_of(tokenizer: "PreTrainedTokenizerFast") -> Vocabulary:
    """The ids that masking needs. Placeholders such as `[unused7]` are not ordinary tokens, and gaps are never drawn."""
    tokens: dict[str, int] = tokenizer.get_vocab()
    special = {int(number) for number in tokenizer.all_special_ids}
    ordinary = sorted(number for token, number in tokens.items() if number not in special and not _PLACEHOLDER.fullmatch(token))
    roles: dict[str, Any] = {role: getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    return Vocabulary(size=max(tokens.values()) + 1, ordinary_ranges=_ranges(ordinary), **roles)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train WordPiece with BERT's normalisation on `texts`; the same texts give the same tokenizer in every process.

    `texts` is walked through twice and never held.

    The library numbers the characters in the order of a randomly seeded hash map, which then decides ties between merges. Giving it the
    alphabet as special tokens, in a fixed order, takes that freedom away; the tokenizer returned is built afresh from the vocabulary.

    Raises:
        ConfigError: there is no text, or vocab_size is too small for its alphabet.
    """
    shape = _untrained(models.WordPiece(unk_token="[UNK]"), config)
    initial, inner = _alphabet(texts, shape)
    if not initial:
        raise too_few_documents()
    fixed = [*SPECIAL_TOKENS, *initial, *(f"##{character}" for character in inner)]
    if len(fixed) >= config.vocab_size:
        raise ConfigError(
            f"tokenizer.vocab_size {config.vocab_size} does not exceed the {len(fixed)} special tokens and characters of this corpus",
            f"Set tokenizer.vocab_size to {2 * len(fixed)} or more.",
        )
    trainer = trainers.WordPieceTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=config.vocab_size,
        min_frequency=_MIN_COUNT,
        show_progress=False,
        special_tokens=fixed,
        initial_alphabet=initial,
        limit_alphabet=len(initial),
    )
    shape.train_from_iterator(texts, trainer)
    vocabulary: dict[str, int] = json.loads(shape.to_str())["model"]["vocab"]
    return _untrained(models.WordPiece(vocabulary, unk_token="[UNK]"), config)


def write_tokenizer(tokenizer: Tokenizer, config: TokenizerConfig, folder: Path) -> None:
    """Write a trained tokenizer as a folder that transformers loads. Written by hand: no transformers version shows in the bytes."""
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": config.lowercase,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": token for role, token in zip(_ROLES, SPECIAL_TOKENS, strict=True)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _untrained(model: models.WordPiece, config: TokenizerConfig) -> Tokenizer:
    tokenizer = Tokenizer(model)
    settings: Any = tokenizer
    settings.normalizer = normalizers.BertNormalizer(lowercase=config.lowercase, strip_accents=None)
    settings.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    settings.decoder = decoders.WordPiece(prefix="##")
    number = {token: nth for nth, token in enumerate(SPECIAL_TOKENS)}
    settings.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", number["[CLS]"]), ("[SEP]", number["[SEP]"])],
    )
    if model.token_to_id("[PAD]") is not None:
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _alphabet(texts: Iterable[str], shape: Tokenizer) -> tuple[list[str], list[str]]:
    """The most frequent characters of the normalised texts, sorted: all of them, and those that can stand inside a word."""
    normalizer: Any = shape.normalizer
    raw = _character_counts(texts)
    counts: Counter[str] = Counter()
    for code in np.flatnonzero(raw).tolist():  # the normaliser works on single characters: no need to run it on the whole text
        character, count = chr(code), int(raw[code])
        for normalised in normalizer.normalize_str(character).strip():
            counts[normalised] += count
    characters = [character for character in counts if not character.isspace()]
    kept = sorted(sorted(characters, key=lambda character: (-counts[character], character))[:_ALPHABET])
    return kept, [character for character in kept if not _stands_alone(character, normalizer)]


def _character_counts(texts: Iterable[str]) -> NDArray[np.int64]:
    """How often each code point occurs."""
    counts = np.zeros(sys.maxunicode + 1, dtype=np.int64)
    remaining = iter(texts)
    while batch := "".join(islice(remaining, _COUNTED_DOCUMENTS)):
        found, times = np.unique(np.frombuffer(batch.encode("utf-32-le", "surrogatepass"), dtype="<u4"), return_counts=True)
        counts[found] += times
    return counts


def _stands_alone(character: str, normalizer: Any) -> bool:
    """Whether BERT makes the character a word: punctuation, and ideographs, which the normaliser sets between spaces."""
    is_punctuation = (character.isascii() and not character.isalnum()) or unicodedata.category(character).startswith("P")
    return is_punctuation or normalizer.normalize_str(character) != character


def _ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)
