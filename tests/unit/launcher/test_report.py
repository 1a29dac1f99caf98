"""The report of finished, failed and hardly begun runs: complete, self-contained, escaped, without secrets."""

import base64
import io
import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from data_pipeline.inspection import inspect_steps
from data_pipeline.mixture import Mixture
from data_pipeline.storage import Location
from data_pipeline.stream import MicroBatchStream
from launcher import cli
from launcher.config import dump_yaml
from launcher.event_texts import tell
from launcher.lease import Lease
from launcher.report import collect, read_results_of, write_report
from launcher.report_figures import attempt_starts, curve
from launcher.scores import score_table, validation_verdict, verdict
from tests.support.corpus import small_corpus
from trainer.config import RunConfig
from trainer.runlog import RunFolder


def spread(*values: float, std: float = 0.0) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "std": std, "seeds": list(values)}


def results(pretrained: float, scratch: float, tfidf: float, std: float = 0.01) -> dict[str, Any]:
    networks = {name: [mean - std, mean, mean + std] for name, mean in (("pretrained", pretrained), ("scratch", scratch))}
    return {
        "format_version": 1,
        "task": "docstrings",
        "labels": ["a", "b"],
        "num_rows": {"train": 1420, "dev": 368, "test": 922},
        "most_common_label": 0.13,
        **{name: {**spread(*values, std=std), "macro_f1": spread(*values, std=std)} for name, values in networks.items()},
        "tfidf": {**spread(tfidf), "macro_f1": spread(tfidf)},
    }


def write_run(storage: Path) -> RunFolder:
    """A run of 60 steps whose second attempt took over at step 40, with everything a report can show."""
    run = RunFolder(Location.at(storage / "full"))
    corpus = Location.at(storage / "corpora" / "docs-0123456789ab")
    counts = {"documents": 4000, "duplicates": 211, "empty": 3, "train_documents": 3719, "train_tokens": 646474, "validation_tokens": 11307}
    sources = [
        {"name": "s3://key:hidden@bucket/text", "digest": "0"},
        {"name": "https://host/text.jsonl?part=7&X-Amz-Signature=hidden", "digest": "0"},
    ]
    (corpus / "corpus.json").write_json({"counts": counts, "sources": sources, "vocabulary": {"size": 8192}, "unigram_entropy": 6.08})
    run.config.write_bytes(b"name: full\nstorage: s3://key:hidden@bucket/runs\napi_key: hidden\nmodel:\n  num_layers: 4\n")
    for step in range(60):
        attempt = 1 if step < 40 else 2
        loss = 5.0 + 4.0 * math.exp(-step / 12)
        speed = 9000.0 + 300 * math.sin(step)
        record = {"step": step, "attempt": attempt, "mlm_loss": loss, "nsp_loss": 0.69 - step / 1000, "loss": loss + 0.7, "tokens_per_s": speed}
        time_line = {"step_s": 0.2, "forward_s": 0.05, "backward_s": 0.1, "reduce_s": None, "optimizer_s": 0.03, "mfu": 0.4, "mfu_stated": 0.3125}
        run.append_metrics({**record, **time_line, "lr": 1e-4 * min(1.0, (step + 1) / 10), "grad_norm": 2.0 if step else None})
    run.append_event("command_started", attempt=0, verb="run")
    run.append_event("stage_finished", attempt=0, stage="prepare", elapsed_s=33.2, corpus=corpus.url)
    run.append_event("attempt_started", attempt=1, stage="pretrain", world_size=2)
    run.append_event("validation", attempt=1, step=30, mlm_loss=6.3, nsp_loss=0.69, unigram_entropy=6.08)
    run.append_event("worker_failed", attempt=1, cause="killed by signal 9 <script>alert(1)</script>")
    run.append_event("attempt_started", attempt=2, stage="pretrain", world_size=2)
    run.append_event("resumed", attempt=2, step=40, repeated=0, skipped=0, steps_lost=7, seconds_lost=12.25, cause="killed by signal 9")
    run.append_event("validation", attempt=2, step=60, mlm_loss=5.4, nsp_loss=0.66, unigram_entropy=6.08)
    run.append_event("stage_finished", attempt=2, stage="pretrain", elapsed_s=3725.0)
    run.append_event("finished", attempt=2, step=60)
    manifest = {
        "world_size": 2,
        "zero_stage": 1,
        "precision": "bf16",
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "train_state": {"tokens_seen": 123456},
    }
    (run.checkpoints / "step-00000060" / "MANIFEST.json").write_json(manifest)
    (run.finetune / "docstrings" / "results.json").write_json(results(0.80, 0.70, 0.73))
    return run


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are balanced."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in {"src", "href", "srcset"}]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = write_run(tmp_path_factory.mktemp("report"))
    write_report(run)
    return run.report.read_bytes().decode()


def test_the_page_needs_no_network_and_embeds_five_pictures_that_are_svg(page: str) -> None:
    parsed = Page(page)
    prefix = "data:image/svg+xml;base64,"
    assert len(parsed.loaded) == 5
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    for source in parsed.loaded:
        assert source.startswith(prefix)
        root = ElementTree.fromstring(base64.b64decode(source.removeprefix(prefix)))
        assert root.tag.endswith("svg")


