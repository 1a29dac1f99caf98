"""What a node says of itself: ports by the kernel's tables, and who answers without a token."""

import http.server
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher import node_facts
from launcher.node_facts import DASHBOARD, GCS, look_around, ports_beyond_loopback, software, source_digest

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def listening(address: str, state: str = "0A") -> str:
    return f"{HEAD}   0: {address}:18EB 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n"


@pytest.mark.parametrize(
    ("address", "state", "found"),
    [
        ("00000000", "0A", {6379}),
        ("0100007F", "0A", set[int]()),
        ("0200007F", "0A", set[int]()),
        ("0500000A", "0A", {6379}),
        ("00000000", "01", set[int]()),
        ("00000000000000000000000000000000", "0A", {6379}),
        ("00000000000000000000000001000000", "0A", set[int]()),
        ("0000000000000000FFFF00000100007F", "0A", set[int]()),
        ("0000000000000000FFFF00000500000A", "0A", {6379}),
    ],
)
def test_the_kernels_tables(address: str, state: str, found: set[int]) -> None:
    assert ports_beyond_loopback({"tcp": listening(address, state), "tcp6": ""}) == found


def test_ports_of_this_machine() -> None:
    with socket.create_server(("", 0)) as everywhere, socket.create_server(("127.0.0.1", 0)) as here:
        found = ports_beyond_loopback()
        assert everywhere.getsockname()[1] in found
        assert here.getsockname()[1] not in found


@contextmanager
def web_server(code: int) -> Iterator[int]:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def knocked(what: str, port: int) -> tuple[bool, bool]:
    """Whether a port is open, and whether that is not known."""
    found = look_around({what: port}, "127.0.0.1")
    assert {*found.open_ports, *found.unsure_ports} <= {f"{what} {port}"}
    return bool(found.open_ports), bool(found.unsure_ports)


@pytest.mark.parametrize(("code", "open_unsure"), [(200, (True, False)), (401, (False, False)), (403, (False, False)), (500, (False, True))])
def test_a_dashboard_with_and_without_a_token(code: int, open_unsure: tuple[bool, bool]) -> None:
    with web_server(code) as port:
        assert knocked(DASHBOARD, port) == open_unsure


def test_a_port_that_talks_to_nobody() -> None:
    with socket.create_server(("", 0)) as silent:
        assert knocked(DASHBOARD, silent.getsockname()[1]) == (False, True)


@contextmanager
def grpc_server(code: str) -> Iterator[int]:
    import grpc

    class Refuse(grpc.GenericRpcHandler):
        def service(self, handler_call_details: Any) -> Any:
            def answer(request: bytes, context: Any) -> bytes:
                if code != "OK":
                    context.abort(grpc.StatusCode[code], "")
                return b""

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), handlers=[Refuse()])
    port = server.add_insecure_port("0.0.0.0:0")
    server.start()
    yield port
    server.stop(None).wait()


@pytest.mark.parametrize(
    ("code", "open_unsure"),
    [("OK", (True, False)), ("UNAUTHENTICATED", (False, False)), ("PERMISSION_DENIED", (False, False)), ("UNAVAILABLE", (False, True))],
)
def test_a_head_with_and_without_a_token(code: str, open_unsure: tuple[bool, bool]) -> None:
    with grpc_server(code) as port:
        assert knocked(GCS, port) == open_unsure


def test_the_digest_of_our_packages_is_that_of_their_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert software()["maskwright"] == source_digest()
    original = source_digest()
    sources = list(node_facts._sources())
    assert ("launcher/node_facts.py", Path(node_facts.__file__)) in sources
    changed = tmp_path / "node_facts.py"
    shutil.copy(node_facts.__file__, changed)
    moved = [(name, changed if name == "launcher/node_facts.py" else path) for name, path in sources]
    monkeypatch.setattr(node_facts, "_sources", lambda: moved)
    assert source_digest() == original, "where they lie does not matter"
    changed.write_text(changed.read_text() + "\n")
    assert source_digest() != original
