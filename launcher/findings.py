"""What doctor says: findings, and the verdict that follows from them (pure)."""

from dataclasses import dataclass

from data_pipeline.errors import ExitCode


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or (a warning) that will cost something."""

    what: str
    """Said of the node, where there is one: `answers nothing`."""
    remedy: str
    node: str | None = None
    """Id of the node because of which it is; None where it is not one node's."""
    code: ExitCode = ExitCode.ENVIRONMENT
    """What the command ends with because of it; OK makes it a warning."""

    @property
    def is_fault(self) -> bool:
        """Whether a run must not begin like this."""
        return self.code is not ExitCode.OK


@dataclass(frozen=True)
class Diagnosis:
    """The verdict."""

    findings: tuple[Finding, ...]
    """Faults first."""
    excluded: tuple[str, ...]
    """Ids of the nodes to leave out: those that a fault names."""
    code: ExitCode

    @property
    def faults(self) -> tuple[Finding, ...]:
        """Without the warnings."""
        return tuple(finding for finding in self.findings if finding.is_fault)
