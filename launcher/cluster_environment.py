"""What the machines of a cluster are given, as cluster YAMLs say it: software and secrets (pure)."""

from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from data_pipeline.config import Section

_CHOICES = ("image", "venv", "pip")


def _exactly_one(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [{"required": [choice], "properties": {choice: {"type": "string"}}} for choice in _CHOICES]


class Environment(Section, json_schema_extra=_exactly_one):
    """How the machines of a cluster get their software: exactly one of the three. Our own packages travel with each job, whatever there is."""

    image: str | None = Field(default=None, pattern=r"^[a-z0-9][\w./:@-]*$")
    """A container image with Python, Ray and all libraries, such as the Dockerfile makes."""
    venv: str | None = Field(default=None, pattern=r"^/[\w./+-]+$")
    """The folder of a virtual environment, on every node at one path, with the cluster's releases of Python and Ray."""
    pip: str | None = Field(default=None, min_length=1)
    """A constraints file on the machine that submits: every node installs what maskwright needs, in the releases that the file names."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = self._given()
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(_CHOICES)}, found {' and '.join(given) or 'none'}")
        return self

    def _given(self) -> list[str]:
        return [choice for choice in _CHOICES if getattr(self, choice) is not None]

    @property
    def choice(self) -> str:
        """Which of the three it is."""
        return self._given()[0]

    @property
    def python(self) -> str:
        """The interpreter that a job there is started with."""
        return "python" if self.venv is None else f"{self.venv.rstrip('/')}/bin/python"


def only(*choices: str, because: str) -> AfterValidator:
    """Admits the environments that a kind of cluster can honour."""

    def check(environment: Environment | None) -> Environment | None:
        if environment is not None and environment.choice not in choices:
            raise ValueError(f"expected {' or '.join(choices)}, found {environment.choice}: {because}")
        return environment

    return AfterValidator(check)


Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
"""Name of an environment variable that the machines have: in the environment of Ray's processes there."""


class SecretFile(Section):
    """A file of variables, on every machine at one path; its lines are NAME=value."""

    file: str = Field(pattern=r"^/\S+$")
    """Its path. It belongs to the user that Ray runs as, and nobody else can read it (mode 0600)."""


class KubernetesSecret(Section):
    """Variables out of a Secret of the Kubernetes namespace."""

    secret: str = Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")
    """Its name."""
    keys: tuple[Variable, ...] = Field(min_length=1)
    """Those of its keys that become variables, of the same names."""
