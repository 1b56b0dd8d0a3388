"""The sections of a config: frozen, closed to unknown keys, checked before anything is loaded.

`load.py` reads them from YAML and overrides. The string under a field is its description, also in the JSON Schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    model_validator,
)

from diffusion_rtb.config.beta import BetaConfig, as_section
from diffusion_rtb.config.prompts import PromptTable, checked_prompts
from diffusion_rtb.config.section import Component, Named, Section, at_home, judge_name
from diffusion_rtb.config.watch.section import WatchConfig

__all__ = [
    "BetaConfig",
    "Component",
    "EvalConfig",
    "Factor",
    "PromptsConfig",
    "RunConfig",
    "Section",
    "TrainConfig",
    "judge_name",
]

Strings = Annotated[tuple[str, ...], Field(strict=False)]
"""A YAML list of strings; strict in its items, not in being a tuple."""

Natural = Annotated[int, Field(ge=0)]


SHOWN = (
    *("achieved_strength", "reward", "kl", "bill", "kl_profile", "norm_ratio", "elbo", "log_z", "ess"),
    *("diversity", "judges", "posterior_check"),
)
METRICS = tuple(Component(component=name) for name in SHOWN)


class PromptsConfig(Section):
    """What is drawn during training and evaluation; exactly one of `list` and `file`."""

    list: Annotated[Strings, Field(min_length=1)] | None = None
    """The prompts themselves."""
    file: str | None = None
    """A file of prompts, relative to the config: .txt, one per line ("# " starts a comment); .csv or .tsv, with a column `prompt`;
    .jsonl, with a key `prompt`. Other columns and keys are metadata, for rewards that take it. Or a set of the
    package: parti, parti-text."""
    folder: str | None = None
    """What relative paths in that metadata count from; filled in with the folder of `file` when there is metadata."""
    sha256: str | None = None
    """Of the prompts of `file` and their metadata, filled in when they are read: a run does not go on with others."""

    _table: PromptTable | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _exactly_one(self) -> PromptsConfig:
        if (self.list is None) == (self.file is None):
            raise ValueError("give exactly one of `list` and `file` (set the other to null)")
        if self.list is not None:
            for name in ("sha256", "folder"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to a `file`; take it out")
            checked_prompts(self.list)
        return self

    def holding(self, table: PromptTable, folder: Path) -> PromptsConfig:
        """The same with what the file in a folder holds. ValueError: it is not what it was when `sha256` was written down."""
        if self.sha256 is not None and self.sha256 != table.sha256:
            raise ValueError(
                f"{self.file} no longer holds the prompts it did (sha256 {table.sha256[:12]}…, "
                f"was {self.sha256[:12]}…). Bring them back; or set prompts.sha256 to null, for another run."
            )
        there = str(folder.resolve()) if self.folder is None and any(table.metadata) else self.folder
        held = self.model_copy(update={"sha256": table.sha256, "folder": there})
        held._table = table
        return held

    def table(self) -> PromptTable:
        """The prompts with their metadata. ValueError: they are in a file that was not read; `load_config` reads it."""
        if self.list is not None:
            return PromptTable.of(self.list)
        if self._table is None:
            raise ValueError(f"prompts.file {self.file} was not read: get the config by `load_config`.")
        return self._table

    @property
    def held(self) -> bool:
        """The prompts are here, not only their hash."""
        return self.list is not None or self._table is not None

    def texts(self) -> tuple[str, ...]:
        """The prompts alone; see `table`."""
        return self.list if self.list is not None else self.table().texts

    @property
    def digest(self) -> str:
        """The hash of the prompts and their metadata, wherever they are kept."""
        return self.table().sha256 if self.sha256 is None else self.sha256


class TrainConfig(Section):
    """Sizes, optimizer and schedules."""

    iterations: PositiveInt = 100
    """Iterations: sample, score, update."""
    prompts_per_iteration: PositiveInt = 4
    """Prompts in one iteration; the prompts take turns."""
    group: PositiveInt = 8
    """Trajectories per prompt and iteration; VarGrad needs at least 2."""
    micro_batch: PositiveInt = 32
    """Trajectories that pass through the network at once; divides prompts_per_iteration·group. Memory, not results."""
    lr: PositiveFloat = 1e-3
    """Learning rate of the posterior (AdamW): that of a LoRA; whole weights (posterior.full) want far less, such as 1e-5."""
    lr_objective: PositiveFloat = 1e-2
    """Learning rate of the objective's own parameters: log Z and value network, in nats at the first beta."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's two moments in 8 bits: 6 bytes less per trainable number. It is the extra `bnb`."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's memory of gradients; a longer one averages the noise of small batches."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """AdamW's memory of squared gradients; short runs want it shorter than the usual 0.999."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a moving average of the posterior that stays in each iteration, e.g. 0.99, at first min(ema, (1 + i) / (10 + i)) of
    iteration i; null: none. The average is then what is looked at and handed out: by sheets, `watch`, evaluation, `sample`, the
    exported posterior and runs that start from this one; training, and the log of its own trajectories, have the last numbers."""
    warmup: Natural = 0
    """Iterations over which both learning rates grow linearly to their value."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """How they fall to zero over the rest of the run; constant: not at all."""
    grad_clip: PositiveFloat = 1.0
    """Largest norm of the posterior's gradient, that of a loss in nats; larger ones are scaled down."""
    gradient_steps: PositiveInt | None = None
    """Steps per trajectory that get a gradient, drawn at random and re-weighted to stay unbiased; null: all."""
    step_choice: Literal["stratified", "importance"] = "stratified"
    """How these steps are drawn: all equally often, or, of objectives of noised samples, by the size of their gradients so far,
    with a weight each that keeps it unbiased. importance needs `gradient_steps`."""
    step_weights: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] | None = None
    """One positive weight per denoising step on its gradient; null: all 1. The optimum, where every residual is 0, is the same."""
    updates_per_iteration: PositiveInt = 1
    """Optimizer updates on the trajectories of one iteration."""
    measure_every: PositiveInt = 1
    """Iterations from one to the next whose trajectories objectives of noised samples score for the log (KL, ELBO, strength, ESS):
    as many network calls as drawing them. They learn nothing from it; of the iterations between only rewards are logged."""
    parity_tolerance: PositiveFloat = 1e-3
    """Largest |recorded − replayed| log-density of a trajectory, nats, before training stops."""
    process_timeout: PositiveFloat = 1800.0
    """Seconds that one of several processes waits for the others before it stops with an error."""
    rounding_share: PositiveFloat | None = 1.0
    """Largest rounding floor of a network below float32, as a share of the tilt asked for (`kl_budget`, or beta·sd(r)). More is
    refused at iteration 0, more than a tenth of it gives a warning; null: neither. It is logged in any case."""
    checkpoint_every: PositiveInt = 10
    """Iterations between checkpoints; one is also written at the end and when interrupted."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept; older ones are deleted."""
    tracker: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)] = ()
    """Trackers besides metrics.jsonl; each is an extra of this package."""
    grid_every: Natural = 10
    """Iterations between sheets of samples; 0: none."""
    grid_samples: PositiveInt = 8
    """Samples per prompt on such a sheet."""

    @model_validator(mode="after")
    def _some_steps(self) -> TrainConfig:
        if self.step_choice == "importance" and self.gradient_steps is None:
            raise ValueError("step_choice importance has nothing to choose from all steps: set gradient_steps, e.g. 4")
        return self

    @model_validator(mode="after")
    def _micro_batches(self) -> TrainConfig:
        batch = self.prompts_per_iteration * self.group
        if batch % self.micro_batch:
            fitting = [n for n in range(1, batch + 1) if batch % n == 0]
            raise ValueError(
                f"prompts_per_iteration {self.prompts_per_iteration} x group {self.group} = {batch} trajectories cannot be "
                f"divided by micro_batch {self.micro_batch}; use one of {fitting}"
            )
        return self


