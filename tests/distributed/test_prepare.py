"""Preparing on a cluster: one node, three nodes and no cluster at all give the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.text import generate_documents

_PREPARE = """
import json, os, sys
from data_pipeline import building, sources
from data_pipeline.config import CorpusConfig, TokenizerConfig
from data_pipeline.executor import InProcessExecutor
from data_pipeline.prepare import prepare
from data_pipeline.storage import Location

source, storage, num_nodes = sys.argv[1], sys.argv[2], int(sys.argv[3])
building._HASH_PARTITION_BYTES = sources._MIN_PARTITION_BYTES = 40_000
executor, cluster = InProcessExecutor(), None

if num_nodes:
    import ray
    from ray.cluster_utils import Cluster
    from launcher.ray_data import RayExecutor
    from tests.distributed.test_prepare import node_of

    arguments = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args={**arguments, "include_dashboard": False})
    for _ in range(num_nodes - 1):
        cluster.add_node(**arguments)
    ray.init(address=cluster.address, log_to_driver=False)
    executor = RayExecutor(os.getcwd())
    print("nodes", len(set(executor.map(node_of, list(range(8 * num_nodes))))))
corpus = CorpusConfig(source=source, validation_fraction=0.1, near_duplicates={}, personal_data=("email",))
texts = json.load(open(source + ".held-out.json"))
prepared = prepare(corpus, TokenizerConfig(vocab_size=400), (32, 64), Location.at(storage), executor, print, test_texts=lambda: texts)
if num_nodes:
    ray.shutdown()
    cluster.shutdown()
print("done")
"""


def node_of(item: int) -> str:
    """Where a task runs."""
    import ray

    return ray.get_runtime_context().get_node_id()


def _run(folder: Path, storage: str, num_nodes: int) -> str:
    """In a process of its own, whose time-out ends the cluster with it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_enable_worker_prestart": "0", "RAY_AUTH_MODE": "disabled"}
    environment = {**clean, **quiet, "PYTHONPATH": str(Path(__file__).parents[2]), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _PREPARE, str(folder / "texts"), str(folder / storage), str(num_nodes)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("corpora/texts-*/**/*")) if path.is_file()}


@pytest.mark.full
@pytest.mark.timeout(500)
def test_the_same_bytes_on_one_and_on_three_nodes(tmp_path: Path) -> None:
    documents = generate_documents(400, 8)
    (tmp_path / "texts").mkdir()
    for number in range(8):
        lines = [json.dumps({"text": text}) + "\n" for text in documents[number::8] + documents[:3]]
        (tmp_path / "texts" / f"{number}.jsonl").write_text("".join(lines))
    (tmp_path / "texts.held-out.json").write_text(json.dumps({"task": documents[20:30]}))
    _run(tmp_path, "here", 0)
    here = _files(tmp_path / "here")
    assert len([name for name in here if "train-" in name]) > 4
    assert "nodes 1\n" in _run(tmp_path, "one", 1)
    assert _files(tmp_path / "one") == here
    assert "nodes 3\n" in _run(tmp_path, "three", 3)
    assert _files(tmp_path / "three") == here
