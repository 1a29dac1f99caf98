"""Configuration: precedence, `--set`, and errors that name everything at once."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, ExitCode, NotFoundError
from launcher.cluster_config import LocalCluster, RayCluster, SlurmCluster
from launcher.config import dump_yaml, example_configs, json_schema, load_cluster_config, load_run_config, override_run_config
from launcher.config_problems import dotted_names
from trainer.config import RunConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(folder, text), overrides)
    assert caught.value.exit_code == ExitCode.CONFIG
    assert caught.value.remedy
    return [line.strip() for line in caught.value.cause.splitlines()]


def test_set_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nschedule: {steps: 20000}\noptimizer: {lr: 1e-3}\n")
    config = load_run_config(path, ["optimizer.lr=5e-4", "zero.stage=3"])
    assert (config.schedule.steps, config.optimizer.lr, config.zero.stage, config.model.num_layers) == (20000, 5e-4, 3, 12)


def test_storage_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, with_storage = write(tmp_path, "name: a\n"), tmp_path / "other.yaml"
    with_storage.write_text("name: a\nstorage: from-file\n")
    assert load_run_config(path).storage == "runs"
    monkeypatch.setenv("MASKWRIGHT_STORAGE", "from-environment")
    assert load_run_config(path).storage == "from-environment"
    assert load_run_config(with_storage).storage == "from-file"
    assert load_run_config(with_storage, ["storage=from-set"]).storage == "from-set"
    assert load_run_config(with_storage, ["storage=from-set"], "from-flag").storage == "from-flag"


def test_set_makes_and_indexes_lists(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\n")
    config = load_run_config(path, ["finetune.tasks=[{name: sst2, path: x}, {name: b, path: y}]", "finetune.tasks.1.path=z"])
    assert [(task.name, task.path) for task in config.finetune.tasks] == [("sst2", "x"), ("b", "z")]


def test_all_errors_at_once_with_path_expectation_finding_and_nearest_name(tmp_path: Path) -> None:
    text = """