class Factor(Section):
    """One thing the prompts leave open, e.g. the style, told apart by the labeller."""

    name: str
    """What it is called in reports."""
    classes: Annotated[Strings, Field(min_length=2)]
    """One prompt per possible value, e.g. "a 3d emoji", "a flat emoji"."""
    labels: Strings = ()
    """What the values are called in reports; default: the classes themselves."""

    @model_validator(mode="after")
    def _one_label_each(self) -> Factor:
        if self.labels and len(self.labels) != len(self.classes):
            raise ValueError(f"{len(self.labels)} labels for {len(self.classes)} classes; give one each, or none")
        return self


class EvalConfig(Section):
    """What `eval.py` draws and measures; prior and posterior start from the same noise."""

    samples: PositiveInt = 16
    """Posterior samples per prompt."""
    prompts: PositiveInt | Annotated[Strings, Field(min_length=1)] | None = None
    """So many of the run's prompts, evenly spread over its list, or those in a list here; null: all of them."""
    unseen: Annotated[Strings, Field(min_length=1), AfterValidator(checked_prompts)] | None = None
    """Prompts that the run was not trained on, in the place of its own: whether what it learned holds for them too."""
    prior_samples: PositiveInt = 16
    """Prior samples per prompt, also the ones that are re-weighted by exp(beta·r)."""
    batch: PositiveInt = 32
    """Samples that pass through the network at once. Memory, not results."""
    embedder: Component | None = None
    """The space in which distances between images are measured: `clip_score`, `features` (timm, torchvision, open_clip), your own
    class with `embed(images)` or function of images; null: not measured."""
    reference: Annotated[str, AfterValidator(at_home)] | None = None
    """A folder of real images, all of one size, that metrics of sets (`frechet`, `prdc`, `mmd`, `kid`) also hold the samples
    against; `~` is your home."""
    labeller: Component | None = None
    """A reward module with `classify(images, classes)`, which tells the factors' values apart; null: the embedder."""
    judges: Annotated[tuple[Named, ...], Field(strict=False)] = ()
    """Held-out rewards, by name or as components: what training did not see says whether the reward was hacked. Two of one
    component are told apart by a `name`."""
    factors: Annotated[tuple[Factor, ...], Field(strict=False)] = ()
    """Proportions compared between the posterior and the re-weighted prior."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Level of the bootstrap intervals."""
    bootstrap: PositiveInt = 1000
    """Bootstrap resamples."""
    metrics: Annotated[tuple[Named, ...], Field(strict=False)] = METRICS
    """What is measured, in the order of the tables: files of `diffusion_rtb/evaluation/metrics/` by name, or components."""

    @model_validator(mode="before")
    @classmethod
    def _no_judge(cls, data: Any) -> Any:
        # Every run's config.yaml of version 0.1 has `judge: null`, which said nothing.
        known = isinstance(data, Mapping) and data.get("judge", 0) is None
        return {key: value for key, value in data.items() if key != "judge"} if known else data

    @model_validator(mode="after")
    def _labelled(self) -> EvalConfig:
        if self.prompts is not None and self.unseen is not None:
            raise ValueError("`prompts` chooses among the run's prompts, `unseen` takes others: give one of them")
        if self.factors and self.labeller is None and self.embedder is None:
            raise ValueError(f"{len(self.factors)} factors need a labeller: add `labeller: {{component: ...}}`")
        if self.reference is not None and self.embedder is None:
            raise ValueError(
                f"the reference {self.reference} needs an embedder: add `embedder: {{component: clip_score}}`"
            )
        return self

    @model_validator(mode="after")
    def _judges_told_apart(self) -> EvalConfig:
        names = [judge_name(judge) for judge in self.judges]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"two of the judges {names} are called {twice!r}: add `name: ...` to tell them apart, or take one out"
            )
        return self


