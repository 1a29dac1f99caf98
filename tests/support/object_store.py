"""A real S3 server over HTTP (moto) in a process of its own, which fails on request: what a corpus in a store goes through.

The server process runs this file: moto's WSGI application behind `Faults`.
"""

import importlib.util
import io
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from typing import Any

import fsspec
import pytest

from tests.support.required import missing

ALWAYS = 1_000_000
_CONTROL = "/-/faults"
_HTML = b"<!DOCTYPE html>\n<html><head><title>Not here</title></head><body><h1>404 Not Found</h1></body></html>\n"
_SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_INTERNAL = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@dataclass
class Fault:
    """What happens to the next `times` requests of a method (GET, PUT) whose path contains `path`.

    Kinds: `500`, `503` (SlowDown), `403`, `slow` (answers after `delay_s`), `truncated` (half of the body, then the connection ends; of a PUT
    half is stored), `reset` (by the server, before an answer), `lost` (carried out, and answered with 500), `html` (a page with status 200),
    `wrong` (a flipped bit in the body).
    """

    kind: str
    times: int = 1
    path: str = ""
    delay_s: float = 60.0
    method: str = "GET"


@dataclass
class ObjectStore:
    """The running server."""

    port: int
    process: "subprocess.Popen[bytes]"
    bucket: str = "corpora"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """Also serves `http://…/<bucket>/<key>` to a plain web client."""
        return f"http://127.0.0.1:{self.port}"

    def fail(self, *faults: Fault) -> None:
        """From now on. Without arguments: no more."""
        self._control(json.dumps([asdict(fault) for fault in faults]).encode())

    def requests(self) -> list[str]:
        """`GET /path range` of every request since `fail` was called, control requests left out."""
        return json.loads(self._control(None))

    def stop(self) -> None:
        """The server is gone for good: connections are refused."""
        self.process.terminate()
        self.process.wait(10)

    def _control(self, body: bytes | None) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.endpoint + _CONTROL, data=body), timeout=10) as answer:
            return answer.read()


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start a server, with a bucket in it. Skips the test where moto or s3fs is not installed."""
    for package in ("moto", "s3fs", "flask"):
        if importlib.util.find_spec(package) is None:
            missing("s3", f"the package {package} is not installed")
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    errors = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen([sys.executable, "-m", "tests.support.object_store"], stdout=subprocess.PIPE, stderr=errors, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            errors.seek(0)
            raise AssertionError(f"the server ended with exit code {process.wait(10)}\n{errors.read().decode(errors='replace')}")
        store = ObjectStore(int(line), process)
        urllib.request.urlopen(urllib.request.Request(f"{store.endpoint}/{store.bucket}", method="PUT"), timeout=10).close()
        yield store
    finally:
        process.kill()
        process.wait(10)
        errors.close()


@contextmanager
def reachable_object_store(**settings: Any) -> Iterator[ObjectStore]:
    """A server that this process, and processes it starts from now on, reach as `s3://`: what a user has in the environment, and in fsspec's
    configuration (with more `settings`)."""
    with object_store() as store, pytest.MonkeyPatch.context() as patch:
        for name, value in client_environment(store.endpoint).items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": store.endpoint, **settings})
        _forget_fork_server()
        try:
            yield store
        finally:
            _forget_fork_server()


def client_environment(endpoint: str) -> dict[str, str]:
    """Environment of a client of the server."""
    return {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}


def _forget_fork_server() -> None:
    """End the process that others are forked from: it has the environment of the moment when it was started, perhaps by an earlier test."""
    server: Any = forkserver._forkserver
    server._stop()


class Faults:
    """WSGI middleware that makes requests fail as asked through `/-/faults`."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._faults: list[Fault] = []
        self._requests: list[str] = []
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _CONTROL:
            return self._answer_control(environ, start_response)
        fault = self._take(environ)
        if fault is None:
            return self._application(environ, start_response)
        if fault.kind == "reset":
            connection: socket.socket = environ["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(connection.detach())  # at once, although files made of it are open
            raise ConnectionResetError
        if fault.kind == "slow":
            time.sleep(fault.delay_s)
            return self._application(environ, start_response)
        if fault.kind == "lost":
            list(self._application(environ, lambda *_: None))
        fixed = {"500": ("500 Internal Server Error", _INTERNAL), "lost": ("500 Internal Server Error", _INTERNAL)}
        fixed |= {"503": ("503 Slow Down", _SLOW_DOWN), "403": ("403 Forbidden", _DENIED), "html": ("200 OK", _HTML)}
        if fault.kind in fixed:
            status, body = fixed[fault.kind]
            kind = "text/html" if fault.kind == "html" else "application/xml"
            start_response(status, [("Content-Type", kind), ("Content-Length", str(len(body)))])
            return [body]
        if fault.method == "PUT":
            assert fault.kind == "truncated", fault.kind
            stored = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
            stored = stored[: len(stored) // 2]
            environ |= {"wsgi.input": io.BytesIO(stored), "CONTENT_LENGTH": str(len(stored))}
            return self._application(environ, start_response)
        return self._spoilt(fault, environ, start_response)

    def _spoilt(self, fault: Fault, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The real answer with its length announced, and half of it or a flipped bit in it."""
        answered: list[Any] = []
        body = bytearray(b"".join(self._application(environ, lambda *arguments: answered.append(arguments))))
        status, headers = answered[0][:2]
        headers = [(name, value) for name, value in headers if name.lower() not in ("content-length", "etag")]
        start_response(status, [*headers, ("Content-Length", str(len(body)))])
        if fault.kind == "truncated":
            return [bytes(body[: len(body) // 2])]
        assert fault.kind == "wrong", fault.kind
        body[len(body) // 2] ^= 4
        return [bytes(body)]

    def _take(self, environ: dict[str, Any]) -> Fault | None:
        with self._lock:
            self._requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ.get('HTTP_RANGE', '')}".strip())
            for fault in self._faults:
                if fault.times and fault.method == environ["REQUEST_METHOD"] and fault.path in environ["PATH_INFO"]:
                    fault.times -= 1
                    return fault
        return None

    def _answer_control(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self._lock:
            body = json.dumps(self._requests).encode()
            if environ["REQUEST_METHOD"] == "POST":
                wanted = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                self._faults, self._requests = [Fault(**each) for each in wanted], []
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, Faults(DomainDispatcherApplication(create_backend_app)), threaded=True)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    _serve()
