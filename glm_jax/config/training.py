"""The sections `mesh`, `pipeline`, `train` and `optimizer`: where, how long and how a model is trained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from glm_jax.config.fields import Section, definitions, field, section

Schedule = Literal["1f1b", "gpipe"]
Stash = Literal["auto", "layer", "stage", "products", "all"]
Precision = Literal["float32", "bfloat16", "float16"]
Normalization = Literal["tokens", "microbatch"]
Decay = Literal["cosine", "linear"]

HELDOUT = "heldout"  # the name of the held-out loss among evaluators


@dataclass(frozen=True)
class Mesh(Section):
    """The section `mesh`. One of the three axes may be -1: the rest of the devices."""

    data: int = field(1, at_least=-1, doc="data-parallel replicas")
    pipeline: int = field(1, at_least=-1, doc="stages of the pipeline")
    tensor: int = field(1, at_least=-1, doc="shards of each layer")
    collective_timeout: float = field(
        20.0, above=0, doc="seconds without an answer after which a process of a CPU run counts as lost"
    )
    zero: Literal[1, 3] = field(
        1, doc="1: the state is split over `data`; 3: the blocks' weights too, without a pipeline"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis, size in self.sizes().items():
            if size == 0:
                raise ValueError(f"{axis} is 0, it must be at least 1, or -1 for the rest of the devices")

    def sizes(self) -> dict[str, int]:
        """Return the size of each axis, in the mesh's order."""
        return {"data": self.data, "pipeline": self.pipeline, "tensor": self.tensor}


@dataclass(frozen=True)
class Pipeline(Section):
    """The section `pipeline`."""

    schedule: Schedule = field("1f1b", doc="order of forward and backward slots")
    stash: Stash = field(
        "auto",
        doc="what the backward pass finds: inputs of layers or of stages, results of matrix products, or everything "
        "(nothing is recomputed); auto: products if there is one stage and a quarter of a device's memory holds them, "
        "else inputs of layers",
    )


@dataclass(frozen=True)
class LossScaleConfig(Section):
    """The section `train.loss_scale`, for float16 (paper, table 11)."""

    initial: float = field(65536.0, above=0, doc="the first scale")
    window: int = field(2000, at_least=1, doc="finite steps in a row that double the scale")
    hysteresis: int = field(2, at_least=1, doc="non-finite steps that halve the scale")
    minimum: float = field(1.0, above=0, doc="the scale is not halved below this")


@dataclass(frozen=True)
class EmbeddingShrink(Section):
    """The section `train.embedding_shrink`: embedding gradient shrink (paper, section 3.2)."""

    alpha: float = field(1.0, at_least=0, at_most=1, doc="the share of the gradient that stays; 1 disables")
    history: tuple[tuple[int, float], ...] = field(
        (), example=(6000, 0.1), doc="instead: alpha by step, linear between knots such as ((6000, 0.1), (6500, 1.0))"
    )
    logits: bool = field(False, doc="shrink the gradient through the head, which is tied, as well")

    def __post_init__(self) -> None:
        super().__post_init__()
        for _, alpha in self.history:
            if not 0 <= alpha <= 1:
                raise ValueError(f"history holds alpha {alpha}, it must be from 0 to 1")
        for (before, _), (after, _) in itertools.pairwise(self.history):
            if after <= before:
                raise ValueError(f"history names step {after} after {before}: put them in order")


@dataclass(frozen=True)
class Spike(Section):
    """The section `train.spike`: what to do when the loss or the gradient norm leaves its running band."""

    rollbacks: int = field(
        0, at_least=0, doc="how often at most to go back to the last checkpoint and skip the data; 0 disables"
    )
    window: int = field(
        100, at_least=1, doc="steps of the band's running mean and deviation; spikes count only after this many steps"
    )
    deviations: float = field(6.0, above=0, doc="the band's width above the mean, in deviations")


@dataclass(frozen=True)
class Lora(Section):
    """The section `train.lora`: low-rank adapters on frozen params (arXiv 2106.09685)."""

    rank: int = field(0, at_least=0, doc="r, the rank of a kernel's adapter; 0 trains the params themselves")
    alpha: float = field(16.0, above=0, doc="an adapter's product is multiplied by alpha / rank")
    targets: tuple[str, ...] = field(
        ("blocks",), example="blocks/attention/qkv", doc="parts of the model whose kernels get adapters"
    )


