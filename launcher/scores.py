"""What fine-tuning came to, in words and as a table: pretrained, from scratch, TF-IDF (pure)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

SYSTEMS = {"pretrained": "pretrained", "scratch": "same network from scratch", "tfidf": "TF-IDF + logistic regression"}

TOKEN_LOSS = {"mlm": "masked-LM loss", "clm": "causal-LM loss"}
"""By `objective.kind`."""

Results = Mapping[str, Any]
"""What results.json of a task holds."""


def spread(scores: Mapping[str, Any]) -> str:
    """`0.812 ± 0.004`: mean and sample standard deviation over seeds; the mean alone where there is one value."""
    text = f"{scores['mean']:.3f}"
    return f"{text} ± {scores['std']:.3f}" if len(scores["seeds"]) > 1 else text


def verdict(results: Results) -> str:
    """One sentence on a task: what pretraining bought, and TF-IDF beside it, said plainly when that wins."""
    pretrained, scratch, tfidf = (results[system] for system in SYSTEMS)
    gain = pretrained["mean"] - scratch["mean"]
    bought = f"{gain:.3f}" if gain > 0 else "nothing"
    doubt = ", within the seeds' spread" if 0 < gain <= 2 * max(pretrained["std"], scratch["std"]) else ""
    beside = "wins with" if tfidf["mean"] > max(pretrained["mean"], scratch["mean"]) else "has"
    against = f"{spread(pretrained)} against {spread(scratch)} from scratch{doubt}"
    return f"{results['task']}: pretraining bought {bought} ({against}); TF-IDF {beside} {spread(tfidf)}."


def validation_verdict(validation: Mapping[str, Any], kind: str) -> str:
    """One sentence on a `validation` event of an objective of this kind: the held-out loss beside what token frequencies alone would reach."""
    loss, entropy = validation.get("mlm_loss"), validation.get("unigram_entropy")
    if loss is None or entropy is None:
        return f"The validation at step {validation['step']} has no {TOKEN_LOSS[kind]}."
    text = f"Validation {TOKEN_LOSS[kind]} {loss:.3f} nats at step {validation['step']}; unigram entropy {entropy:.3f}"
    if loss < entropy:
        return f"{text}: {entropy - loss:.3f} nats better than token frequencies alone."
    return f"{text}: not yet better than token frequencies alone."


def score_table(results: Sequence[Results], validation: Mapping[str, Any] | None = None, kind: str = "mlm") -> Table:
    """Accuracy and macro-F1 of each system on each task, mean ± sample standard deviation over seeds, with the verdicts below."""
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left", caption_style="")
    for column in ("task", "system"):
        table.add_column(column)
    for column in ("accuracy", "macro F1", "seeds"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        best = max(SYSTEMS, key=lambda system: result[system]["mean"])
        for system, name in SYSTEMS.items():
            scores = result[system]
            cells = (name, spread(scores), spread(scores["macro_f1"]), str(len(scores["seeds"])) if system != "tfidf" else "–")
            table.add_row(result["task"], *cells, style="bold" if system == best else None)
    table.caption = "\n".join([*map(verdict, results), *([validation_verdict(validation, kind)] if validation else [])])
    return table
