"""The seam to Ray's Jobs API: gives a job to a cluster over HTTP, asks what became of it, ends it (talks to the cluster's dashboard)."""

import logging
import os
import re
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_pipeline.errors import UnreachableError
from launcher.clusters.local import environment, read_token_again
from launcher.clusters.tokens import has_token, require_token
from launcher.job_request import JobRequest
from launcher.taken_jobs import JobState

_CONNECT_S = 5.0
_ANSWER_S = 60.0
"""Between two bytes of an answer. Ray's client by itself waits for ever."""
_HERE = "RAY_API_SERVER_ADDRESS"
"""Ray's client goes to this address, whatever it is told, or else to RAY_ADDRESS."""

_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers that tell on stderr what is sent: the launcher says it in a line."""

_STATES: Mapping[str, Literal["waiting", "running", "ended"]] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "STOPPED": "ended",
    "SUCCEEDED": "ended",
    "FAILED": "ended",
}


@dataclass(frozen=True)
class RayJobs:
    """The jobs of a cluster that answers. Every method raises UnreachableError when it does not."""

    dashboard: str
    _client: Any

    @property
    def place(self) -> str:
        """Address of its dashboard."""
        return self.dashboard

    @classmethod
    def connect(cls, dashboard: str, answer_s: float = _ANSWER_S) -> "RayJobs":
        """Make sure of the cluster at an address, and that it takes our token; it may take `answer_s` seconds for each answer.

        Raises:
            UnreachableError: it does not answer, does not accept us, or would be talked to without a token.
        """
        address = urlsplit(dashboard)
        host = f"[{address.hostname}]" if ":" in (address.hostname or "") else address.hostname
        require_token(f"{host}:{address.port or 80}", has_token=has_token())
        token = {"RAY_AUTH_MODE": "token"} if has_token() else {}
        with environment(token), _at(dashboard), _asking(dashboard):
            return cls(dashboard, _client_of(dashboard, answer_s))

    def post(self, request: JobRequest, package: bytes) -> None:
        """Hand a job over; `package` is what the name of its working_dir stands for. Packages that are there already are not sent again."""
        with tempfile.TemporaryDirectory(prefix="maskwright-submit-") as folder, _asking(self.dashboard):
            file = Path(folder) / request.runtime_env["working_dir"]
            file.write_bytes(package)
            sent = replace(request, runtime_env={**request.runtime_env, "working_dir": str(file)})
            self._client.submit_job(**sent.to_json())

    def look(self, job: str) -> JobState:
        """What became of a job."""
        with _asking(self.dashboard):
            try:
                found = self._client.get_job_info(job)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return JobState("unknown")
                raise
        status = str(getattr(found.status, "value", found.status))
        return JobState(_STATES[status], status == "STOPPED", exit_code=found.driver_exit_code, message=found.message or "")

    def log(self, job: str) -> str:
        """Everything that the job's command has printed."""
        with _asking(self.dashboard):
            return self._client.get_job_logs(job)

    def end(self, job: str) -> None:
        """Ask Ray to end a job: its command has `STOP_WAIT_S` seconds to save."""
        with _asking(self.dashboard):
            self._client.stop_job(job)


def _client_of(dashboard: str, answer_s: float) -> Any:
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": (_CONNECT_S, answer_s), **options})

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    read_token_again()
    return Client(dashboard)


@contextmanager
def _at(dashboard: str) -> Generator[None]:
    before = os.environ.get(_HERE)
    os.environ[_HERE] = dashboard
    try:
        yield
    finally:
        os.environ.pop(_HERE)
        if before is not None:
            os.environ[_HERE] = before


@contextmanager
def _asking(dashboard: str) -> Generator[None]:
    try:
        yield
    except Exception as error:  # of Ray, requests and json alike
        if type(error).__name__ == "AuthenticationError":
            problem = "wants a Ray token" if str(error).startswith("Authentication required") else "does not accept our Ray token"
            remedy = "Put the cluster's token into ~/.ray/auth_token (mode 0600), or name its file in RAY_AUTH_TOKEN_PATH."
            raise UnreachableError(f"the cluster at {dashboard} {problem}", remedy) from error
        remedy = (
            "Look whether the cluster runs and `dashboard` in the cluster file is right: `ray start --head` prints it (--dashboard-host for others)."
        )
        raise UnreachableError(f"no Ray cluster takes jobs at {dashboard}: {_told(error)}", remedy) from error


def _told(error: Exception) -> str:
    """The line that says most: of an answer with a traceback the last."""
    lines = [line.strip(" .") for line in str(error).splitlines() if re.search(r"\w", line)]
    return f"{type(error).__name__}: {lines[-1][:300]}" if lines else type(error).__name__
