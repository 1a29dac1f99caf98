"""What the lines of a constraints file mean: each is followed, or said to be wrong by its number."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from launcher import requirements as module
from launcher.requirements import requirements


@pytest.fixture(autouse=True)
def _one_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """We need torch, and torch nothing: what is installed here does not matter."""
    monkeypatch.setattr(module, "requires", lambda name: ["torch>=2"] if name == "maskwright" else [])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# of a test\n\ntorch==2.1  # the newest\n", "torch==2.1"),
        ("torch==2.1 \\\n    --hash=sha256:00ff \\\n    --hash=sha256:11ee\n    # via maskwright\n", "torch==2.1"),
        ("torch==1.0; sys_platform == 'nowhere'\ntorch==2.1; sys_platform != 'nowhere'\n", "torch==2.1"),
        ("torch==2.1; sys_platform != 'nowhere'\ntorch==1.0; sys_platform == 'nowhere'\n", "torch==2.1"),
        ("other==1.0\n", "torch>=2"),
    ],
)
def test_releases_are_those_of_lines_for_this_platform(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text(text)
    assert requirements(str(tmp_path / "constraints.txt")) == [found]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# a\ntorch @ https://example.org/torch.whl\n", "line 2 has a URL for torch"),
        ("torch==2.1\n--extra-index-url https://example.org\n", "line 2 is an option of pip, --extra-index-url"),
        ("-r others.txt\n", "line 1 is an option of pip, -r"),
        ("torch==2.1 \\\n    --hash=sha256:00ff\n-e .\n", "line 3 is an option of pip, -e"),
        ("torch==2.1\n\ntorch 2\n", "line 3: "),
    ],
)
def test_a_line_that_nodes_could_not_follow_is_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text(text)
    with pytest.raises(ConfigError, match=said):
        requirements(str(tmp_path / "constraints.txt"))
