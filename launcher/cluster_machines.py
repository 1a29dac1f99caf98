"""The machines that clusters are made of, as cluster YAMLs of Kubernetes and clouds say it (pure)."""

from typing import Annotated, Any, Literal

from pydantic import Field

from data_pipeline.config import Section

Quantity = Annotated[str, Field(pattern=r"^[1-9]\d*(Mi|Gi|Ti)$")]
"""Bytes as Kubernetes writes them: `64Gi`."""
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
"""What Kubernetes takes for a name."""


class HeadPod(Section):
    """The pod with Ray's head and the driver of the run. No rank runs there."""

    cpus: int = Field(default=2, ge=1)
    """CPUs."""
    memory: Quantity = "8Gi"
    """Main memory."""


class Claim(Section):
    """A PersistentVolumeClaim that several pods may write (ReadWriteMany)."""

    name: Label
    """Its name."""
    path: str = Field(pattern=r"^/[\w./+-]+$")
    """Where pods see it. The run's storage lies in it, and the machine that submits sees the same files at the same path."""


class AwsProvider(Section):
    """Machines of AWS."""

    type: Literal["aws"]
    """AWS."""
    region: str
    """Such as `eu-central-1`."""
    availability_zone: str | None = None
    """Such as `eu-central-1a`. Null: any that has machines."""


class GcpProvider(Section):
    """Machines of Google Cloud."""

    type: Literal["gcp"]
    """Google Cloud."""
    region: str
    """Such as `europe-west4`."""
    availability_zone: str
    """Such as `europe-west4-a`."""
    project_id: str
    """The project that pays."""


class LocalProvider(Section):
    """Machines that are there, reached by SSH."""

    type: Literal["local"]
    """On premise."""
    head_ip: str
    """The machine with Ray's head. It trains, too."""
    worker_ips: tuple[str, ...] = ()
    """The others."""


class Machines(Section):
    """Machines of a kind, which a cloud lends."""

    config: dict[str, Any]
    """What the cloud is asked for, in its own words: `{InstanceType: m7i.xlarge}` at AWS, `{machineType: n2-standard-4, disks: […]}` at Google."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs of each. Null: Ray asks AWS; at Google they must be given."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of each, where `cpus` is given."""