@pytest.mark.parametrize(
    "text",
    [
        "Finished.",
        "docstrings: pretraining bought 0.100 (0.800 ± 0.010 against 0.700 ± 0.010 from scratch); TF-IDF has 0.730.",
        "Validation masked-LM loss 5.400 nats at step 60; unigram entropy 6.080: 0.680 nats better",
        "resumed at step 40: micro-batches repeated 0, skipped 0; steps lost 7, seconds lost 12.2; cause: killed by signal 9",
        "exact duplicates dropped",
        "646,474",
        "123,456",
        "1 h 2 min",
        "2 ranks, ZeRO 1, bf16, cpu",
        "num_layers: 4",
        "2.13.0",
        "0.790, 0.800, 0.810",
        "Time of a step: 200.0 ms",
        "backward, reducing gradients included</td><td>100.0 ms</td><td>50.00 %",
        "31.2%",
    ],
)
def test_the_page_says(page: str, text: str) -> None:
    assert text in page


def test_what_others_wrote_is_escaped_and_secrets_are_left_out(page: str) -> None:
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "hidden" not in page
    assert "part=7" in page


def test_a_causal_model_has_no_masked_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    run.config.write_bytes(dump_yaml(RunConfig.model_validate({"name": "full", "objective": "clm", "model": {"architecture": "gpt2"}})))
    report = collect(run)
    assert "Training and validation causal-LM loss over optimizer steps" in [text for text, _ in report.pictures]
    assert report.verdicts[-1].startswith("Validation causal-LM loss 5.400 nats")
    assert not any("asked-LM" in text for text in (*report.verdicts, *(text for text, _ in report.pictures)))


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "begun"))
    run.append_event("command_started", attempt=0, verb="run")
    write_report(run)
    page = run.report.read_bytes().decode()
    assert Page(page).loaded == []
    assert "Not finished; stages done: none." in page


def test_a_failed_run_says_why_until_it_is_started_again(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "failed"))
    run.append_event("command_started", attempt=0, verb="run")
    run.append_event("failed", attempt=1, exit_code=12, cause="the loss is no longer finite")
    assert collect(run).state == "Failed: the loss is no longer finite"
    run.append_event("command_started", attempt=1, verb="resume")
    assert collect(run).state.startswith("Not finished")


def test_a_corpus_that_is_gone_and_a_damaged_manifest_do_not_stop_the_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (Location.at(tmp_path) / "corpora").remove()
    (run.checkpoints / "step-00000060" / "MANIFEST.json").write_bytes(b"{")
    report = collect(run)
    assert report.data == []
    assert [name for name, _ in report.versions] == ["python", "platform"]
    assert report.scores


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (results(0.80, 0.70, 0.73), "pretraining bought 0.100 (0.800"),
        (results(0.70, 0.60, 0.73), "TF-IDF wins"),
        (results(0.70, 0.75, 0.73), "pretraining bought nothing"),
        (results(0.80, 0.79, 0.73), "within the seeds' spread"),
    ],
)
def test_verdict_names_the_winner(scores: dict[str, Any], said: str) -> None:
    assert said in verdict(scores)


def test_validation_verdict_says_when_nothing_but_frequencies_was_learnt() -> None:
    assert "not yet better" in validation_verdict({"step": 5, "mlm_loss": 6.5, "unigram_entropy": 6.1}, "mlm")
    assert "no masked-LM loss" in validation_verdict({"step": 5, "mlm_loss": None, "unigram_entropy": 6.1}, "mlm")


def test_score_table_prints_systems_verdicts_and_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(score_table(read_results_of(run), {"step": 60, "mlm_loss": 5.4, "unigram_entropy": 6.08}))
    printed = " ".join(console.export_text().split())
    assert "docstrings pretrained 0.800 ± 0.010 0.800 ± 0.010 3" in printed
    assert "docstrings TF-IDF + logistic regression 0.730 0.730 –" in printed
    assert "pretraining bought 0.100" in printed
    assert "unigram entropy 6.080" in printed


def test_a_long_curve_is_drawn_as_means_and_keeps_its_sum() -> None:
    values = np.array([float(step % 7) for step in range(5000)] + [np.nan])
    steps, means = curve(np.arange(5001), values, max_points=100)
    assert len(steps) == 100
    assert means.sum() * 50 == pytest.approx(np.nansum(values))
    assert steps[0] == 24.5
    assert len(curve(np.arange(3), np.full(3, np.nan))[0]) == 0


def test_attempts_are_marked_where_they_took_over() -> None:
    assert attempt_starts(np.arange(5), np.array([1, 1, 2, 2, 5])) == [2, 4]


def test_the_evidence_is_json_and_two_lines(tmp_path: Path) -> None:
    report = collect(write_run(tmp_path))
    found = report.to_json()
    assert [(attempt["number"], attempt["ended"], attempt["last_step"]) for attempt in found["attempts"]] == [(1, "failed", 39), (2, "finished", 59)]
    assert found["goodput"]["wall_s"] == pytest.approx(sum(found["goodput"]["lost_s"].values()) + found["goodput"]["useful_s"], abs=0.01)
    assert found["proof"] is None, "its configuration is not one"
    assert json.dumps(found)