class RunConfig(Section):
    """Everything that decides a run. The target is p(x)·exp(beta·r(x)) / Z."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
    """Name of the run and of its folder: letters, digits, _ . and -."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    """Seed of everything random in the run; torch takes 64 bits."""
    out: Annotated[str, AfterValidator(at_home)] = "runs"
    """Folder that the run's folder is made in; `~` is your home."""
    prior: Component
    """The pretrained pipeline."""
    posterior: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the prior's `attach`, which makes the trainable part: of priors on diffusers' pipelines rank, alpha and
    target_modules of a LoRA, or full (true), which trains the weights themselves, with target_modules if not all of them."""
    start: Annotated[str | None, AfterValidator(at_home)] = None
    """The folder of a trained run of the same prior and `posterior`, whose posterior this one starts from; null: from the prior."""
    reward: Component
    """r(x): higher is better."""
    beta: Annotated[BetaConfig, BeforeValidator(as_section, json_schema_input_type=PositiveFloat | BetaConfig)]
    """Nats per unit of reward; alpha = 1/beta is the weight of the KL to the prior. A number, or with what moves it."""
    objective: Component = Component(component="rtb")
    """The loss."""
    prompts: PromptsConfig
    behaviours: Annotated[tuple[Component, ...], Field(strict=False)] = ()
    """Where the training trajectories come from, besides the posterior itself; each draws its `share` of every prompt's group."""
    train: TrainConfig = TrainConfig()
    watch: WatchConfig | None = None
    """What to look at now and then, to see whether the reward is being hacked; null: nothing."""
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _enough_prompts(self) -> RunConfig:
        if self.prompts.list is not None:
            self.check_count(len(self.prompts.list))
        return self

    def check_count(self, prompts: int) -> None:
        """Refuse an iteration, or a look, of more prompts than there are; ValueError."""
        if prompts < self.train.prompts_per_iteration:
            raise ValueError(
                f"train.prompts_per_iteration {self.train.prompts_per_iteration} is more than the {prompts} prompts; "
                "lower it or add prompts"
            )
        if self.watch is not None:
            self.watch.check_count(prompts)
