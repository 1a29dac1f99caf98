"""Kubernetes' API as far as `kubectl` asks it for RayJobs: an HTTP server on the loopback that remembers them and does nothing about them."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml


class KubernetesApi:
    """`with KubernetesApi() as api`: it has the RayJobs of a namespace `research`."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log: str | None = None
        """Of the submitter; None: it has not started."""
        self.knows_rayjobs = True
        self.refusal: tuple[int, str, str] | None = None
        """What who creates is told: status, reason and message. From 500 on the RayJob is there all the same."""
        self.asked: dict[str, str] = {}
        """The last path of each method."""

    def __enter__(self) -> "KubernetesApi":
        api = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                api.asked[self.command] = self.path
                body = b"" if self.command != "POST" else b"".join(iter(self._chunk, b""))
                status, answer = api.answer(self.command, self.path.partition("?")[0], body)
                data = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "text/plain" if isinstance(answer, str) else "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _chunk(self) -> bytes:
                size = int(self.rfile.readline(), 16)
                data = self.rfile.read(size)
                self.rfile.readline()
                return data

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write_kubeconfig(self, path: Path) -> None:
        """A configuration for kubectl that leads here."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": self.address}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
            "current-context": "here",
        }
        path.write_text(yaml.safe_dump(config))

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status, and JSON or text."""
        name = path.rpartition("/")[2]
        own, batch = "/apis/ray.io/v1/namespaces/research/rayjobs", "/apis/batch/v1/namespaces/research/jobs"
        found: tuple[int, Any] = (404, failure("NotFound", f"{path} not found"))
        match method, path:
            case "GET", "/api":
                found = 200, {"kind": "APIVersions", "versions": ["v1"]}
            case "GET", "/apis":
                versions = {"ray.io": "v1", "batch": "v1"} if self.knows_rayjobs else {"batch": "v1"}
                groups = [{"name": g, "versions": [{"groupVersion": f"{g}/{v}", "version": v}]} for g, v in versions.items()]
                found = 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
            case "GET", "/api/v1":
                found = 200, resources("v1", ("pods", "Pod"))
            case "GET", "/apis/batch/v1":
                found = 200, resources("batch/v1", ("jobs", "Job"))
            case "GET", "/apis/ray.io/v1":
                found = (200, resources("ray.io/v1", ("rayjobs", "RayJob"))) if self.knows_rayjobs else (404, "404 page not found")
            case "POST", _ if path == own:
                found = self._created(json.loads(body))
            case "GET", _ if path.startswith(own) and name in self.jobs:
                found = 200, self.jobs[name]
            case "DELETE", _ if path.startswith(own) and name in self.jobs:
                del self.jobs[name]
                found = 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
            case "GET", _ if path.startswith(batch) and name in self.jobs and self.log is not None:
                job = {"metadata": {"name": name, "namespace": "research"}, "spec": {"selector": {"matchLabels": {"job": name}}}}
                found = 200, {"kind": "Job", "apiVersion": "batch/v1", **job}
            case "GET", "/api/v1/namespaces/research/pods":
                pod = {"metadata": {"name": "submitter", "namespace": "research"}, "spec": {"containers": [{"name": "ray-job-submitter"}]}}
                found = 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [{**pod, "status": {"phase": "Running"}}]}
            case "GET", "/api/v1/namespaces/research/pods/submitter/log":
                found = 200, self.log or ""
            case _:
                pass
        return found

    def _created(self, job: dict[str, Any]) -> tuple[int, Any]:
        if self.refusal is None or self.refusal[0] >= 500:
            self.jobs[job["metadata"]["name"]] = job
        return (201, job) if self.refusal is None else (self.refusal[0], failure(*self.refusal[1:], code=self.refusal[0]))


def failure(reason: str, message: str, code: int = 404) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": message, "code": code}


def resources(group: str, *kinds: tuple[str, str]) -> dict[str, Any]:
    verbs = ["get", "list", "create", "delete"]
    found = [{"name": name, "singularName": kind.lower(), "kind": kind, "namespaced": True, "verbs": verbs} for name, kind in kinds]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": found}
