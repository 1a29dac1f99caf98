"""The seam to Kubernetes: gives it RayJobs, asks what became of them and ends them (starts `kubectl`, which has the user's credentials)."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from data_pipeline.errors import ConfigError, UnreachableError
from data_pipeline.storage import Location
from launcher.cluster_config import NAMESPACE, KubeRayCluster
from launcher.clusters.kuberay import SUBMITTER, Software, rayjob, rayjob_name
from launcher.job_request import require_no_credentials
from launcher.requirements import requirements
from launcher.submission import Submission, submission_folder
from launcher.taken_jobs import JobState
from trainer.runlog import RunFolder

_MARGIN_S = 5.0
"""For kubectl itself, beside what the API server may take."""
_FETCHED = ("s3://", "gs://")
"""Stores that Ray fetches packages from."""
_ANSWER = re.compile(r"Error from server|The \S+ .* is invalid")
"""How lines begin in which kubectl tells the answer of an API server."""
_REFUSED = re.compile(r"\((Forbidden|BadRequest|Invalid)\)|The \S+ .* is invalid|strict decoding error")
_GROUP = "/apis/ray.io/v1"
_EXIT_CODE = re.compile(r"failed with exit code (-?\d+)")
_WAITING = {"", "New", "Initializing", "Waiting", "Retrying", "Suspending", "Suspended"}
_LOST = {"DeadlineExceeded", "JobStatusCheckTimeoutExceeded", "JobDeploymentStatusTransitionGracePeriodExceeded"}
"""Reasons of the operator's own."""


@dataclass(frozen=True)
class RayJobRequest:
    """A RayJob, and where its packages are to lie."""

    manifest: dict[str, Any]
    package: Location

    @property
    def artefact(self) -> str:
        """The manifest, for `kubectl create -f`."""
        return yaml.safe_dump(self.manifest, sort_keys=False, width=160)

    def to_json(self) -> dict[str, Any]:
        """JSON object."""
        return {"manifest": self.manifest, "package": self.package.url}


def rayjob_request(run: RunFolder, submission: Submission, cluster: KubeRayCluster, package: str) -> RayJobRequest:
    """The request for a submission: its packages travel through the run's storage, which all pods see.

    Raises:
        ConfigError: the storage has credentials in its address, pods do not see it, or Ray fetches no packages from there.
    """
    require_no_credentials(run)
    file = submission_folder(run, submission.number) / package
    url = f"file://{file.path}" if file.is_local else file.url
    if not file.is_local and not url.startswith(_FETCHED):
        raise ConfigError(f"Ray fetches no packages from {run.root.parent.url}", f"Use a claim, or storage of {' or '.join(_FETCHED)}.")
    pip = cluster.environment.pip
    software = Software(url, version("ray"), f"{sys.version_info[0]}.{sys.version_info[1]}", requirements(pip) if pip is not None else ())
    return RayJobRequest(rayjob(run, submission, cluster, software), file)


def address_of(cluster: KubeRayCluster) -> str:
    """Where its jobs are, in a word: namespace, and context where one was named."""
    return cluster.namespace if cluster.context is None else f"{cluster.namespace}@{cluster.context}"


def with_context(cluster: KubeRayCluster, answer_s: float) -> KubeRayCluster:
    """The cluster with the context that kubectl has now, where its file names none: what runs there is found there later, whatever is current then.

    Raises:
        ConfigError: that context has a name which a cluster file cannot give. UnreachableError: there is no kubectl.
    """
    if cluster.context is not None:
        return cluster
    context = KubeRayJobs(address_of(cluster), answer_s).current_context()
    named = cluster.model_copy(update={"context": context or None})
    if not re.fullmatch(NAMESPACE, address_of(named)):
        cause = f"kubectl's current context {context!r} has characters that no cluster file may have"
        raise ConfigError(cause, "Give it another name: `kubectl config rename-context`.")
    return named