name: x
sede: 3
lr: 3
precision: bf8
corpus: {source: 5}
schedule: {steps: many}
batch: {micro: 3, global_batch_size: 0}
finetune: {tasks: [{name: a, pth: b}]}
"""
    found = problems_of(tmp_path, text)
    assert found[0].endswith("9 problems")
    for expected in (
        "sede: unknown key; nearest: seed",
        "lr: unknown key; nearest: optimizer.lr",
        "precision: expected 'auto', 'bf16', 'fp16' or 'fp32', found 'bf8' (text)",
        "corpus.source: expected text or a list, found 5 (whole number)",
        "schedule.steps: expected a whole number, found 'many' (text)",
        "finetune.tasks.0.path: required, not given",
        "finetune.tasks.0.pth: unknown key; nearest: finetune.tasks.0.path",
        "batch.global_batch_size: expected greater than or equal to 1, found 0 (whole number)",
    ):
        assert expected in found
    assert any(line.startswith("batch.micro: unknown key; ") for line in found)


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("name: a\nbatch: {global_batch_size: 100, micro_batch_size: 32}\n", (), "global_batch_size 100 is not a multiple of micro_batch_size 32"),
        ("name: a b\n", (), "name: expected letters, digits, dots, underscores and dashes, a letter or digit first, found 'a b' (text)"),
        ("name: a\nbatch: {global_batch_size: 5, micro_batch_size: 2}\n", (), ": batch: global_batch_size 5 is not a multiple"),
        ("name: corpora\n", (), "name 'corpora' is taken"),
        ("name: a\nmodel: {hidden_size: 30, num_heads: 4}\n", (), "num_heads 4 does not divide hidden_size 30"),
        ("name: a\nbatch: {sequence_length: 1024}\n", (), "exceeds model.max_positions 512"),
        ("name: a\nschedule: {steps: 5}\n", (), "warmup_steps 10000 exceeds steps 5"),
        ("name: a\nobjective: clm\n", (), "model.architecture bert cannot learn objective clm; choose gpt2"),
        ("name: a\nmodel: {architecture: gpt2}\n", (), "model.architecture gpt2 cannot learn objective mlm; choose bert, modernbert"),
        ("name: a\nmodel: {architecture: modernbert}\n", (), "modernbert has no head for objective.sentence_objective nsp; set it to none"),
        (
            "name: a\nmodel: {architecture: robrta}\n",
            (),
            "model.architecture robrta: there is no masked language model of that name; nearest: roberta",
        ),
        (
            "name: a\nobjective: clm\nmodel: {architecture: gtp2}\n",
            (),
            "model.architecture gtp2: there is no masked language model of that name; nearest: gpt2",
        ),
        (
            "name: a\nmodel: {architecture: roberta}\nobjective: {sentence_objective: none}\nbatch: {packing: rows}\n",
            (),
            "roberta cannot keep the samples of a row apart; set batch.packing to none",
        ),
        ("name: a\nmodel: {attention: varlen}\nprecision: fp32\n", (), "model.attention varlen computes in 16 bits only, and precision is fp32"),
        (
            "name: a\nmodel: {architecture: roberta, attention: varlen}\nobjective: {sentence_objective: none}\n",
            (),
            "model.architecture roberta has no model.attention varlen; set it to auto",
        ),
        ("name: a\nobjective: {kind: clm, mask_rate: 0.2}\nmodel: {architecture: gpt2}\n", (), "objective: objective clm masks nothing"),
        ("name: a\nobjective: {kind: clm, sentence_objective: nsp}\n", (), "objective: objective clm has no sentence pairs"),
        ("name: a\nobjective: crm\n", (), "objective: expected 'mlm' or 'clm', found 'crm'"),
        ("name: a\nmodel: {architecture: BERT}\n", (), "model.architecture: expected"),
        ("{}", (), "name: required, not given"),
        ("", (), "name: required, not given"),
        ("- a\n- b\n", (), "expected keys and values, found ['a', 'b'] (list)"),
        ("name: [unclosed\n", (), "line 2"),
        ("name: a\nseed: 1\nseed: 2\n", (), "seed: given twice, the second time at line 3"),
        ("name: a\nzero: {stage: 7}\n", (), "zero.stage: expected 0, 1, 2 or 3, found 7"),
        ("name: a\nzero: 3\n", (), "zero: expected keys and values, found 3"),
        ("name: ../evil\n", (), "name: expected"),
        ("name: a\n", ("seed",), "--set 'seed': expected a.b=value"),
        ("name: a\n", ("seed.x=3",), "unknown key"),
        ("name: a\nseed: 1\n", ("seed.x=3",), "seed holds 1 (whole number), which has no keys"),
        ("name: a\n", ("finetune.tasks=[]", "finetune.tasks.0.path=x"), "is not an index of a list of 0"),
        ("name: a\n", ("optimizer.lr=: :",), "not YAML"),
        ("name: a\n", ("optimizer.learning_rate=1",), "optimizer.learning_rate: unknown key"),
        ("name: !!python/object/apply:os.system [true]\n", (), "not YAML"),
    ],
)
def test_each_bad_input_says_what_is_wrong(tmp_path: Path, text: str, overrides: tuple[str, ...], expected: str) -> None:
    if overrides == ("seed.x=3",) and "seed" not in text:
        expected = "seed: expected a whole number"
    assert expected in "\n".join(problems_of(tmp_path, text, *overrides))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(NotFoundError):
            load_run_config(path)


def test_resolved_config_is_valid_input(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, "name: a\nfinetune: {tasks: [{name: b, path: c}]}\nbatch: {phases: [{from_step: 7}]}\n"))
    again = tmp_path / "resolved.yaml"
    again.write_bytes(dump_yaml(config))
    assert load_run_config(again) == config


def test_an_objective_in_a_word(tmp_path: Path) -> None:
    text = "name: a\nmodel: {architecture: gpt2, transformers: {activation_function: relu}}\nobjective: "
    config = load_run_config(write(tmp_path, text + "clm\n"))
    assert (config.objective.kind, config.objective.sentence_objective) == ("clm", "none")
    assert load_run_config(write(tmp_path, text + "{kind: clm}\n")) == config
    again = tmp_path / "resolved.yaml"
    again.write_bytes(dump_yaml(config))
    assert load_run_config(again) == config


@given(st.sampled_from(sorted(dotted_names(RunConfig))), st.integers(0, 1_000_000))
def test_a_letter_too_many_finds_the_key(dotted: str, position: int) -> None:
    parent, _, key = dotted.rpartition(".")
    if parent.endswith(("tasks", "phases")) or parent.startswith("mixture"):  # lists: their keys are numbers
        return
    at = position % (len(key) + 1)
    wrong = f"{key[:at]}z{key[at:]}"
    base = RunConfig(name="a")
    with pytest.raises(ConfigError) as caught:
        override_run_config(base, [f"{parent}.{wrong}=1".lstrip(".")])
    siblings = [name.rpartition(".")[2] for name in dotted_names(RunConfig) if name.rpartition(".")[0] == parent]
    assert any(f"nearest: {f'{parent}.' if parent else ''}{name}" in caught.value.cause for name in siblings) or len(key) < 3


def test_clusters(tmp_path: Path) -> None:
    assert load_cluster_config("local") == LocalCluster()
    path = tmp_path / "mine.yaml"
    path.write_text("kind: local\nnum_workers: 3\n")
    assert load_cluster_config(str(path)).num_workers == 3
    path.write_text("num_worker: 3\n")
    with pytest.raises(ConfigError, match="num_worker: unknown key; nearest: num_workers"):
        load_cluster_config(str(path))
    with pytest.raises(NotFoundError) as missing:
        load_cluster_config("nowhere")
    assert "local" in missing.value.remedy


def test_a_cluster_that_is_there_already(tmp_path: Path) -> None:
    built_in = load_cluster_config("ray")
    assert isinstance(built_in, RayCluster)
    assert built_in.address == "auto"
    path = tmp_path / "mine.yaml"
    path.write_text("kind: ray\naddress: 10.0.0.1:6379\nnum_workers: 4\nmin_workers: 2\n")
    assert load_cluster_config(str(path)) == RayCluster(kind="ray", address="10.0.0.1:6379", num_workers=4, min_workers=2)


def test_on_this_machine_metrics_are_published_only_when_asked(tmp_path: Path) -> None:
    """Ray's endpoint for Prometheus asks for no token, and listens on all interfaces."""
    path = tmp_path / "mine.yaml"
    path.write_text("kind: local\nmetrics: true\n")
    assert load_cluster_config(str(path)).publishes_metrics
    assert not load_cluster_config("local").publishes_metrics
    assert load_cluster_config("ray").publishes_metrics
    path.write_text("kind: slurm\nenvironment: {venv: /venv}\n")
    on_slurm = load_cluster_config(str(path))
    assert isinstance(on_slurm, SlurmCluster)
    assert not on_slurm.inside().publishes_metrics, "its machines' network is everybody's"
    assert on_slurm.model_copy(update={"metrics": True}).inside().publishes_metrics


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: mainframe", "kind: expected 'local' or 'ray' or 'slurm' or 'kuberay' or 'ray_up', found 'mainframe' (text)"),
        ("kind: [ray]", "kind: expected 'local' or 'ray' or 'slurm' or 'kuberay' or 'ray_up', found ['ray'] (list)"),
        ("address: auto", "address: unknown key"),  # of another kind
        ("kind: ray\nobject_store_bytes: 100000000", "object_store_bytes: unknown key"),
        ("kind: ray\nmin_worker: 1", "min_worker: unknown key; nearest: min_workers"),
        ("kind: ray\nmin_workers: 0", "min_workers: expected greater than or equal to 1, found 0 (whole number)"),
        ("kind: ray\nnum_workers: 2\nmin_workers: 3", "min_workers 3 exceeds num_workers 2"),
        ("kind: ray\naddress: http://10.0.0.1:8265", "address: "),
        ("kind: ray\naddress: 10.0.0.1", "address: "),
        ("kind: ray\nenvironment: {}", "environment: expected exactly one of image, venv, pip, found none"),
        ("kind: ray\nenvironment: {venv: /a, pip: b.txt}", "environment: expected exactly one of image, venv, pip, found venv and pip"),
        ("kind: ray\nenvironment: {image: a}", "environment: expected venv or pip, found image: machines that run already have their image"),
        ("kind: ray\nenvironment: {conda: a}", "environment.conda: unknown key"),
        ("kind: kuberay\nenvironment: {venv: /a}", "environment: expected image or pip, found venv: pods start from an image"),
        ("kind: kuberay", "environment: required, not given"),
        ("kind: kuberay\nenvironment: {image: a}\nmemory: 3GB", "memory: expected"),
        ("kind: slurm\nenvironment: {image: a}", "environment: expected venv, found image"),
        ("kind: ray_up\nenvironment: {image: a}\nprovider: {type: aws, region: r}", "head: required, not given"),
        ("kind: ray_up\nenvironment: {image: a}\nprovider: {type: local, head_ip: h}\nhead: {config: {}}", "head: not given on premise"),
        ("kind: ray_up\nenvironment: {image: a}\nprovider: {type: local, head_ip: h, worker_ips: [w]}", "ssh_private_key: required on premise"),
        ('kind: slurm\nenvironment: {venv: /a}\nsetup_commands: ["a\\nb"]', "setup_commands.0: expected"),
    ],
)
def test_cluster_files_that_cannot_be_honoured(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_cluster_config(str(path))
    assert said in caught.value.cause


def test_what_lies_in_the_current_folder_does_not_hide_a_built_in_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    assert load_cluster_config("local") == LocalCluster()
    (tmp_path / "mine").write_text("num_workers: 3\n")
    assert load_cluster_config("mine").num_workers == 3


def test_files_that_cannot_be_read_are_no_bugs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for path in ("file/run.yaml", "loop.yaml"):
        with pytest.raises(NotFoundError):
            load_run_config(tmp_path / path)


@pytest.mark.parametrize("path", sorted((example_configs() / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_clusters_are_valid_and_say_what_they_are(path: Path) -> None:
    assert load_cluster_config(path.stem).kind == path.stem.replace("-", "_")


@pytest.mark.parametrize("path", sorted((example_configs() / "runs").glob("*.yaml")), ids=lambda path: path.stem)
def test_example_runs_are_valid(path: Path) -> None:
    assert load_run_config(path).name == path.stem


def test_committed_schemas_are_current() -> None:
    for name, schema in json_schema().items():
        committed = json.loads((example_configs() / "schema" / f"{name}.schema.json").read_text())
        assert committed == json.loads(json.dumps(schema)), "run: maskwright schema --write cluster_configs/schema"
