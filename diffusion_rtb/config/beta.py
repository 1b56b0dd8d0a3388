"""The section `beta` of a config: a number, or a number and what moves it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, model_serializer, model_validator

from diffusion_rtb.config.section import Section

__all__ = ["AnnealConfig", "BetaConfig", "KlBudgetConfig", "as_section"]


class AnnealConfig(Section):
    """beta grows linearly from a fraction of its value: easy targets first."""

    start: Annotated[float, Field(gt=0, le=1)]
    """Fraction of beta at iteration 0."""
    iterations: PositiveInt
    """Iterations until beta has its full value."""


class KlBudgetConfig(Section):
    """beta is adapted until KL(posterior || prior) is as many nats; the value is where it starts.

    At 4 times what the posterior has realised it waits for it, and a warning says so: such a posterior may never reach `nats`.
    """

    nats: PositiveFloat
    """The KL to reach; mean over the prompts."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Largest change of log beta in one iteration."""


class BetaConfig(Section):
    """beta, nats per unit of reward; alpha = 1/beta is the weight of the KL to the prior. A number alone is its value: constant."""

    value: PositiveFloat
    """Nats per unit of reward."""
    anneal: AnnealConfig | None = None
    """Grow to the value; null: no."""
    kl_budget: KlBudgetConfig | None = None
    """Adapt beta until the posterior is as far from the prior; null: no."""

    @property
    def moved_by(self) -> str | None:
        """The setting that moves beta while training."""
        moving = {"beta.anneal": self.anneal, "beta.kl_budget": self.kl_budget}
        return next((key for key, setting in moving.items() if setting is not None), None)

    @model_validator(mode="after")
    def _moved_by_one(self) -> BetaConfig:
        if self.anneal is not None and self.kl_budget is not None:
            raise ValueError(
                f"anneal and kl_budget (nats {self.kl_budget.nats:g}) both decide beta: set one of them to null. A kl_budget "
                "starts at `value`, so a small one there takes the place of annealing"
            )
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: Any) -> Any:
        written = {key: value for key, value in handler(self).items() if value is not None}
        return written if self.moved_by else self.value


def as_section(written: Any) -> Any:
    """A beta that is written as a number, as the section it stands for."""
    return written if written is None or isinstance(written, dict | BetaConfig) else {"value": written}
