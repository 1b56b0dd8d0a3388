"""Which behaviours a run draws from, and how many trajectories per prompt from each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusion_rtb.behaviours._source import Source
from diffusion_rtb.behaviours.on_policy import OnPolicy
from diffusion_rtb.behaviours.prior_buffer import PriorBuffer
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["Mixture", "sources"]


class Mixture(dict[str, tuple[Source, int]]):
    """The behaviours of a run by name, each with its trajectories per prompt; the posterior's own come first."""

    @property
    def on_policy(self) -> OnPolicy:
        """The posterior's own."""
        source, _ = self[OnPolicy.name]
        assert isinstance(source, OnPolicy)
        return source

    @property
    def prior(self) -> tuple[PriorBuffer, int]:
        """The prior's, with a count of 0 where none are drawn."""
        source, count = self[PriorBuffer.name]
        assert isinstance(source, PriorBuffer)
        return source, count

    @property
    def drawing(self) -> list[Source]:
        """Those that have a share."""
        return [source for source, count in self.values() if count > 0]

    def draw(self, sampler: Sampler, rows: Sequence[int], iteration: int, beta: float) -> dict[str, Batch]:
        """One batch from each behaviour that has a share."""
        parts = {}
        for name, (source, count) in self.items():
            if count > 0:
                parts[name] = source.draw(sampler, rows, count, iteration, beta)
        return parts

    def of_prior(self, own: Batch | None, start: str | None) -> list[Batch]:
        """Samples of the prior that are there once the first iteration has drawn, as they were drawn.

        Args:
            own: The posterior's own undisturbed trajectories.
            start: A run that it starts from; None: it is the prior still.
        """
        buffer, count = self.prior
        if count > 0:
            return list(buffer.extended[0].values())
        return [own] if own is not None and start is None else []

    def settle(self, parts: Mapping[str, Batch]) -> None:
        """Tell every behaviour what the iteration's trajectories were; one without a share has nothing to remember."""
        for source, count in self.values():
            if count > 0:
                source.settle(parts)


def sources(config: RunConfig) -> Mixture:
    """The behaviours that a config lists, the posterior's own first: what the others leave of each group is theirs.

    `on_policy` and `prior_buffer` are there with their defaults where the list lacks them: the one to train on, the other for an
    objective's warm-up alone.

    Raises:
        ValueError: one cannot be made; two have one name; the shares are no whole numbers, or leave nothing to the posterior.
    """
    listed: list[Source] = [build(component, "behaviour") for component in config.behaviours]
    names = [source.name for source in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"behaviours: {twice[0]!r} is there more than once. Take one out, or put them together.")
    found = {source.name: source for source in listed}
    found = {OnPolicy.name: found.pop(OnPolicy.name, OnPolicy()), **found}
    found.setdefault(PriorBuffer.name, PriorBuffer())
    group = config.train.group
    for source in found.values():
        source.prepare(config.seed, group)
    counts = {name: _count(source, group) for name, source in found.items()}
    own = group - sum(counts.values())
    if own < 1:
        used = ", ".join(f"{type(found[name]).__name__} {found[name].share:g}" for name in counts if counts[name] > 0)
        raise ValueError(
            f"behaviours: the shares of {used} leave nothing to the posterior's own trajectories: they must sum to less than 1."
        )
    counts[OnPolicy.name] = own
    return Mixture({name: (source, counts[name]) for name, source in found.items()})


def _count(source: Source, group: int) -> int:
    name, share = type(source).__name__, source.share
    count = share * group
    if abs(count - round(count)) > 1e-6:
        fitting = ", ".join(f"{n / group:.6g}" for n in range(group))
        raise ValueError(
            f"behaviours: the share {share:g} of {name} is {count:g} of the {group} trajectories of train.group, not a whole "
            f"number; shares that fit: {fitting}."
        )
    return round(count)