def test_an_attempt_of_which_nobody_hears_any_more_is_lost(tmp_path: Path) -> None:
    run = RunFolder(Location.at(tmp_path / "lost"))
    run.append_event("attempt_started", attempt=1, stage="pretrain", world_size=2)
    with Lease.acquire(run):
        assert [attempt.ended for attempt in collect(run).attempts] == ["running"]
    assert [attempt.ended for attempt in collect(run).attempts] == ["lost"]


def test_the_verb_prints_the_evidence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run trained on a corpus that is there, and its records are what its batches are: the whole way from files to the verdict."""
    corpus, storage = small_corpus(tmp_path), Location.at(tmp_path / "runs")
    batch = {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 32}
    config = RunConfig.model_validate({"name": "small", "batch": batch, "schedule": {"steps": 6, "warmup_steps": 0}})
    stream = MicroBatchStream(Mixture.open(Location.at(corpus)), config.objective, config.phases, config.seed)
    run = RunFolder(storage / "small")
    run.config.write_bytes(dump_yaml(config))
    run.append_event("stage_finished", attempt=0, stage="prepare", elapsed_s=1.0, corpus=corpus)
    run.append_event("attempt_started", attempt=1, stage="pretrain", world_size=2)
    for batch in inspect_steps(stream, config.phases, 0, 6, 2, None):
        run.append_metrics({"step": batch["step"], "attempt": 1, "time": time.time(), "step_s": 0.0, "batch_digest": batch["digest"]})
    assert cli.run(["report", "small", "--storage", str(storage), "--all-steps", "--json"], debug=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"report", "attempts", "goodput", "step_phases", "proof"}
    assert found["proof"] | {"holds": True, "checked": 6, "steps": 6, "repeated": 0, "skipped": 0, "different": []} == found["proof"]
    assert "<strong>Proven:</strong>" in run.report.read_bytes().decode()
    Location.at(corpus).remove()
    assert cli.run(["report", "small", "--storage", str(storage)], debug=False) == 0
    assert "batches were not compared" in capsys.readouterr().out
    assert "<strong>Not proven:</strong>" in run.report.read_bytes().decode()


def test_events_of_every_kind_are_told_in_words() -> None:
    continued = {"kind": "continued", "step": 7, "loss": 5.25, "loss_before": 5.25, "same_step": True, "relative_difference": 0.0}
    assert tell(continued) == "first step after the resume, 7: loss 5.25, at the same step before 5.25, bit-identical"
    assert tell({**continued, "loss": 5.3, "relative_difference": 0.0095}).endswith("relative difference 9.5e-03")
    hung = {"kind": "rank_unhealthy", "rank": 3, "node": "10.0.0.7", "pid": 12, "state": "hung", "phase": "backward", "step": 9, "seconds": 31.2}
    assert tell({**hung, "stacks": "logs/stacks"}) == (
        "rank 3 on 10.0.0.7 (process 12) hung in phase backward of step 9 for 31 s; stacks of all ranks: logs/stacks"
    )
    trouble = {"kind": "numeric_trouble", "step": 4, "trouble": "loss_spike", "value": 11.0, "policy": "rewind:1", "micro_batches": [16, 19]}
    assert tell(trouble) == "loss spike at step 4 (11), micro-batches 16 to 19; policy: rewind:1"
    assert tell({**trouble, "response": "rewind", "rewind_to": 2}).endswith("; answer: rewind to step 2")
    failed = {"kind": "checkpoint_failed", "step": 4, "rank": 1, "retried": True, "cause": "no space"}
    assert tell(failed) == "the checkpoint of step 4 failed on rank 1, it is tried again: no space"
    assert tell({"kind": "preempted", "step": None, "nodes": ["a", "b"]}) == "a, b will be taken away: saving a checkpoint"
    chosen = {"kind": "attention_chosen", "step": None, "kernels": "eager up to 128 tokens, sdpa up to 512 tokens", "device": "cpu"}
    assert tell(chosen) == "attention kernel: eager up to 128 tokens, sdpa up to 512 tokens, which is fastest on this processor"
    assert tell({"kind": "compiling", "step": None, "layers": 12}) == "compiling 12 layers, which may take a minute or two"
    assert tell({"kind": "compiled", "step": None, "seconds": 31.4, "graph_breaks": 0}) == "compiled in 31.4 s"
    assert "gave up in 4 places" in tell({"kind": "compiled", "step": None, "seconds": 31.4, "graph_breaks": 4})
    assert tell({"kind": "something_new", "time": 1.0, "step": 1, "attempt": 1, "size": 3, "url": "s3://key:hidden@bucket"}) == (
        "size 3; url s3://(redacted)@bucket"
    )
    rewound = {"kind": "resumed", "attempt": 2, "step": 4, "rewound_from": 9, "not_bit_exact_because": ["world_size: 2, now 1"]}
    assert tell(rewound).endswith("cause: not recorded; rewound from step 9; not bit-exact: world_size: 2, now 1")
