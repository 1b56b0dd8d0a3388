"""A posterior of which samples are known: those of the prior, weighted by exp(beta·r) within each prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from diffusion_rtb.comparison.truths.measure import of_trajectories
from diffusion_rtb.comparison.truths.truth import Looks, Reference, Result, Truth
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.estimates import (
    elbo,
    ess,
    kl,
    log_z_from_prior,
    reweighted_mean,
    within_prompts,
)
from diffusion_rtb.evaluation.kept import KeptParts
from diffusion_rtb.evaluation.metrics.posterior_check import PosteriorCheckMetric
from diffusion_rtb.evaluation.samples import Drawn, Sampled, Tools, measure
from diffusion_rtb.evaluation.similarity import mean_pairwise_cosine_distance, vendi_score
from diffusion_rtb.evaluation.subject import load_tools
from diffusion_rtb.evaluation.subjects.run import chosen
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.checks import Components
from diffusion_rtb.run.manifest import versions
from diffusion_rtb.sampling.sampler import Sampler

__all__ = ["ReweightedTruth"]


class ReweightedTruth(Truth):
    """See `Truth`; the samples, the factors that are counted and the space of the diversity are those of `eval:`.

    Args:
        config: With prior, reward, prompts, beta and eval of all runs.
        components: Described.
        prior: Loaded; let go of after it was drawn from.
    """

    def __init__(self, config: RunConfig, components: Components, prior: Prior) -> None:
        self._config, self._components = config, components
        self._model: Prior | None = prior
        self._eval, self._beta = config.eval, config.beta.value
        self._rows, self._table = chosen(config)
        self._tools = Tools()
        self._prior = Drawn.none()
        self.defaults = Looks(config.eval.samples, 5, max(2, config.eval.samples // 8))

    @property
    def log_z(self) -> float:
        """From the prior's samples, mean over prompts: errs low where few of them carry the weight."""
        return log_z_from_prior(self._prior.reward, self._beta, self._prior.prompt)

    @property
    def _log_w(self) -> Tensor:
        return self._beta * self._prior.reward.double()

    def prepare(self, folder: Path, looks: Looks, seeds: Mapping[int, RunConfig], tell: Callable[[str], None]) -> None:
        """Draw the prior's samples, once for all runs."""
        self._tools = load_tools(self._components.eval, self._eval)
        tell(f"the prior: {self._eval.prior_samples} samples for each of {len(self._table)} prompts")
        assert self._model is not None
        sampler = Sampler(self._model, self._components.reward.build(), [], 1)
        side = self._side(sampler, self._config, self._eval.prior_samples, posterior=False)
        kept = KeptParts(folder / "prior", self._depends())
        self._prior, _ = measure(side, self._eval, self._tools, keeper=kept.of("prior"))
        self._model = None
        self.references = self._references(looks.samples)

    def _depends(self) -> dict[str, Any]:
        wanted = {"prior", "reward", "prompts", "seed"}
        settings = self._eval.model_dump(mode="json", exclude={"batch", "confidence", "bootstrap"})
        config = self._config.model_dump(mode="json", include=wanted)
        return {"config": config, "settings (eval.*)": settings, "versions": versions()}

    def _side(self, sampler: Sampler, config: RunConfig, count: int, *, posterior: bool) -> Sampled:
        """Samples on the evaluated prompts."""
        table = self._table
        own = Sampler(sampler.prior, sampler.reward, table.texts, self._eval.batch, table.metadata)
        return Sampled(own, count, config.seed, posterior=posterior, numbers=self._rows)

    def _references(self, count: int) -> Sequence[Reference]:
        """The re-weighted prior, which is what a perfect model would show, and the prior as it is."""
        prior, r, prompt = self._prior, self._prior.reward.double(), self._prior.prompt
        exact = {
            "elbo": self.log_z,
            "reward": reweighted_mean(r, self._log_w, prompt),
            "kl": self._beta * reweighted_mean(r, self._log_w, prompt) - self.log_z,
            "ess": ess(self._log_w, prompt),
        }
        untrained = {"elbo": elbo(self._log_w, prompt), "reward": _mean(r, prompt), "kl": 0.0} | self._shares(prior)
        seed, few = self._config.seed, prior.first(count)
        exact |= _diversity(few, self._beta * few.reward.double()) | {"exact_log_z": self.log_z}
        untrained |= _diversity(few) | {"exact_log_z": self.log_z}
        return (
            Reference("truth", "prior, re-weighted", [(seed, Result(exact))]),
            Reference("prior", "as it is", [(seed, Result(untrained))]),
        )

    def _shares(self, drawn: Drawn) -> dict[str, float]:
        """Total variation of the factors, and what sampling alone makes of it; nothing without factors."""
        if drawn.labels is None or not self._eval.factors:
            return {}
        checks = PosteriorCheckMetric().of(self._prior, drawn, self._beta, self._eval)
        return {"tv": mean(c["tv"]["mean"] for c in checks), "tv_noise": mean(c["noise"]["mean"] for c in checks)}

    def look(self, sampler: Sampler, config: RunConfig, count: int) -> dict[str, float]:
        """Without diversity."""
        side = self._side(sampler, config, count, posterior=True)
        drawn, _ = measure(side, self._eval, Tools(labeller=self._tools.labeller))
        return _densities(drawn, self._beta) | self._shares(drawn)

    def measured(self, sampler: Sampler, config: RunConfig, count: int) -> tuple[dict[str, Any], Tensor]:
        """`tv` is the mean over factors, `tv_noise` what sampling alone makes of it; `vendi` and `distance` within a prompt."""
        drawn, _ = measure(self._side(sampler, config, count, posterior=True), self._eval, self._tools)
        numbers: dict[str, Any] = _densities(drawn, self._beta) | self._shares(drawn) | _diversity(drawn)
        numbers |= of_trajectories(drawn, self._beta, drawn.prompt)
        return numbers | {"exact_log_z": self.log_z, "samples": count}, torch.zeros(len(drawn), 0)

    def sentences(self, looks: Looks) -> list[str]:
        """How many samples carry the truth."""
        share = ess(self._log_w, self._prior.prompt)
        found = [
            f"{looks.samples:,} samples of each of {len(self._table)} prompts; log Z = {self.log_z:.4f} nats.",
            f"`truth` is {self._eval.prior_samples:,} samples of the prior for each prompt, weighted by exp(beta·r): "
            f"{share * self._eval.prior_samples:.0f} effective ones for a prompt.",
        ]
        if self._eval.factors:
            names = ", ".join(factor.name for factor in self._eval.factors)
            found.append(f"TV is between class shares of these and of the samples, mean over factors ({names}).")
        if self._tools.embedder is not None:
            found.append(
                f"Vendi scores and mean pairwise cosine distances are within a prompt, of {looks.samples:,} samples."
            )
        return found


def _diversity(drawn: Drawn, log_w: Tensor | None = None) -> dict[str, float]:
    """Vendi score and mean pairwise cosine distance within a prompt, of weighted samples; nothing without embeddings."""
    if drawn.embedding is None:
        return {}
    found = []
    for row in drawn.prompt.unique().tolist():
        own = drawn.prompt == row
        weights = None if log_w is None else log_w[own].softmax(0)
        points = drawn.embedding[own]
        found.append((vendi_score(points, weights), mean_pairwise_cosine_distance(points, weights)))
    return {"vendi": mean(v for v, _ in found), "distance": mean(d for _, d in found)}


def _densities(drawn: Drawn, beta: float) -> dict[str, float]:
    found = {"reward": _mean(drawn.reward.double(), drawn.prompt)}
    if drawn.log_q is None:
        return found
    return {"elbo": elbo(drawn.log_weights(beta), drawn.prompt), "kl": kl(*drawn.densities, drawn.prompt)} | found


def _mean(values: Tensor, prompt: Tensor) -> float:
    return within_prompts(lambda own: float(own.mean()), values, prompt)