@dataclass(frozen=True)
class KubeRayJobs:
    """The RayJobs of a namespace. Every method raises UnreachableError when kubectl does not get an answer."""

    place: str
    """Its address."""
    answer_s: float

    @classmethod
    def connect(cls, address: str, answer_s: float) -> "KubeRayJobs":
        """Make sure that Kubernetes answers, and knows RayJobs.

        Raises:
            UnreachableError: it does not, or there is no kubectl.
        """
        jobs = cls(address, answer_s)
        try:
            jobs._ask("get", "--raw", _GROUP)
        except UnreachableError as error:
            if "(NotFound)" not in error.cause:
                raise
            raise UnreachableError("Kubernetes there knows no RayJobs", "Install the KubeRay operator, 1.5.1 or later.") from error
        return jobs

    def current_context(self) -> str:
        """Of kubectl; empty where there is none, as in a pod that has the rights of its service account."""
        try:
            return self._ask("config", "current-context").strip()
        except UnreachableError as error:
            if "current-context is not set" in error.cause:
                return ""
            raise

    def post(self, request: RayJobRequest, package: bytes) -> None:
        """Put the packages into storage, and create the RayJob. An operator that does not know all that it says, such as tokens, does not get it.

        Raises:
            ConfigError: Kubernetes refuses it. UnreachableError: whether there is one now is not known; it is deleted where that can be asked for.
        """
        request.package.write_bytes(package)
        url = f"{_GROUP}/namespaces/{self.place.partition('@')[0]}/rayjobs?fieldValidation=Strict"
        try:
            self._ask("create", "--raw", url, "--filename=-", given=json.dumps(request.manifest))
        except UnreachableError as error:
            if _REFUSED.search(error.cause):
                raise ConfigError(error.cause, _remedy_of(error.cause)) from error
            name = request.manifest["metadata"]["name"]
            with suppress(UnreachableError):
                self._delete(name)
            remedy = f"It may have been created and cost money: `{' '.join(self._kubectl())} delete rayjob {name}`, then submit again."
            raise UnreachableError(error.cause, remedy) from error

    def look(self, job: str) -> JobState:
        """What became of a RayJob."""
        found = self._ask("get", "rayjobs.ray.io", rayjob_name(job), "--ignore-not-found", "--output=json")
        return state_of(json.loads(found).get("status", {})) if found.strip() else JobState("unknown")

    def log(self, job: str) -> str:
        """What its driver has printed; nothing before it was submitted inside."""
        try:
            return self._ask("logs", f"job/{rayjob_name(job)}", f"--container={SUBMITTER}", "--pod-running-timeout=1s")
        except UnreachableError as error:
            if re.search(r"NotFound|waiting to start|PodInitializing|ContainerCreating|timed out waiting", error.cause):
                return ""
            raise

    def end(self, job: str) -> None:
        """Delete a RayJob: its pods are taken away within seconds, saved or not. What is to be saved is saved by `stop` before, through storage."""
        self._delete(rayjob_name(job))

    def _delete(self, name: str) -> None:
        self._ask("delete", "rayjobs.ray.io", name, "--ignore-not-found", "--wait=false")

    def _kubectl(self) -> list[str]:
        namespace, _, context = self.place.partition("@")
        return ["kubectl", f"--namespace={namespace}", *([f"--context={context}"] if context else [])]

    def _ask(self, *arguments: str, given: str | None = None) -> str:
        command = [*self._kubectl(), f"--request-timeout={self.answer_s:.0f}s", *arguments]
        remedy = f"Look whether `{' '.join(self._kubectl())} get rayjobs` works; `context` in the cluster file names another Kubernetes."
        nothing = subprocess.DEVNULL if given is None else None  # else a plug-in for credentials may wait for what a person types
        limit_s = self.answer_s + _MARGIN_S
        try:
            done = subprocess.run(command, input=given, stdin=nothing, capture_output=True, text=True, timeout=limit_s, check=False)
        except FileNotFoundError:
            cause = "there is no kubectl on this machine, through which Kubernetes is asked"
            raise UnreachableError(cause, "Install it, with a configuration that leads to the cluster.") from None
        except subprocess.TimeoutExpired:
            raise UnreachableError(f"Kubernetes does not answer kubectl within {self.answer_s:.0f} s", remedy) from None
        if done.returncode == 0:
            return done.stdout
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        first = next((number for number, line in enumerate(lines) if _ANSWER.match(line)), len(lines) - 1)
        raise UnreachableError(f"Kubernetes does not do what kubectl asks: {' '.join(lines[first:])[:300]}", remedy)


def _remedy_of(refusal: str) -> str:
    """What to do about what Kubernetes says of a RayJob."""
    if "(Forbidden)" in refusal:
        return "Ask for the right to create rayjobs.ray.io there, or choose another namespace or context in the cluster file."
    if "authOptions" in refusal or "submitterConfig" in refusal:
        return "Install the KubeRay operator and its resource definitions, 1.5.1 or later."
    return "Correct the cluster file; `maskwright submit CONFIG --cluster FILE --dry-run` prints what Kubernetes is asked for."


def state_of(status: Mapping[str, Any]) -> JobState:
    """What the status of a RayJob says (pure). A driver that has ended says so before the operator draws its conclusions."""
    deployment, job = str(status.get("jobDeploymentStatus", "")), str(status.get("jobStatus", ""))
    message, reason = str(status.get("message", "")), str(status.get("reason", ""))
    if job == "STOPPED":
        return JobState("ended", was_stopped=True)
    if job == "SUCCEEDED" or deployment == "Complete":
        return JobState("ended", exit_code=0)
    if job != "FAILED" and deployment in _WAITING:
        return JobState("waiting")
    if job != "FAILED" and deployment == "Running":
        return JobState("running" if job == "RUNNING" else "waiting")
    code = _EXIT_CODE.search(message)
    return JobState("ended", was_lost=reason in _LOST, exit_code=int(code[1]) if code else None, message=message or reason or job or deployment)
