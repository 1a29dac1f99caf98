"""One corpus or several: prepared, named by a folder, found again."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig
from data_pipeline.errors import ConfigError, DataCorruptError, NotFoundError
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from launcher.cli import run
from launcher.config import load_run_config
from launcher.corpora import is_prepared, open_corpora, prepare_corpora
from tests.support.text import write_texts
from trainer.config import RunConfig


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("news", "talks")):
        write_texts(tmp_path / name, num_documents=80, seed=seed)
    mixture = [{"weight": weight, "corpus": {"source": name, "validation_fraction": 0.1}} for name, weight in (("news", 3), ("talks", 1))]
    values: dict[str, Any] = {"name": "mixed", "mixture": mixture, "tokenizer": {"vocab_size": 400}, "schedule": {"steps": 20, "warmup_steps": 0}}
    values["batch"] = {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 32}
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    return load_run_config("run.yaml")


def test_too_little_text_for_the_tokenizer_is_said(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--set", "mixture=[]", "--set", "corpus.source=news", "--set", "corpus.validation_fraction=0.1"]
    assert run(["prepare", "run.yaml", *one], debug=False) == 0
    assert "tokenizer.vocab_size" not in capsys.readouterr().out
    assert run(["prepare", "run.yaml", *one, "--set", "tokenizer.vocab_size=9000", "--json"], debug=False) == 0
    made = json.loads(capsys.readouterr().out)
    said = f"The tokenizer has {made['vocabulary_size']:,} tokens, fewer than tokenizer.vocab_size 9,000: there is too little text for more."
    assert run(["prepare", "run.yaml", *one, "--set", "tokenizer.vocab_size=9000"], debug=False) == 0
    assert said in capsys.readouterr().out
    assert run(["report", made["folder"]], debug=False) == 0
    assert said in capsys.readouterr().out


def test_every_file_of_a_task_is_checked_before_anything_is_prepared(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    Path("task").mkdir()
    for split, column in (("train", "lbl"), ("dev", "label"), ("test", "label")):
        Path(f"task/{split}.jsonl").write_text(json.dumps({"text": "a", column: 0}) + "\n")
    assert run(["prepare", "run.yaml", "--set", "finetune.tasks=[{name: t, path: task}]"], debug=False) == 3
    assert "train.jsonl line 1 has no column label" in capsys.readouterr().err
    assert not (Path(config.corpora_storage) / "corpora").exists()


def no_ray() -> None:
    raise AssertionError("one partition needs no Ray")


def test_a_mixture_is_prepared_once_and_found_again(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFoundError):
        open_corpora(config)
    made = prepare_corpora(config, no_ray, lambda _: None)
    assert made.created
    assert is_prepared(made.folder)
    shard = Location.at(f"{Mixture.open(made.folder).indexes[1].folder}/train-000000.tar").path
    moved = shard.rename(shard.with_suffix(".away"))
    with pytest.raises(DataCorruptError, match="is missing"):
        is_prepared(made.folder)
    assert is_prepared(made.folder, DataConfig(on_damage="skip"))
    moved.rename(shard)
    opened = Mixture.open(made.folder)
    assert [index.folder.name.split("-")[0] for index in opened.indexes] == ["news", "talks"]
    assert opened.weights == (3.0, 1.0)
    assert opened.fingerprint == open_corpora(config).fingerprint
    again = prepare_corpora(config, no_ray, lambda _: None)
    assert not again.created
    assert again.folder == made.folder

    assert run(["inspect", "run.yaml", "--step", "3", "--json", "--text", "5"], debug=False) == 0
    (batch,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(batch["text"]) == 5
    assert all(sample["text"].startswith("[CLS] ") and sample["text"].endswith(" [SEP]") for sample in batch["text"])
    assert any(" -> " in sample["text"] for sample in batch["text"])
    assert run(["inspect", "run.yaml", "--step", "3", "--set", "seed=4", "--storage", "runs"], debug=False) == 0
    shown = capsys.readouterr().out
    assert "step 3, sample 1 (" in shown
    assert "sample 2" not in shown
    assert shown.endswith("next: maskwright run run.yaml --set seed=4 --storage runs\n")

    assert run(["report", made.folder.url], debug=False) == 0
    shown = capsys.readouterr().out
    assert "75.0%" in shown
    assert all((index.folder / "report.html").exists() for index in opened.indexes)
    assert run(["report", made.folder.name, "--storage", "runs", "--json"], debug=False) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert run(["report", made.folder.url, "--output", "page.html"], debug=False) == 2
    capsys.readouterr()

    assert run(["prepare", "run.yaml", "--json"], debug=False) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["folder"] == made.folder.url
    assert [part["created"] for part in summary["corpora"]] == [False, False]
    assert run(["prepare", "run.yaml"], debug=False) == 0
    assert made.folder.url in capsys.readouterr().out.replace("\n", "")
    assert run(["inspect", "run.yaml", "--step", "3", "--json"], debug=False) == 0
    one = capsys.readouterr().out
    assert run(["inspect", "run.yaml", "--step", "3", "--world-size", "2", "--json"], debug=False) == 0
    assert capsys.readouterr().out == one


def test_a_corpus_whose_part_is_gone_is_not_prepared(config: RunConfig) -> None:
    made = prepare_corpora(config, no_ray, lambda _: None)
    made.parts[1].folder.remove()
    assert not is_prepared(made.folder)
    assert not is_prepared(Location.at("nowhere"))


def test_the_same_corpus_twice_is_refused(config: RunConfig) -> None:
    first = prepare_corpora(config, no_ray, lambda _: None).parts[0].folder
    own = config.tokenizer.model_copy(update={"path": f"{first}/tokenizer"})  # what the second part gets, so that both are one corpus
    twice = config.model_copy(update={"mixture": (config.mixture[0], config.mixture[0]), "tokenizer": own})
    with pytest.raises(ConfigError, match="is in the mixture twice"):
        prepare_corpora(twice, no_ray, lambda _: None)


def test_corpus_and_mixture_are_alternatives(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="corpus and mixture are both given"):
        load_run_config("run.yaml", ["corpus.source=news"])
