"""The verb plan: what it says, from what, how fast, and what it finds wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.config import TokenizerConfig
from data_pipeline.errors import ExitCode
from data_pipeline.executor import InProcessExecutor
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location
from launcher import cli, plan_facts
from launcher.config import dump_yaml, load_run_config
from launcher.plan_memory import CPU_PROCESS_BYTES, GPU_CONTEXT_BYTES, ON_A_GPU
from launcher.plan_problems import BESIDE_RANKS_BYTES
from tests.support.tiny_run import tiny_config, write_text
from trainer.checkpoint_store import name_of
from trainer.config import RunConfig
from trainer.manifest import MANIFEST, Circumstances, Manifest
from trainer.runlog import RunFolder
from trainer.state import TrainState

LIGHT = {"annotated_doc", "annotated_types", "cython_runtime", "fsspec", "numpy", "pydantic", "pydantic_core", "rich", "shellingham", "tenacity"} | {
    *("typer", "typing_extensions", "typing_inspection", "yaml", "zstandard")
}
"""What a plan may import beside the standard library and our own packages: under a second of a core together."""
KEYS = {"steps", "epochs", "tokens", "memory", "world_sizes", "snapshot_bytes", "hours", "cost", "cost_reason", "checkpoints", "problems"}
EXAMPLES = Path(__file__).parents[3] / "cluster_configs" / "runs"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MASKWRIGHT_STORAGE", raising=False)
    return tmp_path


def write_config(**sections: Any) -> str:
    Path("c.yaml").write_text(yaml.safe_dump(tiny_config(**sections)))
    return "c.yaml"


def plan(capsys: pytest.CaptureFixture[str], config: str, *options: str) -> dict[str, Any]:
    assert cli.run(["plan", config, *options, "--json"], debug=True) == 0
    return json.loads(capsys.readouterr().out)


def causes(found: dict[str, Any]) -> str:
    return "; ".join(f"{problem['severity']}: {problem['cause']}" for problem in found["problems"])


def prepared(config: str) -> None:
    """Make the corpus of a configuration, on this process."""
    found = load_run_config(config)
    prepare(found.corpus, found.tokenizer, found.batch.sequence_lengths, Location.at(found.storage), InProcessExecutor(), lambda _: None)


def checkpoint(run: RunFolder, device: str, threads: int) -> None:
    """One without files, which says where it was trained."""
    folder = run.checkpoints.path / name_of(5)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(1, Circumstances(2, 1, "fp32", threads, device, {}), {}, TrainState(step=5), {})
    (folder / MANIFEST).write_text(json.dumps(manifest.to_json()))


def earlier_run(config: str, name: str, *, step_s: float, num_steps: int = 20, device: str = "cpu", **changes: Any) -> None:
    """A run in the storage that took steps of so many seconds on two ranks."""
    found = load_run_config(config)
    run = RunFolder(Location.at(found.storage) / name)
    run.config.write_bytes(dump_yaml(RunConfig.model_validate({**found.model_dump(mode="json"), "name": name, **changes})))
    run.append_event("attempt_started", attempt=1, stage="pretrain", world_size=2, zero_stage=1, device=device)
    now = time.time()
    for step in range(num_steps):
        parts = {"forward_s": step_s * 0.3, "backward_s": step_s * 0.6, "data_wait_s": 0.0, "validation_s": 0.0, "checkpoint_stall_s": 0.0}
        run.append_metrics({"step": step, "attempt": 1, "time": now + step * step_s, "step_s": step_s, "tokens_per_s": 1.0, **parts})


def test_it_imports_nothing_heavy(here: Path) -> None:
    """By which it answers in less than two seconds; what a busy machine takes says nothing."""
    write_text(here)
    config = write_config()
    prepared(config)
    earlier_run(config, "tiny", step_s=0.5)
    code = (
        "import json, sys\nfrom launcher.cli import run\n"
        f"code = run(['plan', {config!r}, '--json'], debug=True)\n"
        "names = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(json.dumps([code, len(sys.modules), sorted(name for name in names if not name.startswith('_'))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    said, (code, num_modules, packages) = map(json.loads, done.stdout.strip().splitlines())
    assert said["hours"] is not None
    assert code == 0
    assert set(packages) <= LIGHT | {"data_pipeline", "trainer", "launcher"}
    assert num_modules < 900, "some 650 when this was written"


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.yaml")))
def test_every_example_has_a_plan(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, str(EXAMPLES / example), "--gpu", "H100", "-W", "8" if example != "demo.yaml" else "2", "--mfu", "0.4")
    assert found.keys() >= KEYS
    for key in ("epochs", "hours", "memory"):
        assert found[key] is not None or found[f"{key}_reason" if key != "hours" else "hours_basis"]
    if example != "gpt2.yaml":  # its tokenizer is on the hub
        assert found["hours"] > 0
        assert [stage["stage"] for stage in found["memory"]] == [0, 1, 2, 3]
        assert all(stage["largest_micro_batch"] > 0 for stage in found["memory"])
    assert cli.run(["plan", str(EXAMPLES / example)], debug=True) == 0
    assert "next: maskwright prepare" in capsys.readouterr().out


def test_a_prepared_corpus_is_counted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here)
    config = write_config()
    before = plan(capsys, config, "-W", "2")
    assert before["epochs"] is None
    assert "not prepared" in before["epochs_reason"]
    assert before["tokens_are_upper_bound"]
    prepared(config)
    found = plan(capsys, config, "-W", "2")
    assert found["epochs"] > 0
    assert found["tokens"] < before["tokens"]
    assert not found["tokens_are_upper_bound"]
    assert found["basis"]["vocabulary"]["basis"].startswith("read from")
    assert 0 < found["resume_bytes"] < 10**6
    other = plan(capsys, config, "-W", "2", "--set", "corpus.seed=3")
    assert other["epochs"] is None, "another shuffle is another corpus"
    assert cli.run(["plan", config], debug=True) == 0
    assert "next: maskwright run" in capsys.readouterr().out
    assert cli.run(["plan", config, "-W", "100"], debug=True) == 0
    said = capsys.readouterr().out
    assert "error: 100 ranks exceed" in said
    assert "next:" not in said, "it would not get past the errors"
    assert cli.run(["plan", config, "-W", "100", "--exit-code"], debug=True) == ExitCode.CONFIG
    assert cli.run(["plan", config, "-W", "100", "--exit-code", "--json"], debug=True) == ExitCode.CONFIG
    assert cli.run(["plan", config, "-W", "2", "--exit-code"], debug=True) == 0


def test_a_mixture_is_counted_by_corpus(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here)
    text = {"source": "text.jsonl", "validation_fraction": 0.1}
    parts = [{"weight": 3, "corpus": {**text, "name": "first"}}, {"weight": 1, "corpus": {**text, "name": "second", "seed": 1}}]
    sections = {key: value for key, value in tiny_config(mixture=parts).items() if key != "corpus"}
    Path("m.yaml").write_text(yaml.safe_dump(sections))
    config = load_run_config("m.yaml")
    storage, tokenizer = Location.at(config.storage), config.tokenizer
    for part in config.mixture:
        made = prepare(part.corpus, tokenizer, config.batch.sequence_lengths, storage, InProcessExecutor(), lambda _: None)
        tokenizer = TokenizerConfig(path=(made.folder / "tokenizer").url)
    found = plan(capsys, "m.yaml", "-W", "2")
    first, second = found["epochs_by_corpus"].values()
    assert found["epochs"] == first == pytest.approx(3 * second, rel=0.05)
    assert found["resume_bytes"] > 0


def test_hours_come_from_an_earlier_run_like_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here)
    config = write_config()
    assert plan(capsys, config, "-W", "2")["hours"] is None
    earlier_run(config, "wider", step_s=9.0, model={"num_layers": 2, "hidden_size": 64, "num_heads": 2, "max_positions": 64})
    assert plan(capsys, config, "-W", "2")["hours"] is None, "another network says nothing"
    earlier_run(config, "other", step_s=0.5)
    found = plan(capsys, config, "-W", "2")
    assert "run other" in found["hours_basis"]
    assert found["step_s"] == pytest.approx(0.5)
    earlier_run(config, "tiny", step_s=0.25)
    assert plan(capsys, config, "-W", "2")["step_s"] == pytest.approx(0.25), "the run itself comes first"
    stated = plan(capsys, config, "-W", "2", "--tokens-per-second", "1000", "--price-per-hour", "3", "--failures-per-day", "4")
    assert stated["hours_are_upper_bound"]
    assert "at most" in stated["hours_basis"]
    assert stated["hours"] == pytest.approx(stated["tokens"] / 1000 / 3600)
    assert stated["cost"] == pytest.approx(stated["hours"] * 6)
    assert stated["checkpoints"]["best_every_steps"] > 0


def test_tasks_that_could_not_be_fine_tuned_on_are_problems(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here)
    for split in ("train", "dev", "test"):
        (here / f"{split}.jsonl").write_text('{"text": "a", "label": 0}\n{"txt": "b", "label": 1}\n')
    tasks = [{"name": "here", "path": str(here)}, {"name": "gone", "path": "nofolder"}]
    found = [(each["severity"], each["cause"]) for each in plan(capsys, write_config(finetune={"tasks": tasks}))["problems"]]
    assert [severity for severity, cause in found if "task here: " in cause and "train.jsonl line 2 has no column text" in cause] == ["error"]
    assert [severity for severity, cause in found if cause.startswith("task gone: there is no folder")] == ["warning"]


def test_text_that_is_not_there_is_a_warning_and_text_that_cannot_be_read_a_problem(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless its corpus is prepared, or the plan is for another machine."""
    (here / "tables").mkdir()
    (here / "tables" / "numbers.csv").write_text("1,2\n")
    write_text(here)
    config = write_config()
    prepared(config)
    assert "corpus.source" not in causes(plan(capsys, config))
    missing = ["--set", "corpus.source=nope.jsonl"]
    assert "warning: corpus.source nope.jsonl does not exist" in causes(plan(capsys, config, *missing))
    assert "corpus.source" not in causes(plan(capsys, config, *missing, "--gpu", "T4"))
    assert "error: corpus.source tables holds no" in causes(plan(capsys, config, "--set", "corpus.source=tables"))
    mixture = [{"weight": 1, "corpus": {"source": "nope.jsonl"}}, {"weight": 1, "corpus": {"source": "python-docs"}}]
    assert causes(plan(capsys, write_config(corpus={}, mixture=mixture))).count("corpus.source") == 1


