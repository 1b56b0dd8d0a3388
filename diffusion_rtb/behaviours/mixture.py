"""Which behaviours a run draws from, and how many trajectories per prompt from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusion_rtb.behaviours.back_and_forth import BackAndForth
from diffusion_rtb.behaviours.on_policy import OnPolicy
from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.behaviours.replay import Replay
from diffusion_rtb.behaviours.source import Source
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Mixture", "sources"]


class Mixture(dict[str, tuple[Source, int]]):
    """The behaviours of a run by name, each with its trajectories per prompt; the posterior's own come first."""

    @property
    def on_policy(self) -> OnPolicy:
        """The posterior's own."""
        source, _ = self["posterior"]
        assert isinstance(source, OnPolicy)
        return source

    @property
    def prior(self) -> tuple[PriorBuffer, int]:
        """The prior's, with a count of 0 where none are drawn."""
        source, count = self["prior"]
        assert isinstance(source, PriorBuffer)
        return source, count

    def draw(self, sampler: Sampler, rows: Sequence[int], iteration: int, beta: float) -> dict[str, Batch]:
        """One batch from each behaviour that has a share."""
        parts = {}
        for name, (source, count) in self.items():
            if count > 0:
                parts[name] = source.draw(sampler, rows, count, iteration, beta)
        return parts

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """Tell every behaviour what the iteration's trajectories were."""
        for source, _ in self.values():
            source.settle(parts)


def sources(config: RunConfig) -> Mixture:
    """The behaviours that a config asks for. A new one is a file beside this one, its section, and its line here."""
    behaviour, group, seed = config.behaviour, config.train.group, config.seed
    exploration, replay, back = behaviour.exploration, behaviour.replay, behaviour.back_and_forth
    counts = {key: round(share * group) for key, share in behaviour.shares.items()}
    measured = max(2, round(exploration.measured * group)) if exploration.measured > 0 else 0
    on_policy = OnPolicy(
        seed, scale=exploration.scale, until=exploration.until, kind=exploration.kind, measured=measured
    )
    buffer = PriorBuffer(seed, size=behaviour.prior_buffer, resample=behaviour.resample, refresh=behaviour.refresh)
    found = Mixture(posterior=(on_policy, group - sum(counts.values())), prior=(buffer, counts["prior_share"]))
    if counts["replay.share"]:
        found["replay"] = Replay(seed, capacity=replay.capacity, priority=replay.priority), counts["replay.share"]
    if counts["back_and_forth.share"]:
        found["back_and_forth"] = (
            BackAndForth(seed, depth=back.depth, pool=back.pool),
            counts["back_and_forth.share"],
        )
    return found
