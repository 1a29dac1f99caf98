"""Ray's tokens: whether the user has one, and may talk to a cluster with it (reads the environment, looks at the token's file)."""

import ipaddress
import os
import socket
import stat
from pathlib import Path

from data_pipeline.errors import UnreachableError


def has_token() -> bool:
    """Whether the user has a Ray token where Ray looks for it, and has not turned tokens off."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return False
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or token_file().exists()


def token_file() -> Path:
    """Where Ray looks for a token that is not in the environment."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def require_token(address: str, *, has_token: bool) -> None:
    """Whoever reaches a Ray cluster without a token runs code on its machines, with our storage and our secrets; so does who reads the token.

    Raises:
        UnreachableError: the cluster can be reached from other machines, and there is no token, or one that other users can read.
    """
    host = address.rpartition(":")[0].strip("[]")
    if _is_loopback(host):
        return
    if not has_token:
        raise UnreachableError(
            f"the Ray cluster at {address} can be reached from other machines, and there is no token for it",
            "Start every node with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`), kept in ~/.ray/auth_token (mode 0600).",
        )
    file = token_file()
    if not os.environ.get("RAY_AUTH_TOKEN") and file.exists() and (mode := stat.S_IMODE(file.stat().st_mode)) & 0o077:
        raise UnreachableError(f"other users can read the Ray token in {file} (mode {mode:04o})", f"Keep it to yourself: chmod 600 {file}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False
