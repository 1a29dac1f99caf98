"""No cluster that others can reach without a token, and none with a token that others can read."""

from pathlib import Path

import pytest

from data_pipeline.errors import UnreachableError
from launcher.clusters.tokens import has_token, require_token


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize("address", ["10.1.2.3:6379", "8.8.8.8:6379", "nowhere.invalid:1", "[fe80::1]:6379"])
def test_no_cluster_is_talked_to_without_a_token(address: str) -> None:
    with pytest.raises(UnreachableError, match="no token"):
        require_token(address, has_token=False)
    require_token(address, has_token=True)


def test_loopback_needs_none() -> None:
    require_token("127.0.0.1:6379", has_token=False)
    require_token("127.0.0.2:6379", has_token=False)


def test_a_token_is_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert has_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "elsewhere"))
    assert not has_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert has_token()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not has_token()


@pytest.mark.parametrize(("mode", "refused"), [(0o600, False), (0o400, False), (0o644, True), (0o640, True), (0o602, True)])
def test_a_token_that_others_can_read_is_refused(mode: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    require_token("127.0.0.2:6379", has_token=True)
    if not refused:
        require_token("10.1.2.3:6379", has_token=True)
        return
    with pytest.raises(UnreachableError, match=f"mode {mode:04o}") as caught:
        require_token("10.1.2.3:6379", has_token=True)
    assert caught.value.remedy.endswith(f"chmod 600 {token}")
