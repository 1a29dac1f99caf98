"""The Dockerfile, read: it builds what pyproject describes, with the pinned releases, for a user that is not root. Nothing is built here."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text()).splitlines()
INSTRUCTIONS = [line.split(maxsplit=1) for line in LINES if line and not line.startswith("#")]


def having(name: str) -> list[str]:
    return [rest for instruction, rest in INSTRUCTIONS if instruction == name]


def test_python_is_one_that_we_support() -> None:
    (python,) = [argument.partition("=")[2] for argument in having("ARG") if argument.startswith("PYTHON=")]
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])
    assert not [run for run in having("RUN") if re.search(r"python3\.\d", run)]


def test_the_wheel_is_made_of_all_that_belongs_to_it() -> None:
    copied = {word for copy in having("COPY") if not copy.startswith("--from") for word in copy.split()[:-1]}
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    project = PROJECT["project"]
    assert copied == {*wheel["packages"], *wheel["force-include"], project["readme"], *project["license-files"], "pyproject.toml", "constraints.txt"}
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert sent == copied


def test_every_installation_is_pinned() -> None:
    installations = [part for run in having("RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installations) == 2
    assert all(re.search(r"--constraint \S*constraints\.txt", part) and "--no-cache-dir" in part for part in installations)
    pinned = {canonicalize_name(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["s3"], "boto3", "build", "hatchling"]
    assert {canonicalize_name(Requirement(text).name) for text in wanted} <= pinned


def test_nothing_runs_as_root_or_on_whatever_is_newest() -> None:
    assert having("USER")[-1] == "1000:1000"
    assert INSTRUCTIONS.index(["USER", "1000:1000"]) > max(index for index, (name, _) in enumerate(INSTRUCTIONS) if name == "RUN")
    (home,) = re.findall(r"\bHOME=(\S+)", " ".join(having("ENV")))  # of Ray's token; without it Ray takes /root
    assert [part for run in having("RUN") for part in run.split("&&") if f"{home}/.ray" in part and "--owner=maskwright" in part]
    assert having("WORKDIR")[-1] == home
    stages = {"cpu", "cuda", "base", "wheel", "node", "${DEVICE}"}
    for image in (line.split()[0] for line in having("FROM")):
        assert image in stages or re.fullmatch(r"[a-z/]+:[\w.-]*\d[\w.-]*", image)
    assert not [line for line in LINES if "://" in line]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_build_argument_chooses_the_device(device: str) -> None:
    assert "DEVICE=cpu" in having("ARG")
    assert [line for line in having("FROM") if line.endswith(f" AS {device}")]
    assert "${DEVICE} AS base" in having("FROM")
