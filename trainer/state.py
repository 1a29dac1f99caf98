"""`TrainState`, all that a run remembers between two optimizer steps beside weights and optimizer (pure)."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Counters of a run. Data position and optimizer step differ: a skipped batch moves one and not the other.

    `micro_batches_consumed` *is* the data state: micro-batch n is a function of n (contract D1).
    """

    step: int = 0
    micro_batches_consumed: int = 0
    tokens_seen: int = 0
    skipped_steps: tuple[int, ...] = ()
    skipped_blocks: tuple[str, ...] = ()
    """Damaged blocks that were left out, see `SkippedBlock.name`; never more than `data.skip_budget`."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the newest updates, at least one, that the next is measured against; see `numerics.with_loss`."""
    corpus_fingerprint: str = ""
    tokenizer_digest: str = ""

    def advance(self, *, micro_batches: int, tokens: int) -> "TrainState":
        """The state after one optimizer step over `micro_batches` micro-batches with `tokens` real tokens."""
        return replace(
            self,
            step=self.step + 1,
            micro_batches_consumed=self.micro_batches_consumed + micro_batches,
            tokens_seen=self.tokens_seen + tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON object; `from_json` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """The state written by `to_json`, of this release or an older one."""
        fields: dict[str, Any] = {name: tuple(field) if isinstance(field, list) else field for name, field in value.items()}
        return cls(**fields)
