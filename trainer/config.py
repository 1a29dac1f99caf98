"""Configuration of the model, the optimizer and training, and `RunConfig`, the whole of run.yaml (pure)."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from data_pipeline.config import NAME, BatchConfig, CorpusConfig, DataConfig, MixturePart, ObjectiveConfig, Phase, Section, TokenizerConfig
from trainer.finetune_config import FinetuneConfig
from trainer.known_architectures import why_unknown
from trainer.tracking_config import TrackingConfig
from trainer.zero_config import ZeroConfig

_WITH_PAIR_HEAD = ("bert",)
_CAUSAL = ("gpt2",)
_PACKED = ("bert", "modernbert", "gpt2")
"""Architectures whose attention keeps the samples of a row apart."""


class ModelConfig(Section):
    """The network. The vocabulary size comes from the tokenizer."""

    architecture: str = Field(default="bert", pattern=r"^[a-z0-9][a-z0-9_.-]*$")
    """`bert` (the `BertForPreTraining` layout of transformers), `modernbert`, `gpt2` (for `objective: clm`), or the model_type of any other masked
    language model of transformers, such as `roberta`: those take neither sentence pairs nor packed rows."""
    init_from: str | None = None
    """Hugging Face folder or hub id to continue pretraining from; its own dimensions replace those below."""
    num_layers: int = Field(default=12, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(default=768, ge=8)
    """Width of the hidden states."""
    num_heads: int = Field(default=12, ge=1)
    """Attention heads; must divide `hidden_size`."""
    intermediate_size: int | None = Field(default=None, ge=8)
    """Width of the feed-forward layers; null means 4 x hidden_size (1.5 x hidden_size in `modernbert`, whose layers are gated)."""
    max_positions: int = Field(default=512, ge=16)
    """Longest sequence the model can take, in tokens."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Dropout of hidden states and attention probabilities, keyed by (seed, micro-batch). Exported with the model: fine-tuning uses it, too."""
    initializer_range: float = Field(default=0.02, gt=0.0)
    """Standard deviation of the initial weights. Narrow networks leave the plateau of word frequencies sooner with a larger one."""
    attention: Literal["auto", "eager", "sdpa", "varlen"] = "auto"
    """Attention kernel: `eager` plain matrix products, `sdpa` torch's scaled_dot_product_attention, `varlen` FlashAttention over the samples alone
    (GPUs in 16 bits; bert, modernbert, gpt2). `auto`: for each sequence length what is fastest forward and backward in the run's precision; measured
    before step 1 and kept for the whole run (`choices.json`)."""
    compile: bool = False
    """Compile the layers with torch.compile before step 1, which each attempt waits for: about a minute, less where torch's cache
    (`TORCHINDUCTOR_CACHE_DIR`, by default a folder of the user in the temporary one) has them. Needs a C++ compiler, on a GPU Triton. Not under
    `zero.stage` 3 or with `activation_checkpointing`. On a CPU it may as well be slower; `maskwright profile` tells. On a GPU dropout
    draws other numbers than without."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    transformers: dict[str, Any] = Field(default_factory=dict)
    """More settings of the architecture's configuration in transformers, under their names there, such as `hidden_act`."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")
        return self

    @property
    def inner_size(self) -> int:
        """Width of the feed-forward layers."""
        usual = 3 * self.hidden_size // 2 if self.architecture == "modernbert" else 4 * self.hidden_size
        return self.intermediate_size or usual


class OptimizerConfig(Section):
    """How gradients become updates."""

    kind: Literal["adamw", "lamb"] = "adamw"
    """`adamw`: Loshchilov and Hutter 2019, fused. `lamb`: for large batches (You et al. 2020, Algorithm 2, with bias correction): AdamW, but each
    matrix moves by lr times its own length; it wants a learning rate some ten times as large. A run keeps the optimizer it began with."""
    lr: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-6, gt=0.0)
    """Term added to the denominator."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Decoupled weight decay; not applied to biases and layer norms."""
    clip_norm: float = Field(default=1.0, gt=0.0)
    """Clip the global gradient norm to this."""


