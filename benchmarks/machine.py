"""What a figure was measured on: processor, cores, memory, versions, load. No name or path of the machine."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = ("accelerate", "deepspeed", "numpy", "torch", "tokenizers", "transformers", "webdataset")


def describe_machine() -> dict[str, Any]:
    """Processor, usable cores, memory, versions, and the load when this was called (other work on the machine shows there)."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: found for name in _PACKAGES if (found := installed_version(name))}},
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, None when it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command_line(name: str) -> str:
    """The command that repeats a benchmark; what is a path on this machine is left out but for its last part."""
    arguments = [argument.rsplit("/", 1)[-1] for argument in sys.argv[1:]]
    kept = [argument for nth, argument in enumerate(arguments) if argument != "--json" and (nth == 0 or arguments[nth - 1] != "--json")]
    return " ".join([f"python -m benchmarks.{name}", *kept])


def _cpu() -> str:
    """Model name, and family and model where the name does not tell (virtual machines shorten it)."""
    fields: dict[str, str] = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    family = ", ".join(f"{key} {fields[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in fields)
    return f"{fields.get('model name', platform.processor())}" + (f" ({family})" if family else "")
