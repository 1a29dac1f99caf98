"""Entry point of a job on a cluster: runs the command of a submission there (`python -m launcher.submitted RUN NUMBER`)."""

import os
import socket
import sys
import tempfile
from contextlib import suppress
from typing import NoReturn


def run_submitted(root: str, number: int) -> None:
    """Exit with the code of the submission's command; with that of storage or environment where this machine does not see it, or lacks a library."""
    try:
        from data_pipeline.errors import ExitCode, NotFoundError
        from data_pipeline.storage import Location
        from launcher.cli import main
        from launcher.submission import SUBMISSION_VARIABLE, read_submission
        from trainer.runlog import RunFolder
    except ImportError as error:
        cause = f"{sys.executable} on {socket.gethostname()} lacks what the run needs: {error}"
        _refuse(cause, "Install the same packages on every machine, or name their virtual environment (`environment` in the cluster file).", 6)
    try:
        submission = read_submission(RunFolder(Location(root)), number)
    except NotFoundError:
        cause = f"{socket.gethostname()}, from where the run is to be driven, does not see submission {number} of it in {root}"
        _refuse(cause, "Use storage that all machines of the cluster and the one that submits share.", ExitCode.STORAGE)
    os.environ[SUBMISSION_VARIABLE] = submission.job
    _leave_folder(submission.home)
    main(submission.arguments)


def _refuse(cause: str, remedy: str, code: int) -> NoReturn:
    print(f"error: {cause}\n{remedy}", file=sys.stderr)
    sys.exit(code)


def _leave_folder(home: str) -> None:
    """Ray removes the folder that it starts a job in when it wants the space; in one that is gone torch does not load."""
    os.chdir(tempfile.gettempdir())
    with suppress(OSError):
        os.chdir(home)


if __name__ == "__main__":
    run_submitted(sys.argv[1], int(sys.argv[2]))