def test_hours_of_other_devices_are_not_taken_for_these(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here)
    config = write_config()
    Path("cluster.yaml").write_text("kind: local\nnum_workers: 2\nthreads_per_worker: 4\n")
    earlier_run(config, "other", step_s=0.5)
    run = RunFolder(Location.at(load_run_config(config).storage) / "other")
    on_cpus = (config, "--cluster", "cluster.yaml")
    assert "no checkpoint says on how many threads" in plan(capsys, *on_cpus)["hours_basis"]
    checkpoint(run, "cpu AVX512", 1)
    assert "a rank's threads: 1 there, 4 here" in plan(capsys, *on_cpus)["hours_basis"]
    checkpoint(run, "cpu AVX512", 4)
    assert plan(capsys, *on_cpus)["hours_basis"] == "measured: 18 steps of run other"
    earlier_run(config, "on-gpus", step_s=0.1, device="cuda")
    run = RunFolder(Location.at(load_run_config(config).storage) / "on-gpus")
    assert "no checkpoint says on which GPU" in plan(capsys, config, "-W", "2", "--gpu", "H100")["hours_basis"]
    checkpoint(run, "cuda NVIDIA H100 80GB HBM3", 1)
    assert plan(capsys, config, "-W", "2", "--gpu", "H100")["hours_basis"] == "measured: 18 steps of run on-gpus"
    assert plan(capsys, config, "-W", "2", "--gpu", "T4")["hours"] is None


