"""Ray's Jobs API as far as we use it, without a cluster: an HTTP server that remembers what it was given and answers what it is told to."""

import json
import threading
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class JobsApi(AbstractContextManager["JobsApi"]):
    """`with JobsApi(token) as api`: it listens on the loopback, and wants `token` where there is one."""

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.jobs: dict[str, dict[str, Any]] = {}
        """What was posted, with what became of it; a test may change that."""
        self.packages: dict[str, bytes] = {}
        self.log = ""
        self.refuses_jobs = False

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: _Handler(self, *arguments))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON."""
        what, _, rest = path.removeprefix("/api/").partition("/")
        name, _, action = rest.partition("/")
        found: tuple[int, Any] = (404, f"{path} does not exist")
        match method, what, name, action:
            case "GET", "version", _, _:
                found = 200, {"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": "s"}
            case "GET", "packages", _, _ if rest in self.packages:
                found = 200, ""
            case "PUT", "packages", _, _:
                self.packages[rest] = body
                found = 200, ""
            case "POST", "jobs", "", _:
                found = self._post(json.loads(body))
            case "GET", "jobs", _, "" if name in self.jobs:
                found = 200, self.jobs[name]
            case "GET", "jobs", _, "logs" if name in self.jobs:
                found = 200, {"logs": self.log}
            case "POST", "jobs", _, "stop" if name in self.jobs:
                self.jobs[name]["status"] = "STOPPED"
                found = 200, {"stopped": True}
            case _:
                pass
        return found

    def _post(self, request: dict[str, Any]) -> tuple[int, Any]:
        if self.refuses_jobs:
            return 500, "Traceback (most recent call last):\n  File x\nRuntimeError: no agent.\n"
        self.jobs[request["submission_id"]] = {"type": "SUBMISSION", "status": "PENDING", **request}
        return 200, {"job_id": request["submission_id"], "submission_id": request["submission_id"]}


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, api: JobsApi, *arguments: Any) -> None:
        self._api = api
        super().__init__(*arguments)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        given = self.headers.get("authorization")
        if self._api.token is not None and given != f"Bearer {self._api.token}":
            status, answer = (403, "Forbidden") if given else (401, "Unauthorized")
        else:
            status, answer = self._api.answer(self.command, self.path, body)
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""
