"""What a cluster is asked for with a submission: the request to Ray's Jobs API and the packages that travel with it (pure, but for reading them)."""

import hashlib
import io
import shlex
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, EnvironmentMismatchError
from launcher.cluster_config import RayCluster
from launcher.requirements import requirements
from launcher.submission import Submission
from trainer.redaction import redacted
from trainer.runlog import RunFolder
from trainer.software import PACKAGES, package_files

STOP_WAIT_S = 75
"""How long Ray waits for a job that it is told to stop: a checkpoint is saved within 60 s. At its default of 3 s it kills."""
MOST_BYTES = 100 << 20
"""What Ray takes with a job."""


@dataclass(frozen=True)
class JobRequest:
    """A job for Ray's Jobs API. Everybody who may list jobs can read it."""

    submission_id: str
    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    @property
    def artefact(self) -> str | None:
        """Ray is given no file."""
        return None

    def to_json(self) -> dict[str, Any]:
        """JSON object: the arguments of `submit_job`."""
        return {field.name: getattr(self, field.name) for field in fields(JobRequest)}


def job_request(run: RunFolder, submission: Submission, cluster: RayCluster, package: str) -> JobRequest:
    """The request for a submission, whose packages lie in the file `package`.

    The job finds configuration and command in the run's folder: nothing of them is in the request, and nothing of the environment here.

    Raises:
        ConfigError: the storage has credentials in its address, or there is no such constraints file.
    """
    require_no_credentials(run)
    python = cluster.environment.python if cluster.environment else "python"
    pip = cluster.environment.pip if cluster.environment else None
    return JobRequest(
        submission_id=submission.job,
        entrypoint=shlex.join([python, "-m", "launcher.submitted", run.root.url, str(submission.number)]),
        runtime_env=runtime_env_of(package, requirements(pip) if pip is not None else ()),
        metadata={"run": run.root.name},
    )


def require_no_credentials(run: RunFolder) -> None:
    """To be asked before anything is made of a run's storage: whoever may look at the cluster reads what it is asked for.

    Raises:
        ConfigError: the storage has credentials in its address.
    """
    if redacted(run.root.url) != run.root.url:
        raise ConfigError(
            f"storage {redacted(run.root.url)} has credentials in its address, which everybody on the cluster could read",
            "Give them to the machines of the cluster by their environment or a file, and leave them out of storage.",
        )


def runtime_env_of(package: str, packages: Sequence[str]) -> dict[str, Any]:
    """Ray's environment of a job: our packages, in a file or at a URL, and further ones that each node installs, if any.

    They are installed by Ray's `uv`: its `pip` leaves the command of a job, which is our driver, with the Python of the head.
    """
    further = {"uv": {"packages": list(packages)}} if packages else {}
    return {"working_dir": package, **further, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}


def pack_packages(folder: Path) -> bytes:
    """A zip of our packages in `folder`: the same bytes for the same files, whoever packs them and when.

    Raises:
        EnvironmentMismatchError: they are more than Ray takes with a job.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path in package_files(folder):
            archive.writestr(zipfile.ZipInfo(str(path.relative_to(folder))), path.read_bytes())  # of a fixed date
    data = buffer.getvalue()
    if len(data) > MOST_BYTES:
        raise EnvironmentMismatchError(
            f"the packages in {folder} are {len(data):,} bytes, more than the {MOST_BYTES:,} that may travel with a job",
            f"Remove from {', '.join(PACKAGES)} what does not belong there.",
        )
    return data


def package_name(data: bytes) -> str:
    """Name of the file with packed packages: of the same ones the same."""
    return f"maskwright-{hashlib.sha256(data).hexdigest()[:16]}.zip"
