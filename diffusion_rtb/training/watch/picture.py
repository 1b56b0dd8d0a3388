"""The picture of an alarm: prior beside posterior at the same seeds, where they differ most in what has gone wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffusion_rtb.evaluation.similarity import mean_pairwise_cosine_distance
from diffusion_rtb.files.pictures import side_by_side
from diffusion_rtb.sampling.sampler import Sampler, decoded
from diffusion_rtb.training.watch.change import Change

if TYPE_CHECKING:
    from diffusion_rtb.training.watch.look import Look

__all__ = ["pairs", "shown"]

COLUMNS = 4
"""Samples of a row, of each side; fewer where there are fewer. Of vectors, which become dots, all."""


def pairs(sampler: Sampler, prior: Look, posterior: Look, wrong: Sequence[Change]) -> Any:
    """A picture with a row for each change: of a judge or the norm, samples of the prompt with the worst one, the worst first; of
    the diversity, the first samples of the prompt that has lost most of it.
    """
    rows = [shown(prior, posterior, change) for change in wrong]
    titles = [
        f"{change.name}: {sampler.prompts[int(prior.prompt[row[0]])]}" for change, row in zip(wrong, rows, strict=True)
    ]
    sides = [torch.stack([_images(sampler, look.x_0[row]) for row in rows]) for look in (prior, posterior)]
    captions = [[_captions(look, row) for row in rows] for look in (prior, posterior)]
    return side_by_side(sides[0], sides[1], titles, captions=(captions[0], captions[1]))


def shown(prior: Look, posterior: Look, change: Change) -> Int[Tensor, " columns"]:
    """Which samples show a change best, all of one prompt."""
    if change.kind == "diversity":
        assert prior.embedding is not None
        assert posterior.embedding is not None
        prompts = prior.prompt.unique().tolist()
        kept = [
            mean_pairwise_cosine_distance(posterior.embedding[posterior.prompt == row])
            / max(mean_pairwise_cosine_distance(prior.embedding[prior.prompt == row]), 1e-12)
            for row in prompts
        ]
        worst = torch.arange(len(prior), dtype=torch.float64)
        prompt = prompts[kept.index(min(kept))]
    else:
        if change.kind == "judge":
            worst = (posterior.judges[change.name] - prior.judges[change.name]).double()
        else:
            worst = -posterior.loudness.double()
        prompt = int(prior.prompt[worst.argmin()])
    here = (prior.prompt == prompt).nonzero().flatten()
    most = COLUMNS if prior.x_0.ndim == 4 else len(here)
    return here[worst[here].argsort(stable=True)[:most]]


def _images(sampler: Sampler, x_0: Float[Tensor, "columns *dims"]) -> Float[Tensor, "columns *shape"]:
    device = sampler.prior.device
    return torch.cat([decoded(sampler.prior, x_0[c].to(device)).cpu().float() for c in sampler.chunks(len(x_0))])


def _captions(look: Look, row: Int[Tensor, " columns"]) -> list[str]:
    scores = {"reward": look.reward, **look.judges}
    return [", ".join(f"{name} {float(values[i]):.3g}" for name, values in scores.items()) for i in row.tolist()]
