"""Which verb answers what, and its JSON schema (pure; loads numpy, no torch or Ray)."""

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from launcher.answers.corpora import CorpusReportAnswer, InspectedStep, PreparedCorpus, PreparedMixture, Verified
from launcher.answers.machines import DoctorAnswer
from launcher.answers.runs import (
    AnswerSchema,
    Cleaned,
    Exported,
    Files,
    Filling,
    LogLine,
    PlanAnswer,
    PlannedKubernetesJob,
    PlannedRayJob,
    PlannedSlurmJob,
    ProfileAnswer,
    RunReport,
    Schemas,
    Submitted,
    TaskScore,
)
from launcher.run_status import RunStatus


@dataclass(frozen=True)
class Answer:
    """What a verb answers with --json."""

    shape: Any
    a_line_each: bool = False
    """It may be several documents, each on a line of its own."""


ANSWERS = {
    "init": Answer(Files),
    "schema": Answer(Schemas | dict[str, AnswerSchema] | Files),
    "prepare": Answer(PreparedCorpus | PreparedMixture),
    "plan": Answer(PlanAnswer),
    "inspect": Answer(InspectedStep, a_line_each=True),
    "run": Answer(RunStatus),
    "resume": Answer(RunStatus),
    "submit": Answer(Submitted | PlannedRayJob | PlannedSlurmJob | PlannedKubernetesJob),
    "list": Answer(list[RunStatus]),
    "status": Answer(RunStatus, a_line_each=True),
    "logs": Answer(LogLine, a_line_each=True),
    "stop": Answer(RunStatus),
    "export": Answer(Exported),
    "finetune": Answer(RunStatus),
    "evaluate": Answer(list[TaskScore] | list[list[Filling]]),
    "report": Answer(RunReport | CorpusReportAnswer, a_line_each=True),
    "profile": Answer(ProfileAnswer),
    "verify": Answer(Verified),
    "clean": Answer(Cleaned),
    "doctor": Answer(DoctorAnswer),
}
"""By verb. Keys are an interface: releases add some, and rename none."""


def answers_schema() -> dict[str, AnswerSchema]:
    """By verb."""
    return {
        verb: AnswerSchema(a_line_each=answer.a_line_each, schema=TypeAdapter(answer.shape).json_schema(mode="serialization"))
        for verb, answer in ANSWERS.items()
    }
