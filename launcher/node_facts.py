"""What a node says of itself when doctor asks: software, shared memory, clock, ports (runs on the node; imports no torch)."""

import hashlib
import os
import platform
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from launcher.lease import this_machine
from launcher.measurements import Facts

GCS, RAYLET, DASHBOARD = "the head's port", "the node's port", "the dashboard's port"
_PACKAGES = ("accelerate", "deepspeed", "numpy", "ray", "tokenizers", "torch", "transformers", "webdataset")
_OURS = ("launcher", "trainer", "data_pipeline")
_ANSWER_S = 3.0
_LISTENS = "0A"


def look_around(ports: Mapping[str, int], address: str) -> Facts:
    """The facts of this node, whose ports of Ray and address these are."""
    beyond = ports_beyond_loopback()
    asks = {f"{what} {port}": _STRANGERS[what](f"{address}:{port}") for what, port in ports.items() if port in beyond}
    opened, unsure = (tuple(port for port, is_open in asks.items() if is_open is wanted) for wanted in (True, None))
    shared = os.statvfs("/dev/shm")
    return Facts(this_machine().partition("/")[0], software(), shared.f_blocks * shared.f_frsize, opened, unsure)


def software() -> dict[str, str]:
    """Versions of what must be the same everywhere, by name; of our own packages a digest of their sources."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return {**found, "maskwright": source_digest()}


def source_digest() -> str:
    """Digest of our packages as they lie here, installed or in a checkout; the same for the same sources."""
    digest = hashlib.sha256()
    for name, path in _sources():
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _sources() -> Iterator[tuple[str, Path]]:
    for package in _OURS:
        spec = find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
        yield from ((f"{package}/{path.relative_to(folder)}", path) for path in sorted(folder.rglob("*.py")))


def read_clock() -> float:
    """Seconds since 1970 by this node's clock."""
    return time.time()


def ports_beyond_loopback(tables: Mapping[str, str] | None = None) -> set[int]:
    """TCP ports that listen on an address other machines can reach, from the kernel's tables (`/proc/net/tcp`, `tcp6`, or `tables`)."""
    texts = tables if tables is not None else {name: _read(Path("/proc/net") / name) for name in ("tcp", "tcp6")}
    found: set[int] = set()
    for text in texts.values():
        for line in text.splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].partition(":")
            if fields[3] == _LISTENS and not _is_loopback(address):
                found.add(int(port, 16))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # a kernel without IPv6
        return ""


def _is_loopback(address: str) -> bool:
    """Of an address as the kernel prints it: words of 32 bits, each in the machine's (little-endian) order."""
    data = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
    if len(data) == 16 and data[:12] == bytes(10) + b"\xff\xff":
        data = data[12:]
    return data[0] == 127 if len(data) == 4 else data == bytes(15) + b"\x01"


def _obeys(method: str, address: str) -> bool | None:
    """Whether a server of Ray answers a call (one that needs no arguments) without a token; None where it neither answers nor asks for one."""
    import grpc

    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
        try:
            call(b"", timeout=_ANSWER_S)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            return False if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED) else None
    return True


def _answers_requests(address: str) -> bool | None:
    """Whether the dashboard, which starts jobs, answers a request without a token; None where it neither answers nor asks for one."""
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(f"http://{address}/api/jobs/", timeout=_ANSWER_S).close()
    except urllib.error.HTTPError as error:
        return False if error.code in (401, 403) else None
    except OSError:
        return None
    return True


_STRANGERS: Mapping[str, Callable[[str], bool | None]] = {
    GCS: partial(_obeys, "/ray.rpc.NodeInfoGcsService/CheckAlive"),
    RAYLET: partial(_obeys, "/ray.rpc.NodeManagerService/GetSystemConfig"),
    DASHBOARD: _answers_requests,
}
"""How somebody without a token would knock."""
