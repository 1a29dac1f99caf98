"""Silence around transformers where its reports are expected and say nothing new (changes its logging for a while, nothing else)."""

from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Without progress bars, and without the warnings about heads that are new or unused: both are meant here.

    Bars that the environment turned off stay off: asking the hub's library to turn them on again would make it warn.
    """
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
