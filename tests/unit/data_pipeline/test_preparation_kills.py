"""`prepare` in processes of its own: killed at random moments it continues without redoing anything; a second writer is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import Command, maskwright
from tests.support.text import generate_documents

_PREPARE = """
import json, sys
from data_pipeline import building, sources
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location

building._HASH_PARTITION_BYTES = sources._MIN_PARTITION_BYTES = 40_000  # a layout of many partitions from little text
corpus = CorpusConfig(source=sys.argv[1], validation_fraction=0.1, near_duplicates={}, quality={"min_words": 20}, personal_data=("email",))
texts = json.load(open(sys.argv[3]))
print("ready", flush=True)
arguments = (corpus, TokenizerConfig(vocab_size=400), (32, 64), Location.at(sys.argv[2]), InProcessExecutor(), lambda message: None)
prepare(*arguments, test_texts=lambda: texts)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    documents = generate_documents(400, 8)
    (folder / "texts").mkdir()
    for number in range(8):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[number::8] + documents[:3]]
        (folder / "texts" / f"{number}.jsonl").write_text("".join(lines))
    (folder / "held-out.json").write_text(json.dumps({"task": documents[20:30]}))
    return folder


def _start(inputs: Path, storage: Path) -> "subprocess.Popen[str]":
    """A process that is about to begin: its imports are done."""
    command = [sys.executable, "-c", _PREPARE, str(inputs / "texts"), str(storage), str(inputs / "held-out.json")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _files(storage: Path) -> dict[str, bytes]:
    """Without the claim, which a killed process leaves for the next one to take over."""
    files = [path for path in sorted(storage.glob("corpora/texts-*/**/*")) if path.is_file() and "claim.json" not in path.name]
    return {str(path.relative_to(storage)): path.read_bytes() for path in files}


def _finished(storage: Path) -> dict[Path, int]:
    """When each receipt was written, and each shard that a receipt vouches for."""
    receipts = list(storage.glob("corpora/*/work/*.json"))
    shards = [
        path.parents[1] / f"{split}-{path.stem.split('-')[1]}.tar"
        for path in receipts
        if path.stem.startswith("encode")
        for split in ("train", "validation")
    ]
    return {path: path.stat().st_mtime_ns for path in [*receipts, *shards] if path.exists()}


KILLS = 25


@pytest.mark.full
@pytest.mark.timeout(400)
def test_killed_at_random_moments_it_continues_and_gives_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    started_at = time.monotonic()
    with _start(inputs, tmp_path / "whole") as process:
        begun_at = time.monotonic()
        assert process.wait(60) == 0
    length_s = time.monotonic() - begun_at
    assert time.monotonic() - started_at < 60
    whole = _files(tmp_path / "whole")
    assert any("train-" in name and "000003" in name for name in whole), "the layout should have several partitions"
    assert any(name.endswith("contamination.json") for name in whole)
    generator = random.Random(KILLS)
    storage = tmp_path / "killed"
    progress: list[int] = []
    finished: dict[Path, int] = {}
    num_killed = 0
    while num_killed < KILLS:
        with _start(inputs, storage) as process:
            time.sleep(generator.uniform(0.0, 0.6 * length_s))
            process.kill()
            killed = process.wait(60) == -signal.SIGKILL
        again = _finished(storage)
        redone = [path for path, written_at in finished.items() if again.get(path) not in (None, written_at)]
        assert not redone, f"finished work was done again: {redone}"
        if any(storage.glob("corpora/texts-*/corpus.json")):  # it was faster: begin anew
            assert _files(storage) == whole or any(storage.glob("corpora/texts-*/work"))
            shutil.rmtree(storage)
            again = {}
        else:
            assert set(finished) <= set(again), "finished work is gone"
        num_killed += killed
        finished = again
        progress.append(len(finished))
    with _start(inputs, storage) as process:
        assert process.wait(60) == 0
    assert _files(storage) == whole
    assert max(progress) > 0, "no kill came after the first finished partition"
    shards = {path: written_at for path, written_at in finished.items() if path.suffix == ".tar"}
    assert {path: path.stat().st_mtime_ns for path in shards} == shards


def test_of_two_writers_the_second_is_refused(inputs: Path, tmp_path: Path) -> None:
    config = {"name": "two", "storage": str(tmp_path / "storage"), "corpus": {"source": str(inputs / "texts")}, "tokenizer": {"vocab_size": 400}}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    first = Command(["prepare", "run.yaml"], tmp_path).start()
    try:
        first.wait_until(lambda: list(tmp_path.glob("storage/corpora/*/claim.json")))
        first.process.send_signal(signal.SIGSTOP)
        code, said = maskwright("prepare", "run.yaml", folder=tmp_path)
        assert code == 8, said
        assert f"is being written by process {first.process.pid}" in said
        first.process.send_signal(signal.SIGCONT)
        assert first.wait() == 0, first.text()
    finally:
        first.kill_everything()
    code, said = maskwright("prepare", "run.yaml", folder=tmp_path)
    assert (code, "was there already" in said) == (0, True)