class ScheduleConfig(Section):
    """Learning rate over optimizer steps: linear warm-up, then `kind`."""

    kind: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """Shape of the decay after warm-up; all but constant end at `final_ratio` of the peak. `wsd` (warm-up, stable, decay; Hu et al. 2024): the peak
    until the last `decay_steps`. Before those the rate does not depend on `steps`, so a run can be made longer without having been another."""
    steps: int = Field(default=1_000_000, ge=1)
    """Optimizer steps of the whole run."""
    warmup_steps: int = Field(default=10_000, ge=0)
    """Steps over which the learning rate rises linearly from 0 to its peak."""
    final_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Final learning rate as a share of the peak."""
    decay_steps: int | None = Field(default=None, ge=0)
    """Length of the decay of `wsd`; null means a tenth of `steps`, less where the warm-up leaves less. 0 stays at the peak, for a run that will be
    made longer: `resume --set schedule.steps=110000 --set schedule.decay_steps=10000`."""
    decay_shape: Literal["sqrt", "linear"] = "sqrt"
    """Way down of `wsd` after a share p of the decay: `sqrt` 1 - sqrt(p), the best of several in Hägele et al. 2024; `linear` 1 - p."""

    @model_validator(mode="after")
    def _fits_into_the_run(self) -> Self:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        if self.kind != "wsd" and (self.decay_steps is not None or self.decay_shape != "sqrt"):
            raise ValueError(f"decay_steps and decay_shape are for kind wsd, and kind is {self.kind}")
        if self.warmup_steps + (self.decay_steps or 0) > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} and decay_steps {self.decay_steps} together exceed steps {self.steps}")
        return self

    @property
    def decay_from(self) -> int:
        """The step at which the learning rate begins to decay, from its peak."""
        if self.kind != "wsd":
            return self.warmup_steps
        if self.decay_steps is None:
            return max(self.warmup_steps, self.steps - -(-self.steps // 10))
        return self.steps - self.decay_steps


class CheckpointConfig(Section):
    """When checkpoints are committed and which are kept."""

    every_steps: int = Field(default=1000, ge=1)
    """Commit a checkpoint every so many optimizer steps; the last step always commits one."""
    keep_last: int = Field(default=3, ge=1)
    """Newest committed checkpoints to keep."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep those whose step is a multiple of this; null keeps none for it."""
    keep_best: bool = False
    """Also keep the one with the lowest validation loss, of those whose step was validated."""


class ValidationConfig(Section):
    """Held-out losses during pretraining."""

    every_steps: int = Field(default=1000, ge=1)
    """Validate every so many optimizer steps, and after the last."""
    micro_batches: int = Field(default=32, ge=1)
    """Micro-batches of the validation split to average over (fewer when the split is smaller)."""


class NumericsConfig(Section):
    """What follows a step whose loss or gradients are not finite, or whose loss is a spike. Such a step never changes the weights."""

    policy: str = Field(default="rewind:1", pattern=r"^(stop|skip_batch|rewind:[1-9][0-9]*)$")
    """`stop`: the run ends with exit code 12 and names the batch. `skip_batch`: go on without the batch; the step counts, its data is consumed.
    `rewind:K`: resume from the K-th newest checkpoint, which repairs what a machine got wrong; a step that is in trouble again is skipped."""
    spike_threshold: float | None = Field(default=None, gt=0.0)
    """A loss is a spike above median + threshold x 1.4826 x MAD (median absolute deviation) of the losses before it; null: no loss is."""
    spike_window: int = Field(default=128, ge=8, le=1024)
    """Steps that a spike is measured against; none is seen before half as many have been taken."""
    budget: int = Field(default=10, ge=0)
    """Skipped batches plus rewinds that a run may need; the next trouble ends it with exit code 12."""

    @property
    def rewind_checkpoints(self) -> int | None:
        """K of `rewind:K`; None under the other policies."""
        name, _, count = self.policy.partition(":")
        return int(count) if name == "rewind" else None


