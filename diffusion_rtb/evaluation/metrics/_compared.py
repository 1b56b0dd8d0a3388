"""What metrics have in common that hold whole sets of samples against each other in the embedder's space."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusion_rtb.config.sections import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.metrics._clouds import Cloud, clouds_of, sizes
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["Compared"]

AGAINST = {
    "reweighted_prior": ("prior", "posterior"),
    "prior": ("posterior", "reweighted_prior"),
    "reference": ("prior", "reweighted_prior", "posterior"),
}
"""What is held against what: the posterior against what it should be, beside where it came from; and everything against images."""


class Compared(Metric):
    """Sides against the re-weighted prior, which is what a perfect posterior is; against the prior; and against real images.

    A value is `to_reweighted_prior`, `to_prior` and `to_reference`, each with a number for each side, or None where it cannot be
    known; `samples`, points of each side, effective ones of the re-weighted prior; and `dim`.
    """

    needs = ("embedding", "prior", "beta")
    key: ClassVar[str | None] = None
    """What the table shows of a number with several parts."""

    @abstractmethod
    def between(self, clouds: Mapping[str, Cloud], pairs: Sequence[tuple[str, str]], config: EvalConfig) -> list[Any]:
        """A number, or several by name, for each pair (side, against what)."""

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, Any]:
        """See the class."""
        clouds = clouds_of(prior, posterior, beta)
        if self.reference is not None and self.reference.covers(posterior.prompt):
            clouds["reference"] = Cloud.of(self.reference.features)
        pairs = [
            (side, target) for target, sides in AGAINST.items() for side in sides if {side, target} <= clouds.keys()
        ]
        numbers = dict(zip(pairs, self.between(clouds, pairs, config), strict=True))
        found = {
            f"to_{target}": {side: numbers[side, target] for side in sides if (side, target) in numbers} or None
            for target, sides in AGAINST.items()
        }
        return found | {"samples": sizes(clouds), "dim": clouds["posterior"].points.shape[1]} | self.further(clouds)

    def further(self, clouds: Mapping[str, Cloud]) -> dict[str, Any]:
        """What else the value says."""
        return {}

    def row(self, value: Any) -> tuple[str, ...]:
        """From the prior to the posterior, each against the re-weighted prior."""
        found = value["to_reweighted_prior"]
        return (" → ".join(self._shown(found[side]) for side in ("prior", "posterior")) if found else "-",)

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        """The same."""
        label = f"{self.columns[0]} to the re-weighted prior"
        found = value["to_reweighted_prior"]
        return {label: {side: self._number(found[side]) for side in ("prior", "posterior")}} if found else {}

    def _number(self, value: Any) -> float | None:
        return value if self.key is None or value is None else value[self.key]

    def _shown(self, value: Any) -> str:
        number = self._number(value)
        return "?" if number is None else f"{number:.3g}"
