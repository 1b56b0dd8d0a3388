"""Which look is the best so far, by a policy; its checkpoint is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_rtb.config.watch.section import WatchConfig
from diffusion_rtb.run.best import Best
from diffusion_rtb.training.watch.change import Verdict

__all__ = ["better", "candidate"]

Numbers = Mapping[str, float]

RANKS: Mapping[str, Callable[[Numbers, float], tuple[float, ...]]] = {
    "reward": lambda seen, _: (seen["reward"], -seen["kl"]),
    "elbo": lambda seen, beta: (beta * seen["reward"] - seen["kl"],),
    "judge": lambda seen, _: (seen.get("judges", 0.0), seen["reward"]),
    "frontier": lambda seen, _: (
        max(seen.get("rise", 0.0), 0.0) * seen.get("kept", 1.0),
        seen["reward"],
        seen.get("kept", 1.0),
        -seen["kl"],
    ),
}
"""What is highest first, then what decides between equals. The best by `frontier` is exceeded by none in reward, diversity and -KL
at once: whoever had no less of each and more of one would rank higher."""


def candidate(iteration: int, watch: WatchConfig, found: Verdict, kl: float) -> Best | None:
    """What a look is to be ranked by; None where it raises the alarm.

    `rise` is the reward's and `judges` the mean of the judges' changes, in the prior's standard deviations; `kept` is the share of
    the prior's mean pairwise distance; KL in nats. What the prior has no spread of is left out.
    """
    if found.wrong:
        return None
    judges = [-change.size for change in found.others if change.kind == "judge"]
    lost = next((change.size for change in found.others if change.kind == "diversity"), math.nan)
    numbers = {"reward": found.rise.now, "kl": kl, "rise": found.rise.size, "kept": 1.0 - lost}
    numbers |= {"judges": math.fsum(judges) / len(judges)} if judges else {}
    known = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return Best(iteration, watch.policy, known, _settings(watch))


def better(new: Best, old: Best | None, beta: float) -> bool:
    """Whether a look takes the place of the best before it, at today's beta; of equals the earlier stays.

    One that was seen otherwise, or that lies ahead of a run which went back to an earlier checkpoint, is no measure.
    """
    if old is None or old.iteration > new.iteration or old.settings != new.settings:
        return True
    if old.numbers.keys() != new.numbers.keys():
        return True
    rank = RANKS[new.policy]
    return rank(new.numbers, beta) > rank(old.numbers, beta)


def _settings(watch: WatchConfig) -> dict[str, Any]:
    """What makes looks comparable."""
    return watch.model_dump(mode="json", include={"judges", "embedder", "prompts", "samples"})
