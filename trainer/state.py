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
        return {**asdict(self), "skipped_steps": list(self.skipped_steps), "skipped_blocks": list(self.skipped_blocks)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "TrainState":
        """The state written by `to_json`, of this release or an older one."""
        fields: dict[str, Any] = {**value, "skipped_steps": tuple(value["skipped_steps"]), "skipped_blocks": tuple(value.get("skipped_blocks", ()))}
        return cls(**fields)
