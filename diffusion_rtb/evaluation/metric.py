"""What a metric is: a value of prior and posterior samples for metrics.json, and how tables and the model card show it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.components import Described
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.evaluation.features import Reference
from diffusion_rtb.evaluation.samples import Drawn, Scorer

__all__ = ["NEEDS", "NO_NOISE", "Metric", "Need", "metrics_of", "missing", "scorer_of"]


RESERVED = ("beta", "left_out", "overall", "per_prompt", "prompt", "run", "samples", "schema", "subject")
"""Other keys of metrics.json."""


Need = Literal["embedding", "labels", "judges", "log_densities", "prior", "beta"]

NEEDS: Mapping[Need, str] = {
    "embedding": "eval.embedder is null: name a space of features, such as eval.embedder.component=clip_score",
    "labels": "eval.factors is empty: it says which classes a labeller tells apart",
    "judges": "there are no held-out judges: --judges NAME",
    "log_densities": "pictures that were made elsewhere have no log-densities",
    "prior": "there are no samples of a prior: --against FOLDER",
    "beta": "nobody said what beta the pictures are for: --config CONFIG",
}
"""What a metric may need, and what is said where it is not there."""

NO_NOISE = "steps of this sampler have no noise, so that there are no log-densities"
"""What is said of these where a run's own sampler draws none."""


class Metric(ABC):
    """Base of the classes in `evaluation/metrics/`, and of your own.

    Its constructor's arguments are the settings that a config can give it.
    """

    name: ClassVar[str]
    """Its key in metrics.json, in `overall` and for each prompt."""
    unit: ClassVar[str] = ""
    needs: ClassVar[Need | tuple[Need, ...] | None] = "prior"
    """What there must be besides the posterior's rewards, see `NEEDS`; without it the value is None, and metrics.json says why.

    A metric that does not need the prior's samples or beta may get none of them: `prior` is then empty, `beta` NaN.
    """
    per_prompt: ClassVar[bool] = True
    """Also of each prompt alone; otherwise of all together, beside `overall`."""
    columns: ClassVar[tuple[str, ...]] = ()
    """Titles of its columns on the terminal."""
    reference: Reference | None = None
    """Features of real images, where `eval.reference` names some; told before `of`."""

    @abstractmethod
    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> Any:
        """Its value in plain JSON types; NaN where it cannot be estimated.

        Args:
            prior: Samples of the prior.
            posterior: Samples of the posterior, with log_q and log_p.
            beta: nats per unit of reward.
            config: The section `eval:`, with the confidence of intervals.
        """

    def prepare(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """Load what `scores` needs; told once, before anything is drawn, of all prompts that are evaluated.

        Raises:
            ValueError: it cannot be measured on these prompts.
        """
        return

    def scores(
        self, images: Float[Tensor, "batch *shape"], prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Mapping[str, Float[Tensor, " batch"]]:
        """Numbers of each sample that only its image tells, by name; images are gone when `of` is asked.

        They are `Drawn.scores` under METRIC.name; nothing, unless it is overridden.

        Args:
            images: As the reward sees them, on the prior's device.
            prompts: The prompt of each.
            metadata: What the prompt file says of the prompt of each.
        """
        return {}

    def kept(self, drawn: Drawn, name: str) -> Float[Tensor, " batch"] | None:
        """What `scores` called so; None where these samples were not asked."""
        return (drawn.scores or {}).get(f"{self.name}.{name}")

    def row(self, value: Any) -> tuple[str, ...]:
        """A value as the terminal shows it, one text for each column."""
        return tuple(f"{value:.2f}" for _ in self.columns)

    def sentence(self, value: Any, beta: float) -> str:
        """What the terminal says of its value over all prompts, below the tables; "": nothing."""
        return ""

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """A value as columns of the table of sides, which are rows of the model card.

        Label -> of `prior`, `reweighted_prior` and `posterior` a number, {mean, low, high}, or None, as of one that is missing.
        """
        if not isinstance(value, float) or not self.columns:
            return {}
        label = self.columns[0]
        return {f"{label} ({self.unit})" if self.unit else label: {"prior": None, "posterior": value}}


def metrics_of(described: Sequence[Described]) -> list[Metric]:
    """The metrics that a config names, in its order.

    Raises:
        ValueError: one is no `Metric`, or two have the same name, or one that metrics.json uses already.
    """
    found: list[Metric] = []
    for component in described:
        metric = component.construct()
        if not isinstance(metric, Metric):
            raise ValueError(
                f"eval.metrics: {component.name!r} is a {type(metric).__name__}: derive it from "
                "diffusion_rtb.evaluation.metric.Metric."
            )
        if metric.name in {*RESERVED, *(other.name for other in found)}:
            raise ValueError(
                f"eval.metrics: {component.name!r} is called {metric.name!r}, which metrics.json has already: give its class "
                "another `name`, or name it once."
            )
        found.append(metric)
    return found


def missing(metric: Metric, prior: Drawn, posterior: Drawn, beta: float, *, sampled: bool = False) -> str | None:
    """Why a metric cannot be measured, or None: the first of what it needs that is not there.

    Args:
        metric: Which.
        prior: Its samples, maybe none.
        posterior: The other ones.
        beta: NaN where nobody said it.
        sampled: They were drawn here, not made elsewhere.
    """
    needs = (metric.needs,) if isinstance(metric.needs, str) else metric.needs or ()
    sides = [side for side in (prior, posterior) if len(side)]
    there: dict[Need, bool] = {
        "embedding": all(side.embedding is not None for side in sides),
        "labels": all(side.labels is not None for side in sides),
        "judges": all(side.judges is not None for side in sides),
        "log_densities": posterior.log_q is not None and posterior.log_p is not None,
        "prior": len(prior) > 0,
        "beta": math.isfinite(beta),
    }
    lacking = next((need for need in needs if not there[need]), None)
    if lacking is None:
        return None
    return NO_NOISE if sampled and lacking == "log_densities" else NEEDS[lacking]


def scorer_of(metrics: Sequence[Metric]) -> Scorer | None:
    """One function for what all of these metrics want of the images; None where none wants anything."""
    asking = [metric for metric in metrics if type(metric).scores is not Metric.scores]

    def scores(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> dict[str, Tensor]:
        found = {metric.name: metric.scores(images, prompts, metadata) for metric in asking}
        return {f"{metric}.{name}": values for metric, each in found.items() for name, values in each.items()}

    return scores if asking else None