def test_weights_that_are_continued_say_their_own_dimensions(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {
        "model_type": "bert",
        "vocab_size": 900,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
    }
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(own))
    found = plan(capsys, write_config(model={"init_from": "model"}), "-W", "2")
    assert found["basis"]["network"]["basis"].startswith("read from")
    assert "exceeds the 32 positions" in causes(found)
    hub = plan(capsys, write_config(model={"init_from": "some/model"}), "-W", "2")
    assert hub["memory"] is None
    assert "hub ids are not looked up" in hub["memory_reason"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-W", "9"], "9 ranks exceed the 8 micro-batches"),
        (["--set", "precision=fp16"], "fp16 needs a GPU"),
        (["--set", "precision=bf16", "--set", "model.attention=varlen"], "varlen needs a GPU"),
        (["--gpu", "T4", "--set", "precision=bf16"], "warning: T4 is not known to compute in bf16"),
        (["--gpu", "T4", "--set", "model.num_layers=400", "--set", "model.hidden_size=2048"], "error: a rank needs"),
        (["--set", "model.num_layers=4000", "--set", "model.hidden_size=4096"], "this machine gives"),
        (["--set", "model.num_layers=4000", "--set", "model.hidden_size=4096"], "are free where the storage is"),
        (["--set", "model.architecture=roberta", "--set", "objective.sentence_objective=none"], "memory and checkpoints are not planned"),
    ],
)
def test_problems_are_named(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in causes(plan(capsys, write_config(), *options))


@pytest.mark.parametrize("said", ["zero.offload_optimizer=cpu", "zero.deepspeed.zero_optimization.offload_optimizer.device=cpu"])
def test_nothing_is_said_of_memory_where_state_is_offloaded(said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It would not fit as it is counted, which is why it is offloaded."""
    large = ["--gpu", "T4", "--set", "model.num_layers=48", "--set", "model.hidden_size=1024"]
    assert "error: a rank needs" in causes(plan(capsys, write_config(), *large))
    found = plan(capsys, write_config(), *large, "--set", said)
    assert found["memory"] is None
    assert "offload_optimizer" in found["memory_reason"]
    assert "warning: memory is not planned" in causes(found)
    assert "error" not in causes(found)
    assert found["snapshot_bytes"] > 0


def test_the_process_counts_and_what_the_machine_allows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a rank takes more for its libraries than for a tiny network."""
    monkeypatch.setattr(plan_facts, "host_bytes", lambda: 2 * CPU_PROCESS_BYTES + BESIDE_RANKS_BYTES)
    found = plan(capsys, write_config(), "-W", "1")
    for stage in found["memory"]:
        assert stage["needed_bytes"] == stage["peak_bytes"] + stage["margin_bytes"] + CPU_PROCESS_BYTES
    assert "this machine" not in causes(found)
    assert "this machine gives 3.0 GB" in causes(plan(capsys, write_config(), "-W", "2"))


def test_it_says_what_memory_was_compared_with(capsys: pytest.CaptureFixture[str]) -> None:
    on_cpu, on_gpu = (plan(capsys, write_config(), *options) for options in ((), ("--gpu", "T4")))
    assert "benchmarks/plan_memory.py" in on_cpu["memory_basis"]
    assert on_gpu["memory_basis"] == ON_A_GPU == "computed; not compared with the memory of any GPU"
    assert on_gpu["memory"][0]["process_bytes"] == GPU_CONTEXT_BYTES
    assert cli.run(["plan", write_config(), "--gpu", "T4"], debug=True) == 0
    assert ON_A_GPU in capsys.readouterr().out


def test_plain_products_keep_scores_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    one, steps = (plan(capsys, write_config(), "--gpu", "T4", "--set", f"model.attention={kernel}") for kernel in ("auto", "eager"))
    assert one["basis"]["attention"] == {"value": "sdpa", "basis": "assumed: `auto` is settled by a measurement before step 1"}
    assert all(own["activations_bytes_kept"] > other["activations_bytes_kept"] for own, other in zip(steps["memory"], one["memory"], strict=True))
    Path("storage/tiny").mkdir(parents=True)
    Path("storage/tiny/choices.json").write_text(json.dumps({"attention": {"64": "eager"}, "device": "cuda"}))
    assert plan(capsys, write_config(), "--gpu", "T4", "--set", "model.attention=auto")["memory"] == steps["memory"]


def test_overlapping_takes_a_bucket_more(capsys: pytest.CaptureFixture[str]) -> None:
    """`auto` overlaps on a GPU, so that DeepSpeed's own buckets come in instead of flat gradients."""
    options = ["--gpu", "T4", "--set", "zero.stage=1", "--set", "precision=fp32", "--set", "zero.bucket_elements=1000000"]
    overlapping, alone = (plan(capsys, write_config(), *options, "--set", f"zero.overlap={each}")["memory"] for each in ("auto", "false"))
    assert overlapping[1]["peak_bytes"] != alone[1]["peak_bytes"]
    assert overlapping[2]["peak_bytes"] - alone[2]["peak_bytes"] == 4_000_000


def test_what_was_measured_on_another_device_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(precision="auto")
    assert plan(capsys, config)["basis"]["precision"]["basis"].startswith("assumed")
    Path("storage/tiny").mkdir(parents=True)
    Path("storage/tiny/choices.json").write_text(json.dumps({"precision": "bf16", "device": "cpu"}))
    assert plan(capsys, config)["basis"]["precision"]["value"] == "bf16"
    assert plan(capsys, config, "--gpu", "T4")["basis"]["precision"]["value"] == "fp32"


def test_too_little_text_is_a_problem(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here, documents=60)
    config = write_config(batch={"global_batch_size": 4096, "micro_batch_size": 4, "sequence_length": 64})
    prepared(config)
    found = causes(plan(capsys, config, "-W", "2", "--set", "schedule.steps=5000"))
    assert "fewer than the 1,024 micro-batches of a step" in found
    assert "will see each text" in found
    assert "fewer than 8 each shuffle poorly" in causes(plan(capsys, config, "-W", "2", "--set", "batch.global_batch_size=64"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--gpu", "Voodoo2"], ExitCode.USAGE),
        (["--gpu", "A100"], ExitCode.USAGE),
        (["--mfu", "1.5"], ExitCode.USAGE),
        (["--set", "batch.global_batch_size=33"], ExitCode.CONFIG),
        (["--set", "zero.deepspeed.bf16.enabled=true"], ExitCode.CONFIG),
        (["--cluster", "nowhere"], ExitCode.NOT_FOUND),
    ],
)
def test_what_cannot_be_planned_is_refused(options: list[str], code: ExitCode, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", write_config(), *options], debug=False) == code


def test_ranks_without_work_in_the_first_steps_are_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    """As `run` has it: what counts is the largest step."""
    small = {"global_batch_size": 8, "micro_batch_size": 4, "sequence_length": 64, "phases": [{"from_step": 5, "global_batch_size": 32}]}
    config = write_config(batch=small)
    assert "warning: 5 steps have as few as 2 micro-batches: some of 8 ranks are idle" in causes(plan(capsys, config, "-W", "8"))
    assert "error: 9 ranks exceed the 8 micro-batches" in causes(plan(capsys, config, "-W", "9"))
    assert "ranks" not in causes(plan(capsys, config, "-W", "2"))


def test_a_gpu_computes_in_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, write_config(), "--gpu", "B200", "--set", "precision=fp32", "--mfu", "0.4")
    assert "fp32" not in causes(found)
    assert found["hours"] > 0


@pytest.mark.parametrize("damaged", ["{", "[]", '{"model_type": "bert", "vocab_size": "many"}', '{"model": 3}'])
def test_damaged_files_are_named(damaged: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    for file, setting in (("config.json", "model.init_from"), ("tokenizer.json", "tokenizer.path")):
        Path("model", file).write_text(damaged)
        assert cli.run(["plan", write_config(), "--set", f"{setting}=model"], debug=False) == ExitCode.CONFIG
        assert "model" in capsys.readouterr().err


def test_the_manifest_of_an_older_corpus_is_understood(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(here)
    config = write_config()
    prepared(config)
    manifest = next(here.glob("storage/corpora/*/corpus.json"))
    stored = json.loads(manifest.read_bytes())
    del stored["config"]["corpus"]["removed_test_texts"]
    manifest.write_text(json.dumps(stored))
    assert "not prepared" not in str(plan(capsys, config, "-W", "2")["epochs_reason"]), "it has been found, if only to be refused"


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", write_config(), "-W", "3", "--failures-per-day", "1", "--tokens-per-second", "100"], debug=True) == 0
    said = capsys.readouterr().out
    for words in ("parameters", "at most", "ZeRO", "micro-steps", "3 *", "11.1%", "Checkpoints", "best interval", "next: maskwright prepare c.yaml"):
        assert words in said, words
