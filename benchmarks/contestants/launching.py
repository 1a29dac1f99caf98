"""Child's side of `train_scaling`: the same run on two ranks, started by `maskwright run` on Ray and by torchrun, by the wall clock."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.children import Measurement
from trainer.heap import HEAP_ENVIRONMENT

WARM_UP_STEPS = 10
"""First steps of a run, which do not count."""
_LIMIT_S = 600.0
_TAIL = 2000
_CLUSTER = {"kind": "local", "num_workers": 2, "threads_per_worker": 1, "use_gpu": False}


def under_ray(cores: list[int], config: dict[str, Any], corpus: str) -> Measurement:
    """Steps a second of `maskwright run` on this machine; `corpus` is the one that it finds prepared."""
    del corpus
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        (Path(folder) / "run.yaml").write_text(json.dumps({**config, "storage": folder}))  # JSON is YAML
        (Path(folder) / "cluster.yaml").write_text(json.dumps(_CLUSTER))
        _run(cores, folder, ["launcher.cli", "run", "run.yaml", "--cluster", "cluster.yaml"])
        return measured(Path(folder) / config["name"])


def under_torchrun(cores: list[int], config: dict[str, Any], corpus: str) -> Measurement:
    """Steps a second of the trainer's own loop in two processes that torchrun starts: the same entry that Ray's workers call."""
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as folder:
        job = json.dumps({"config": {**config, "storage": folder}, "corpus": corpus, "run": str(Path(folder) / config["name"])})
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={_CLUSTER['num_workers']}"]
        _run(cores, folder, [*torchrun, "-m", "benchmarks.contestants.launching", job], HEAP_ENVIRONMENT)  # as ranks under Ray have it
        return measured(Path(folder) / config["name"])


def _run(cores: list[int], folder: str, module: list[str], own: Mapping[str, str] | None = None) -> None:
    """Run a module on all of `cores`; a contestant itself is held to one. Raises RuntimeError."""
    os.sched_setaffinity(0, cores)
    # Ray's workers on one machine talk over the loopback, too.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", **(own or {})}
    done = subprocess.run(
        [sys.executable, "-m", *module], cwd=folder, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module[0]} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-_TAIL:]}")


def measured(run: Path) -> Measurement:
    """From the median of what lies between two steps' ends, everything included."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ends = [line["time"] for line in lines[WARM_UP_STEPS:]]
    between_s = median(later - earlier for earlier, later in pairwise(ends))
    return {"steps_per_s": 1 / between_s, "step_s": median(line["step_s"] for line in lines[WARM_UP_STEPS:]), "counts": {"steps": len(lines)}}


def _rank(job: dict[str, Any]) -> None:
    """A process of torchrun."""
    import torch.distributed as dist

    from trainer.config import RunConfig
    from trainer.context import LocalContext
    from trainer.pretrain import pretrain

    dist.init_process_group("gloo")
    try:
        context = LocalContext(dist.get_rank(), dist.get_world_size())
        pretrain(RunConfig.model_validate(job["config"]), job["corpus"], job["run"], context, attempt=1)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
