"""Fine-tunes all tasks of a run in one worker group, whose start costs more than a small task (runs in worker processes)."""

from trainer.context import RunContext
from trainer.finetune_config import FinetuneConfig


def finetune_tasks(config: FinetuneConfig, model: str, output: str, context: RunContext, attempt: int) -> None:
    """Every rank calls this. Each task writes `output/<task>/`; finished tasks return at once.

    Raises:
        MaskwrightError: as `trainer.finetune.finetune_task`.
    """
    from trainer.finetune import finetune_task

    del attempt
    for task in config.tasks:
        finetune_task(config, task, model, f"{output}/{task.name}", context)