class RunConfig(Section):
    """The whole of run.yaml: *what* to train. *Where* is the cluster file's business."""

    name: str = Field(pattern=NAME)
    """The run's id and folder name (`corpora` is taken)."""
    storage: str = "runs"
    """Local folder or fsspec URL that holds corpora and runs."""
    seed: int = Field(default=0, ge=0)
    """Seed of the weights, the data order, the masks and dropout."""
    corpus: CorpusConfig = CorpusConfig()
    """The text."""
    mixture: tuple[MixturePart, ...] = ()
    """Several corpora with weights instead of `corpus`; a tokenizer that is trained is trained on the first."""
    data: DataConfig = DataConfig()
    """How the prepared corpus is read."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What the model learns to predict."""
    model: ModelConfig = ModelConfig()
    """The network."""
    batch: BatchConfig = BatchConfig()
    """Batch shape."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Steps and learning rate."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """`bf16`: bf16 weights, fp32 master. `fp16`: fp16 weights, fp32 master, dynamic loss scale. `fp32`. `auto`: bf16 where the hardware is faster
    in it, else fp32; measured before step 1 and kept for the whole run (`choices.json`)."""
    zero: ZeroConfig = ZeroConfig()
    """Partitioning."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    validation: ValidationConfig = ValidationConfig()
    """Held-out losses."""
    numerics: NumericsConfig = NumericsConfig()
    """Losses and gradients that are not finite, and spikes."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Fine-tuning and baselines."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the numbers of pretraining are shown."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.mixture and "corpus" in self.model_fields_set and self.corpus != CorpusConfig():
            raise ValueError("corpus and mixture are both given; put the corpus into the mixture")
        if self.name == "corpora":
            raise ValueError("name 'corpora' is taken by the corpora folder; choose another")
        self._require_learnable(self.model.architecture)
        self._require_attention(self.model.architecture)
        self._require_compilable()
        self._require_possible_zero()
        longest = max(self.batch.sequence_lengths)
        if self.model.init_from is None and longest > self.model.max_positions:
            raise ValueError(f"batch.sequence_length {longest} exceeds model.max_positions {self.model.max_positions}")
        return self

    def _require_attention(self, architecture: str) -> None:
        """Refuse an attention kernel that there is on no device."""
        if self.model.attention != "varlen":
            return
        if self.precision == "fp32":
            raise ValueError("model.attention varlen computes in 16 bits only, and precision is fp32; set it to auto")
        if architecture not in _PACKED:
            raise ValueError(f"model.architecture {architecture} has no model.attention varlen; set it to auto")

    def _require_compilable(self) -> None:
        """Refuse to compile what is changed under the compiler's hands."""
        if self.model.compile and self.zero.stage == 3:
            raise ValueError("model.compile does not go with zero.stage 3, which takes parameters away between layers; choose another stage")
        if self.model.compile and self.model.activation_checkpointing:
            raise ValueError("model.compile does not go with model.activation_checkpointing; set one of them to false")
        if self.model.compile and any(phase.micro_batch_size // self.batch.split < 2 for phase in self.phases):
            raise ValueError("model.compile needs two samples at once, and batch.split leaves one of a micro-batch; raise batch.micro_batch_size")

    def _require_learnable(self, architecture: str) -> None:
        """Refuse an architecture that cannot learn the objective; of one that there is not, say that and nothing else."""
        problem = self._why_not_learnable(architecture)
        if problem is not None:
            raise ValueError(why_unknown(architecture) or problem)

    def _why_not_learnable(self, architecture: str) -> str | None:
        if (self.objective.kind == "clm") != (architecture in _CAUSAL):
            able = "gpt2" if self.objective.kind == "clm" else "bert, modernbert or another masked language model"
            return f"model.architecture {architecture} cannot learn objective {self.objective.kind}; choose {able}"
        pairs = self.objective.sentence_objective
        if pairs != "none" and architecture not in _WITH_PAIR_HEAD:
            return f"model.architecture {architecture} has no head for objective.sentence_objective {pairs}; set it to none"
        if self.batch.packing == "rows" and architecture not in _PACKED:
            return f"model.architecture {architecture} cannot keep the samples of a row apart; set batch.packing to none"
        return None

    def _require_possible_zero(self) -> None:
        """Refuse what DeepSpeed cannot do with this optimizer or precision."""
        if self.optimizer.kind == "lamb" and self.zero.offloads_state:  # LAMB's norms are sums over ranks, whose process group may know GPUs only
            raise ValueError(
                "optimizer.kind lamb does not go with an offloaded optimizer: set zero.offload_optimizer to none, or optimizer.kind to adamw"
            )
        if self.zero.overlap is True and not self.zero.can_overlap(self.precision):
            raise ValueError("zero.overlap cannot be true at zero.stage 1 in bf16, where nothing is offloaded; set it to auto")

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The run's phases, resolved."""
        return self.batch.phases_until(self.schedule.steps)

    @property
    def corpus_label(self) -> str:
        """The corpus' name, or those of the mixture."""
        return " + ".join(part.corpus.label for part in self.mixture) or self.corpus.label

    @property
    def corpora_storage(self) -> str:
        """Folder or URL in whose `corpora` folder the prepared corpora lie."""
        return self.data.storage or self.storage
