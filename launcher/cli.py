"""The command `maskwright`: its verbs, its exit codes, and how an error is told (imports no torch, Ray or transformers at start-up)."""

import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence

import typer

from data_pipeline.errors import ExitCode, MaskwrightError, UsageError
from launcher import (
    verbs_clean,
    verbs_data,
    verbs_doctor,
    verbs_model,
    verbs_plan,
    verbs_profile,
    verbs_run,
    verbs_status,
    verbs_stop,
    verbs_submit,
    verbs_verify,
)
from launcher.options import completed, discard_output
from trainer.redaction import without_hidden

_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
"""For the libraries that verbs import: the launcher says itself what happens."""

app = typer.Typer(
    name="maskwright",
    help="Pretrain text encoders on your own text: from a folder of text to a fine-tuned model, on a laptop or a cluster.",
    epilog="Start with: maskwright init, then maskwright run cluster_configs/runs/demo.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_MODULES = (
    verbs_data,
    verbs_plan,
    verbs_run,
    verbs_submit,
    verbs_status,
    verbs_stop,
    verbs_model,
    verbs_profile,
    verbs_verify,
    verbs_clean,
    verbs_doctor,
)
for _module in _MODULES:
    for _verb in _module.VERBS:
        app.command(_verb.__name__.rstrip("_"))(_verb)


@app.callback()
def _options(debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; also accepted after the verb.")) -> None:
    del debug  # taken out of the arguments by `main`, so that it works in every place


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script: run a verb and exit with its documented code."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    sys.exit(run([argument for argument in given if argument != "--debug"], debug=debug))


def run(arguments: Sequence[str], *, debug: bool) -> int:
    """Run a verb and return its exit code; errors are told on stderr in two lines: the cause, and what to do."""
    try:
        _require_folder()
        return _invoke(arguments)
    except MaskwrightError as error:
        if debug:
            traceback.print_exc()
        kind = "interrupted" if error.exit_code in {ExitCode.INTERRUPTED, ExitCode.CTRL_C} else "error"
        print(without_hidden(f"{kind}: {error.cause}\n{completed(error.remedy, storage=_storage_of(arguments))}"), file=sys.stderr)
        return int(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return int(ExitCode.CTRL_C)
    except Exception as error:  # noqa: BLE001  # the last resort: an exit code and a line, whatever happened
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            discard_output()  # or Python would try again at exit, and complain
            return int(ExitCode.OK)
        if debug:
            traceback.print_exc()
        first = without_hidden(next(iter(str(error).splitlines()), ""))
        print(f"internal error: {type(error).__name__}: {first}\nThis is a bug; run again with --debug to see where.", file=sys.stderr)
        return int(ExitCode.INTERNAL)


def _require_folder() -> None:
    """Refuse a current folder that was removed: relative paths mean nothing there, and torch's libraries do not load.

    Raises:
        UsageError: it was.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the current folder no longer exists", "Change to another one (`cd`), and run the command again.") from error


def _storage_of(arguments: Sequence[str]) -> str | None:
    """What --storage was given."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--storage" or option.startswith("--storage="):
            return value if option == "--storage" else option.partition("=")[2]
    return None


def _nobody_reads() -> bool:
    """Whether it is our output whose reader has gone, and no other connection."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in output.poll(0))


def _invoke(arguments: Sequence[str]) -> int:
    """Run the verb. Typer's own complaints about the command line print themselves and have exit code 2."""
    try:
        code = app(args=list(arguments), prog_name="maskwright", standalone_mode=False)
    except Exception as error:
        show: Callable[[], None] | None = getattr(error, "show", None)
        if show is None:
            raise
        show()
        return int(ExitCode.USAGE)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # typer ends the process without a word, whatever connection it was
            raise error.__context__ from None
        raise
    print(end="", flush=True)  # now, when a reader that has gone is no error
    return code if isinstance(code, int) else int(ExitCode.OK)


if __name__ == "__main__":
    main()
