"""|e_q| / |e_p| against networks whose ratio is known, and 1 where nothing was trained."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.normal import output_norm
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.estimates import norm_ratio
from diffusion_rtb.evaluation.metrics.norm_ratio import NormRatio
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.sampling.sampler import Sampler
from pipelines.gaussian import Gaussian

STEPS, LOUDER = 6, 1.25


def sampler(scheduler: str = "DDIMScheduler") -> Sampler:
    """x ~ N(0, I): the prior's exact prediction is sqrt(1 - alpha_bar)·x_t."""
    prior = Gaussian([0.0, 0.0, 0.0], steps=STEPS, scheduler=scheduler, dtype="float64")
    prior.attach()
    return Sampler(prior, lambda images, prompts: images[:, 0], ["a", "b"], 4)


def turned_up(prior: Any, by: float) -> None:
    """The correction gain·u with u = (by - 1)·prediction / gain."""
    denoiser = prior.pipe.denoiser
    with torch.no_grad():
        for t in range(1, STEPS + 1):
            if denoiser.gain[t] != 0:
                slope = (by - 1) * (1 - denoiser.alpha_bar[t]).sqrt() / denoiser.gain[t]
                denoiser.correction.slope[t - 1] = slope * torch.eye(3)


def posterior(made: Sampler) -> Any:
    return made.completed(made.draw([0, 0, 0, 1, 1], list(range(5))))


def test_an_untrained_posterior_is_as_loud_as_the_prior() -> None:
    batch = posterior(sampler())
    assert torch.equal(batch.norm_q, batch.norm_p)
    assert torch.equal(norm_ratio(batch.norm_q, batch.norm_p, batch.prompt), torch.ones(STEPS, dtype=torch.float64))


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_a_louder_network_has_its_ratio_at_each_step_with_a_density(scheduler: str) -> None:
    made = sampler(scheduler)
    turned_up(made.prior, LOUDER)
    batch = posterior(made)
    dense = batch.trajectory.stochastic
    alpha_bar = made.prior.pipe.denoiser.alpha_bar[batch.trajectory.timesteps.long()]
    by_hand = (1 - alpha_bar).sqrt() * batch.trajectory.x[:, :-1].norm(dim=2)
    torch.testing.assert_close(batch.norm_p, torch.where(dense, by_hand, 0.0))
    ratio = norm_ratio(batch.norm_q, batch.norm_p)
    torch.testing.assert_close(ratio[dense], torch.full_like(ratio[dense], LOUDER))
    assert bool(ratio[~dense].isnan().all())
    assert int((~dense).sum()) == (scheduler == "DDPMScheduler")


def test_both_ways_to_know_the_posterior_agree() -> None:
    """Recorded when it was drawn, or scored afterwards; a scored prior's samples have both as well."""
    made = sampler()
    turned_up(made.prior, LOUDER)
    drawn = posterior(made)
    again = made.completed(replace(drawn, log_q=None, norm_q=None))
    assert again.norm_q is not None
    assert torch.equal(drawn.norm_q, again.norm_q)
    of_prior = made.completed(made.draw([0, 1], [7, 8], of_prior=True))
    assert of_prior.norm_q is not None
    assert of_prior.norm_p is not None
    torch.testing.assert_close(of_prior.norm_q / of_prior.norm_p, torch.full_like(of_prior.norm_p, LOUDER))


def test_prompts_have_the_same_say() -> None:
    prompt, ones = torch.tensor([0, 1, 1, 1]), torch.ones(4, 2)
    found = norm_ratio(ones * torch.tensor([[1.0], [2.0], [2.0], [5.0]]), ones, prompt)
    torch.testing.assert_close(found, torch.full((2,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_norms_of_half_precision_are_summed_in_float32(dtype: torch.dtype) -> None:
    # 70,000 entries of 8: the sum of squares, 4.5 million, is beyond float16, and bfloat16 has 8 bits.
    e = torch.full((2, 7, 100, 100), 8.0, dtype=dtype).transpose(1, 3)
    torch.testing.assert_close(output_norm(e), torch.full((2,), 8 * math.sqrt(70_000)))


def drawn(norm_q: Tensor | None, norm_p: Tensor | None) -> Drawn:
    zero = torch.zeros(2, 3)
    return Drawn(torch.tensor([0, 0]), torch.tensor([0.0, 1.0]), zero, zero, norm_q=norm_q, norm_p=norm_p)


def test_the_metric_names_the_loudest_step() -> None:
    norm_p = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    found = NormRatio().of(drawn(None, None), drawn(norm_p * torch.tensor([1.0, 1.5, 1.0]), norm_p), 1.0, EvalConfig())
    assert found is not None
    assert (found["mean"], found["highest"], found["highest_step"]) == (1.25, 1.5, 1)
    assert found["per_step"][:2] == [1.0, 1.5]
    assert math.isnan(found["per_step"][2])
    assert NormRatio().of(drawn(None, None), drawn(None, norm_p), 1.0, EvalConfig()) is None
