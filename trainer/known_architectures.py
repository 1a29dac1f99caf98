"""The names that `model.architecture` may have (pure; transformers, whose import takes seconds, is asked only about names that are not ours)."""

import difflib

OURS = ("bert", "modernbert", "gpt2")
"""Those with a network of their own."""


def why_unknown(architecture: str) -> str | None:
    """What is wrong with a name that no network has, and the nearest that one has; None where nothing is."""
    if architecture in OURS:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if architecture in MASKED:
        return None
    near = difflib.get_close_matches(architecture, [*OURS, *MASKED], n=1)
    hint = f"; nearest: {near[0]}" if near else f"; choose {', '.join(OURS)}, or one of transformers such as roberta"
    return f"model.architecture {architecture}: there is no masked language model of that name{hint}"
