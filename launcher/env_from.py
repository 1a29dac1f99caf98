"""Takes the secrets that `env_from` of a cluster names, on the machine that needs them (reads the environment and files of mode 0600)."""

import os
import socket
import stat
from collections.abc import Sequence

from data_pipeline.errors import EnvironmentMismatchError
from launcher.cluster_environment import KubernetesSecret, SecretFile
from trainer.redaction import hide

Sources = Sequence[str | SecretFile | KubernetesSecret]


def take_variables(sources: Sources) -> None:
    """Put the variables of files into this process' environment; the values of all are left out of what it says from now on.

    Raises:
        EnvironmentMismatchError: this machine lacks a variable or a file, or others can read or change that. Its contents are never told.
    """
    for source in sources:
        if isinstance(source, SecretFile):
            found = _read(source.file)
        else:
            found = {name: _value(name) for name in ([source] if isinstance(source, str) else source.keys)}
        os.environ.update(found)
        hide(found.values())


def _value(name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        raise _lacking(f"the variable {name} is not set", "Set it in the environment that Ray is started in there, or put it into a file.") from None


def _read(path: str) -> dict[str, str]:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
            status = os.fstat(file.fileno())  # of the very file that is read
            if status.st_uid not in {os.getuid(), 0} or stat.S_IMODE(status.st_mode) & 0o077:
                raise _lacking(f"{path} can be read or changed by others (mode {stat.S_IMODE(status.st_mode):04o})", f"chmod 600 {path}")
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _lacking(f"{path} cannot be read: {getattr(error, 'strerror', 'not text')}", "Put it on every machine, at that path.") from error
    found: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        name, equals, value = line.partition("=")
        if not line.strip() or line.startswith("#"):
            continue
        if not equals or not name.isidentifier() or not name.isascii():
            raise _lacking(f"line {number} of {path} is not NAME=value", "Write one variable a line, without `export`, spaces or quotes.")
        found[name] = value
    return found


def _lacking(what: str, remedy: str) -> EnvironmentMismatchError:
    return EnvironmentMismatchError(f"env_from: on {socket.gethostname()} {what}", remedy)