@dataclass(frozen=True)
class Train(Section):
    """The section `train`: how long, with which batches, and what is logged and saved."""

    steps: int = field(1000, at_least=1, doc="optimizer steps")
    global_batch: int = field(16, at_least=1, doc="rows of an optimizer step")
    microbatches: int = field(
        1, at_least=1, doc="the batch is processed in this many parts, whose gradients are summed"
    )
    init_from: str = field(
        "",
        path=True,
        role="frozen",
        doc="begin with the weights of a workdir (or WORKDIR@STEP), a checkpoint or an official folder, at step 0; "
        "their tokenizer is taken unless data.tokenizer.path is set; empty: initial params",
    )
    init_from_vocabulary: Literal["same", "resize"] = field(
        "same", role="frozen", doc="resize: a tokenizer other than that of init_from; trained rows are kept by number"
    )
    precision: Precision = field(
        "float32", doc="of weights and activations; master params, moments and sums are float32"
    )
    loss_scale: LossScaleConfig = section(LossScaleConfig)
    embedding_shrink: EmbeddingShrink = section(EmbeddingShrink)
    loss_normalization: Normalization = field(
        "tokens", doc="tokens: a mean over the global batch's targets; microbatch: over row means"
    )
    z_loss: float = field(
        0.0,
        at_least=0,
        doc="adds this times log(Z)^2 to each target token's loss, Z the sum of its exponentiated logits (PaLM: 1e-4); "
        "logged losses leave it out; 0 disables",
    )
    batch_ramp: tuple[int, int, int] | tuple[()] = field(
        (), doc="(first batch, increment, samples): the batch grows at equal intervals of the samples"
    )
    skip_steps: tuple[tuple[int, int], ...] = field(
        (), example=(40_701, 40_900), doc="ranges of steps to skip with their data, including the last"
    )
    spike: Spike = section(Spike)
    freeze: tuple[str, ...] = field(
        (), role="frozen", example="blocks/0..9", doc="parts of the model whose params stay as they are"
    )
    lora: Lora = section(Lora, role="frozen")
    dead_after: int = field(
        10,
        at_least=0,
        role="operational",
        doc="stop after this many steps in a row that are not finite (float16: at the smallest loss scale); 0 disables",
    )
    log_every: int = field(10, at_least=1, role="operational", doc="steps between logged steps")
    log_attention_scores: bool = field(
        False, role="operational", doc="also log each layer's largest attention score; its steps take a little longer"
    )
    eval_every: int = field(
        500,
        at_least=0,
        role="operational",
        doc="steps between evaluations; also before the first step and at the end; 0 disables",
    )
    evaluators: tuple[tuple[str, int], ...] = field(
        (),
        at_least=1,
        role="operational",
        example=("last_word_en", 100),
        doc="tasks to score the model on and the steps between two times, as for eval_every: names or task files, see "
        "docs/evaluation.md; `heldout`, the held-out loss, has these steps in place of eval_every",
    )
    eval_rows: int = field(128, at_least=1, role="operational", doc="held-out rows of each source")
    save_every: int = field(250, at_least=1, role="operational", doc="steps between checkpoints")
    save_minutes: float = field(
        0.0,
        at_least=0,
        role="operational",
        doc="also save this many minutes after the last checkpoint; 0 disables",
    )
    keep: int = field(
        3, at_least=1, role="operational", doc="how many of the newest checkpoints to keep; 1 keeps two as well"
    )
    keep_every: int = field(
        0, at_least=0, role="operational", doc="also keep the checkpoints of every so many steps; 0 disables"
    )
    profile: tuple[int, int] | tuple[()] = field(
        (), role="operational", doc="(first, last) steps that JAX's profiler traces into the workdir's profile/"
    )
    wandb: str = field("", role="operational", doc="a Weights & Biases project to report to as well; empty disables")

    def heldout_every(self) -> int:
        """Return the steps between evaluations of the held-out loss; 0 disables it."""
        return dict(self.evaluators).get(HELDOUT, self.eval_every)

    def tasks(self) -> list[tuple[str, int]]:
        """Return the tasks to score the model on, and the steps between two times."""
        return [(name, every) for name, every in self.evaluators if name != HELDOUT]

    def scaling(self) -> LossScaleConfig | None:
        """Return the loss scale's constants, or None where the precision needs none."""
        return self.loss_scale if self.precision == "float16" else None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.global_batch % self.microbatches:
            raise ValueError(
                f"global_batch {self.global_batch} is not divisible by train.microbatches {self.microbatches}"
            )
        for first, last in self.skip_steps:
            if not 1 <= first <= last:
                raise ValueError(
                    f"skip_steps holds ({first}, {last}): steps count from 1, the first must not be after the last"
                )
        names = [name for name, _ in self.evaluators]
        if again := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"evaluators name {again[0]} twice: leave one of them out")
        if self.profile and not 1 <= self.profile[0] <= self.profile[1]:
            raise ValueError(f"profile is {self.profile}: steps count from 1, the first must not be after the last")
        if self.lora.rank and not self.init_from:
            raise ValueError("lora.rank is set: name the weights that the adapters are for as train.init_from")
        if self.lora.rank and self.init_from_vocabulary == "resize":
            raise ValueError("init_from_vocabulary is resize: train.lora needs the vocabulary as it is")
        if self.lora.rank and self.freeze:
            raise ValueError("freeze does not go with train.lora, which freezes all params: name lora.targets instead")
        self._check_batch_ramp()

    def _check_batch_ramp(self) -> None:
        if not self.batch_ramp:
            return
        start, increment, samples = self.batch_ramp
        rows = self.global_batch // self.microbatches
        for name, value in (("first batch", start), ("increment", increment)):
            if value < 1 or value % rows:
                raise ValueError(
                    f"batch_ramp has the {name} {value}: it must be a multiple of the {rows} rows of a "
                    "microbatch (train.global_batch / train.microbatches)"
                )
        if start > self.global_batch or (self.global_batch - start) % increment or samples < 1:
            raise ValueError(
                f"batch_ramp {self.batch_ramp} does not reach train.global_batch {self.global_batch}: go up "
                "from the first batch by whole increments, over 1 sample or more"
            )


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW's constants; defaults are GLM-130B's (paper, appendix B, table 11)."""

    beta1: float = field(0.9, at_least=0, below=1, doc="decay of the first moment")
    beta2: float = field(0.95, at_least=0, below=1, doc="decay of the second moment")
    epsilon: float = field(1e-8, above=0, doc="added to the root of the second moment")
    weight_decay: float = field(0.1, at_least=0, doc="decoupled; not applied to layer norms and biases")
    clip_norm: float = field(1.0, above=0, doc="global norm to which gradients are clipped")


@dataclass(frozen=True)
class Optimizer(OptimizerConfig):
    """The section `optimizer`: AdamW's constants, and its learning rate by samples seen and by part of the model."""

    peak_lr: float = field(1e-3, above=0, doc="learning rate after the warmup")
    min_lr: float = field(1e-4, at_least=0, doc="learning rate after the decay")
    warmup_samples: int = field(1600, at_least=0, doc="samples of a linear rise from 0")
    rewarm: tuple[tuple[int, int], ...] = field(
        (),
        example=(22_800, 2_000),
        doc="(step, steps): after this step, the rate climbs again from 0 over so many steps",
    )
    stairs: tuple[int, int, int] | tuple[()] = field(
        (),
        doc="(step, steps, factor): after this step the rate is multiplied by the factor every so many steps, to find "
        "the rate at which a trained model breaks",
    )
    decay: Decay = field("cosine", doc="the curve from peak_lr to min_lr")
    decay_samples: int = field(
        0,
        at_least=0,
        at_most=2**63 - 1,  # it may lie beyond the run's end
        doc="samples, those of the warmup included, at which the rate reaches min_lr; 0: at the last step",
    )
    layer_decay: float = field(
        1.0,
        above=0,
        at_most=1,
        doc="the learning rate falls by this factor from each layer to the one below; 1 disables",
    )
    multipliers: tuple[tuple[str, float], ...] = field(
        (), above=0, example=("embedding", 0.1), doc="parts of the model and what multiplies their learning rate"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.peak_lr:
            raise ValueError(f"min_lr {self.min_lr} is above optimizer.peak_lr {self.peak_lr}")
        for first, steps in self.rewarm:
            if first < 0 or steps < 1:
                raise ValueError(f"rewarm holds ({first}, {steps}): give the step it begins at, and how many")
        if self.stairs:
            first, steps, factor = self.stairs
            if first < 0 or steps < 1 or factor < 2:
                raise ValueError(
                    f"stairs {self.stairs}: give the step they begin at, the steps of each, and a factor of 2 or more"
                )

    def constants(self) -> OptimizerConfig:
        """Return the constants of an update, without the learning rate."""
        return OptimizerConfig(**{one.name: getattr(self, one.name) for one in definitions(OptimizerConfig)})
