"""The model card of an exported model, README.md: what it learned from, how far it got and how to load it (pure)."""

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

_TEMPLATE = """\
{% macro shown(value, unit="") %}{{ "not measured" if value is none else "%.4f"|format(value) ~ unit }}{% endmacro -%}
---
library_name: transformers
pipeline_tag: {{ "text-generation" if is_causal else "fill-mask" }}
tags:
- {{ architecture }}
- {{ "causal-lm" if is_causal else "masked-lm" }}
- pretraining
---

# {{ name }}

A {{ layers }}-layer {{ shown_architecture }} {{ "decoder" if is_causal else "encoder" }} of width {{ width }}, {{ "{:,}".format(num_parameters) }}
parameters and a vocabulary of
{{ "{:,}".format(vocab_size) }} tokens.
Pretrained with {{ task|lower }} modelling{{ " and %s prediction"|format(pairs) if pairs }} by Maskwright.

## Load it

```python
from transformers import {{ auto_class }}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = {{ auto_class }}.from_pretrained("path/to/this/folder")
```

{% if architecture == "bert" -%}
`AutoModelForPreTraining` loads both heads, `AutoModel` the encoder alone.
{%- else -%}
`AutoModel` loads it without its head.
{%- endif %}


## Training

| | |
|---|---|
| Corpus | {{ corpus }}, fingerprint `{{ fingerprint[:12] }}` |
| Optimizer steps | {{ "{:,}".format(steps) }} of {{ "{:,}".format(planned_steps) }} |
| Tokens seen | {{ "{:,}".format(tokens) }} |
| Samples per step | {{ "{:,}".format(batch_size) }} |
| Longest row | {{ sequence_length }} tokens |
| Peak learning rate | {{ learning_rate }} |
| Precision | {{ precision }} |
| Run and checkpoint | {{ name }}, step {{ steps }}, manifest `{{ checkpoint[:12] }}` |

## Held-out losses

{% if validation %}
Measured after step {{ validation.step }} on documents that were kept out of training.

| | |
|---|---|
| {{ task }} modelling loss | {{ shown(validation.mlm_loss, " nats") }} |
| {{ task }} modelling accuracy | {{ shown(validation.mlm_accuracy) }} |
{% if pairs -%}
| {{ pairs|capitalize }} loss | {{ shown(validation.nsp_loss, " nats") }} |
| {{ pairs|capitalize }} accuracy | {{ shown(validation.nsp_accuracy) }} |
{% endif -%}
| Loss of guessing by word frequency | {{ shown(validation.unigram_entropy, " nats") }} |
{% else %}
Not measured before this checkpoint.
{% endif %}

## Verification

Stock transformers computes the logits that the training code computes: largest difference {{ "%.1e"|format(max_difference) }} in fp32.
Every file's sha256 is in `lineage.json`.
"""


@dataclass(frozen=True)
class CardFacts:
    """What the model card says."""

    name: str
    architecture: str
    is_causal: bool
    layers: int
    width: int
    num_parameters: int
    vocab_size: int
    objective: str
    """Of sentence pairs: `nsp`, `sop` or `none`."""
    corpus: str
    fingerprint: str
    steps: int
    planned_steps: int
    tokens: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    precision: str
    checkpoint: str
    validation: dict[str, Any] | None
    max_difference: float


def render_model_card(facts: CardFacts) -> str:
    """The card as Markdown with the front matter of the Hugging Face hub."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    auto_class, task = ("AutoModelForCausalLM", "Causal-language") if facts.is_causal else ("AutoModelForMaskedLM", "Masked-language")
    shown = {"bert": "BERT", "modernbert": "ModernBERT", "gpt2": "GPT-2"}.get(facts.architecture, facts.architecture)
    pairs = {"nsp": "next-sentence", "sop": "sentence-order"}.get(facts.objective)
    derived = {"auto_class": auto_class, "task": task, "shown_architecture": shown, "pairs": pairs}
    return environment.from_string(_TEMPLATE).render(**vars(facts) | derived)
