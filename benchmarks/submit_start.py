"""From the command to the first optimizer step on two ranks: `maskwright submit` to a warm cluster, beside `torchrun` of a plain DeepSpeed script.

By the wall clock, on one machine. Warm: the cluster has run such a job before, the corpus is prepared, the page cache full. Both train the same
network in batches of one size; what torchrun starts has its tokens made up and neither log, watch nor checkpoints.
"""

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.children import ROOT
from benchmarks.claims import Claim, Goal, make_claim, middle, number, rounded
from benchmarks.harness import Options, run_benchmark
from benchmarks.machine import installed_version
from benchmarks.trainees import WORK, run_config
from launcher.start_up import PARTS, start_up
from tests.support.commands import Command, maskwright
from tests.support.ray_nodes import RayCluster
from tests.support.tiny_run import write_text

NAME = "submit_start"
TITLE = "From the command to the first optimizer step"
FACTOR, ALLOWED_S = 1.5, 10.0
"""What ours may take: so many times what torchrun takes, and so much more."""
_LIMIT_S = 300.0
_SETTLE_S = 5.0
"""After a job was stopped, until what it leaves behind disturbs nobody."""
_POLL_S = 0.02

Start = dict[str, float]
"""Seconds to the first step by part, as the run itself tells them, and `seconds` by the clock of who started the command."""


def main(options: Options) -> list[Claim]:
    """A job each, round by round, after one that is not counted."""
    ours: list[Start] = []
    peer: list[float] = []
    with tempfile.TemporaryDirectory(prefix="maskwright-bench-") as made:
        folder = Path(made)
        write_text(folder)
        with RayCluster(folder / "nodes", takes_jobs=True) as cluster:
            for _ in range(WORK["ranks"]):
                cluster.add_node()
            cluster.write_config(folder / "ray.yaml", num_workers=WORK["ranks"])
            for position in range(options.rounds + 1):
                options.progress(f"round {position} of {options.rounds}" if position else "warming up")
                own = submitted(folder, cluster, f"job-{position}")
                others = under_torchrun(folder, f"peer-{position}", _network(folder / "storage" / "job-0"))
                options.progress(f"  ours {own['seconds']:.1f} s, torchrun {others:.1f} s")
                if position:
                    ours.append(own)
                    peer.append(others)
    claim = claim_of(ours, peer, options.environment, judged=not options.short)
    rows = [(PARTS[name], number(seconds)) for name, seconds in claim.environment["parts"].items()]
    options.table("Ours, as the run tells it", ("part", "seconds"), rows)
    return [claim]


def claim_of(ours: Sequence[Start], peer: Sequence[float], environment: Mapping[str, Any], *, judged: bool) -> Claim:
    """The medians, and what the parts of ours take; pure."""
    parts = {name: rounded(middle([start.get(name, 0.0) for start in ours])) for name in PARTS}
    version = f"torchrun {installed_version('torch')} + deepspeed {installed_version('deepspeed')}"
    goal = Goal("ours", "≤", ALLOWED_S, (f"{FACTOR} × torchrun", FACTOR * (middle(peer) or 0.0))) if judged else None
    described = {**environment, "work": WORK, "parts": parts}
    seconds = [start["seconds"] for start in ours]
    return make_claim("from `submit` to the first optimizer step, warm cluster, 2 ranks", "s", described, seconds, peer, version, goal)


def submitted(folder: Path, cluster: RayCluster, name: str) -> Start:
    """Submit a run, wait for its first step and stop it, which saves a checkpoint."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(run_config(name)))
    token = cluster.environment["RAY_AUTH_TOKEN_PATH"]
    run, begun = folder / "storage" / name, time.time()
    command = Command(["submit", f"{name}.yaml", "--cluster", "ray.yaml"], folder, {"RAY_AUTH_TOKEN_PATH": token}).start()
    try:
        record = json.loads(_first_line(run / "metrics.jsonl", command))
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().rpartition("\n")[0].splitlines()]
        return {**start_up(events), "seconds": record["time"] - begun}
    finally:
        command.kill_everything()
        maskwright("stop", name, "--storage", "storage", folder=folder, RAY_AUTH_TOKEN_PATH=token)
        time.sleep(_SETTLE_S)


def under_torchrun(folder: Path, name: str, network: dict[str, Any]) -> float:
    """Seconds from torchrun's start until rank 0 has taken the step."""
    answer = folder / name
    settings = json.dumps({**WORK, "network": network, "answer": str(answer)})
    environment = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    module = ["-m", "benchmarks.contestants.torchrun_deepspeed", settings]
    command = Command(["--standalone", f"--nproc-per-node={WORK['ranks']}", *module], folder, environment, program="torch.distributed.run")
    begun = time.time()
    command.start()
    try:
        return float(_first_line(answer, command)) - begun
    finally:
        command.kill_everything()


def _network(run: Path) -> dict[str, Any]:
    """The dimensions of a run's network, from its newest checkpoint."""
    checkpoint = max(path for path in (run / "checkpoints").glob("step-*") if "." not in path.name)
    return json.loads((checkpoint / "zero" / "config.json").read_text())


def _first_line(file: Path, command: Command) -> str:
    """Of a file that a command, or what it has started elsewhere, writes. Raises RuntimeError when it does not come."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline:
        text = file.read_text() if file.exists() else ""
        if "\n" in text:
            return text.splitlines()[0]
        if command.process.poll():
            break
        time.sleep(_POLL_S)
    raise RuntimeError(f"{file.name} was not written:\n{command.text()[-2000:]}")


if __name__ == "__main__":
    run_benchmark(NAME, TITLE, main)
