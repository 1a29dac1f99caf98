"""Training a tokenizer is deterministic across processes; loading one checks what masking needs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline import word_memory
from data_pipeline.config import TokenizerConfig
from data_pipeline.encoding import Encoder
from data_pipeline.errors import ConfigError, NotFoundError
from data_pipeline.masking import Masking
from data_pipeline.storage import Location
from data_pipeline.tokenizer import load_tokenizer, tokenizer_digest, train_tokenizer, vocabulary_of, write_tokenizer
from tests.support.text import generate_documents

CONFIG = TokenizerConfig(vocab_size=400)
_TRAIN = """
import hashlib
from data_pipeline.config import TokenizerConfig
from data_pipeline.tokenizer import train_tokenizer
from tests.support.text import generate_documents
texts = generate_documents(200, 5) + ["日本語 naïve Ωμέγα"] * 2
print(hashlib.sha256(train_tokenizer(texts, TokenizerConfig(vocab_size=400)).to_str().encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(generate_documents(200, 5), CONFIG), CONFIG, path)
    return str(path)


def test_every_process_trains_the_same_tokenizer() -> None:
    root = Path(__file__).parents[3]
    digests = {
        subprocess.run(
            [sys.executable, "-c", _TRAIN],
            env={**os.environ, "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"), ("3", "1"))
    }
    assert len(digests) == 1


def test_size_and_special_tokens(folder: str) -> None:
    tokenizer = load_tokenizer(folder)
    vocabulary = vocabulary_of(tokenizer)
    assert len(tokenizer) == CONFIG.vocab_size
    assert (vocabulary.pad, vocabulary.unk, vocabulary.cls, vocabulary.sep, vocabulary.mask) == (0, 1, 2, 3, 4)
    assert vocabulary.ordinary_ranges == ((5, 400),)
    assert tokenizer_digest(folder) == tokenizer_digest(folder)


def test_transformers_encodes_as_prepare_does(folder: str) -> None:
    text = "Café naïve, the tokenizer IS one; 日本"
    ids = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    assert Encoder.load(Location(folder)).encode([[text]]).ids.tolist() == ids
    assert load_tokenizer(folder)("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]


@given(st.lists(st.lists(st.text().map(lambda text: text.replace("\n", " ")), max_size=4), max_size=4))
@settings(max_examples=200)
@example([["the  the", " The\tthe\u00a0é\u0301 \u0301x", "日本 x\u2028y"], [], ["", "  "], ["a" * 300 + " b"]])
def test_remembered_words_are_encoded_as_the_tokenizer_does(folder: str, documents: list[list[str]]) -> None:
    encoder = Encoder.load(Location(folder))
    assert encoder.words is not None
    expected = [[encoder.tokenizer.encode(text, add_special_tokens=False).ids for text in document] for document in documents]
    encoded = encoder.encode(documents)
    assert encoded.ids.tolist() == [token for document in expected for ids in document for token in ids]
    assert encoded.sentence_lengths.tolist() == [len(ids) for document in expected for ids in document if ids]
    assert encoded.document_lengths.tolist() == [count for document in expected if (count := sum(bool(ids) for ids in document))]


def test_words_are_forgotten_when_there_are_too_many(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_memory, "_MAX_WORDS", 3)
    encoder = Encoder.load(Location(folder))
    for text in ("one two three four", "five two", "three one"):
        expected = encoder.tokenizer.encode(text, add_special_tokens=False).ids
        assert encoder.encode([[text]]).ids.tolist() == expected
    assert encoder.words is not None
    assert len(encoder.words.numbers) <= 4


def test_a_tokenizer_that_looks_across_spaces_encodes_whole_sentences(folder: str, tmp_path: Path) -> None:
    definition = json.loads((Path(folder) / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, "pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}}))
    encoder = Encoder.load(Location(str(tmp_path)))
    assert encoder.words is None
    encoded = encoder.encode([["the cat.", ""], [], ["a"]])
    assert encoded.ids.tolist() == [token for text in ("the cat.", "a") for token in encoder.tokenizer.encode(text, add_special_tokens=False).ids]
    assert encoded.document_lengths.tolist() == [1, 1]


def test_special_tokens_in_a_text_are_text(folder: str) -> None:
    encoded = Encoder.load(Location(folder)).encode([["see [MASK] and [SEP]"]])
    assert not {2, 3, 4} & set(encoded.ids.tolist())


def test_too_small_a_vocabulary_is_refused() -> None:
    letters = " ".join(chr(code) for code in range(0x430, 0x460)) + " abcdefghijklmnopqrstuvwxyz" + " ".join(chr(c) for c in range(0x3B1, 0x3CA))
    with pytest.raises(ConfigError, match="vocab_size 128 does not exceed"):
        train_tokenizer([letters], TokenizerConfig(vocab_size=128, lowercase=False))


def test_a_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such folder"):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize("damaged", ["", '{"version": "1.0", "model"', '{"version": "1.0", "model": {"type": "Nonsense"}}', "[]"])
def test_a_damaged_tokenizer_is_refused_with_a_remedy(folder: str, tmp_path: Path, damaged: str) -> None:
    shutil.copytree(folder, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text(damaged)
    with pytest.raises(ConfigError, match="damaged is damaged: ") as caught:
        load_tokenizer(str(tmp_path / "damaged"))
    assert "from a copy" in caught.value.remedy


def test_a_tokenizer_without_special_tokens_is_refused(folder: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "vocab.txt"):
        (tmp_path / name).write_bytes((Path(folder) / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}))
    with pytest.raises(ConfigError, match="has no cls_token, sep_token, unk_token"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_of_a_causal_model_lends_its_end_of_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    backend = Tokenizer(models.BPE({end: 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, unk_token=end).save_pretrained(tmp_path)
    found = vocabulary_of(load_tokenizer(str(tmp_path)))
    assert (found.cls, found.sep, found.pad, found.unk, found.mask) == (0, 0, 0, 0, None)
    assert found.ordinary_ids.tolist() == [1, 2, 3]
    with pytest.raises(ConfigError, match="has no mask token") as error:
        Masking.of(found, 0.15)
    assert "objective: clm" in error.value.remedy


def test_placeholders_and_gaps_are_not_ordinary(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[unused0]": 1, "[UNK]": 2, "[CLS]": 3, "[SEP]": 4, "[MASK]": 5, "a": 6, "b": 8}
    special = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]")), **special)
    found = vocabulary_of(tokenizer)
    assert found.size == 9
    assert found.ordinary_ids.tolist() == [6, 8]
