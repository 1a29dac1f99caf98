"""Generated English-like documents, the same for the same seed."""

import json
import random
from pathlib import Path

_SYLLABLES = "ba co di fo gu ha je ki lo mu na pe qui ro sa te ul vi wo ya ze an er in on st tr pl".split()  # noqa: SIM905 -- a list of this length hides the words
_COMMON = "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which".split()  # noqa: SIM905 -- a list of this length hides the words


def _vocabulary(generator: random.Random, num_words: int) -> list[str]:
    return ["".join(generator.choices(_SYLLABLES, k=generator.choice((2, 2, 3, 3, 4)))) for _ in range(num_words)]


def _sentence(generator: random.Random, words: list[str], topic: list[str]) -> str:
    """Lengths are log-normal, median 14 words, as in English prose."""
    num_words = max(3, min(60, round(generator.lognormvariate(2.65, 0.55))))
    chosen = [
        generator.choice(_COMMON) if generator.random() < 0.4 else generator.choice(topic if generator.random() < 0.6 else words)
        for _ in range(num_words)
    ]
    return " ".join(chosen).capitalize() + generator.choice((".", ".", ".", ".", "?", "!"))


def generate_documents(num_documents: int, seed: int) -> list[str]:
    """Documents of 1 to 60 sentences in paragraphs; each has a topic, words that it repeats."""
    generator = random.Random(seed)
    words = _vocabulary(random.Random(12345), 3000)
    documents: list[str] = []
    for _ in range(num_documents):
        topic = generator.sample(words, 40)
        num_sentences = max(1, min(60, round(generator.lognormvariate(1.9, 0.8))))
        sentences = [_sentence(generator, words, topic) for _ in range(num_sentences)]
        paragraphs = [" ".join(sentences[i : i + 5]) for i in range(0, num_sentences, 5)]
        documents.append("\n\n".join(paragraphs))
    return documents


def write_texts(folder: Path | str, num_documents: int, seed: int) -> None:
    """Write generated documents into `folder`: half as .txt files, half as lines of one .jsonl file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    documents = generate_documents(num_documents, seed)
    half = num_documents // 2
    for number, text in enumerate(documents[:half]):
        (folder / f"document-{number:05d}.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(documents[half:]))
    (folder / "documents.jsonl").write_text(lines, encoding="utf-8")
