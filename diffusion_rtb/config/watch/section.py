"""The section `watch:` of a config: what a run looks at now and then to see whether its reward is being hacked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from diffusion_rtb.config.section import Named, Section, judge_name

__all__ = ["Bands", "WatchConfig"]


class Bands(Section):
    """From where on a change against the prior raises the alarm; what is no larger than twice its standard error never does."""

    reward: PositiveFloat = 0.5
    """How far the training reward must have risen; standard deviations of the prior's rewards within a prompt."""
    judge: PositiveFloat = 0.5
    """How far a judge may fall; standard deviations of its own scores of the prior within a prompt."""
    diversity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Which share of the prior's mean pairwise distance may be lost."""
    norm_ratio: PositiveFloat = 0.1
    """By how much the mean of |e_q| / |e_p| may exceed 1."""


class WatchConfig(Section):
    """Every so many iterations a look at the posterior, at the prompts and seeds of the prior, by judges that do not train it."""

    every: PositiveInt = 10
    """Iterations between two looks; the first is at the prior itself, the last at the finished posterior."""
    judges: Annotated[tuple[Named, ...], Field(strict=False)] = ()
    """Held-out rewards: components, with `name` where one occurs twice."""
    embedder: Named | None = None
    """A reward with `embed(images)`, or a function of images: the space in which diversity is measured; null: not measured."""
    prompts: PositiveInt | None = None
    """So many of the run's prompts, evenly spread over its list; null: 4, or all of fewer."""
    samples: Annotated[int, Field(ge=3)] = 8
    """Samples of each of these prompts: of the prior once, of the posterior at every look."""
    bands: Bands = Bands()
    """What raises the alarm."""
    policy: Literal["reward", "elbo", "judge", "frontier"] = "elbo"
    """Which checkpoint is the best, of the looks that raise no alarm: highest mean reward; highest beta·reward - KL; highest mean
    of the judges, each in the prior's standard deviations; or, of those that no other exceeds in reward, diversity and -KL at once,
    the one with the largest rise of the reward times share of the diversity kept."""
    stop: bool = False
    """End the run at an alarm, as an interruption does."""

    @model_validator(mode="after")
    def _measured(self) -> WatchConfig:
        if self.policy == "judge" and not self.judges:
            raise ValueError("policy judge needs a judge: add `judges: [clip_score]`, or take elbo")
        if self.policy == "frontier" and self.embedder is None:
            raise ValueError("policy frontier needs a diversity: add `embedder: clip_score`, or take elbo")
        names = [judge_name(judge) for judge in self.judges]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"two judges are called {double!r}: add `name: ...` to tell them apart")
        return self

    def check_count(self, prompts: int) -> None:
        """Refuse a look at more prompts than there are; ValueError."""
        if self.prompts is not None and self.prompts > prompts:
            raise ValueError(
                f"watch.prompts is {self.prompts}, and the run has {prompts} prompts; lower it, or null for 4 or all of fewer"
            )
