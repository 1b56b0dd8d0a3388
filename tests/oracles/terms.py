"""What the tests of objectives share: random terms, what a trainer takes from an objective, and an objective of a user."""

from __future__ import annotations

from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.interfaces import Loss, Objective, Terms
from diffusion_rtb.objectives._log_z import LearnedLogZ
from diffusion_rtb.objectives.rtb import RTB

close = partial(assert_close, rtol=1e-9, atol=1e-9)
cases = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**31 - 1)
betas = st.floats(0.05, 50.0)


def make_terms(
    log_q: Tensor, log_p: Tensor, reward: Tensor, prompt: list[int] | None = None, x: Tensor | None = None
) -> Terms:
    """Terms of vectors (2,) unless `x` is given, all of prompt 0 unless `prompt` is."""
    batch, steps = log_q.shape
    return Terms(
        log_q=log_q.detach().clone().requires_grad_(),
        log_p=log_p,
        reward=reward,
        prompt=torch.tensor(prompt or [0] * batch, dtype=torch.long),
        x=torch.zeros(batch, steps + 1, 2, dtype=log_q.dtype) if x is None else x,
        timesteps=torch.arange(steps, 0, -1, dtype=log_q.dtype),
        features=torch.ones(batch, 3, dtype=log_q.dtype),
    )


def random_terms(seed: int, batch: int = 6, steps: int = 4, prompts: int = 2) -> Terms:
    """Log-densities and rewards of a few nats, the prompts in turn."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prompt = [i % prompts for i in range(batch)]
    x = draw(batch, steps + 1, 2)
    return make_terms(3 * draw(batch, steps), 3 * draw(batch, steps), draw(batch), prompt, x)


def cotangent(objective: Objective, terms: Terms, beta: float) -> Tensor:
    (gradient,) = torch.autograd.grad(objective(terms, beta).loss, terms.log_q)
    return gradient


def at(objective: RTB, value: list[float]) -> RTB:
    """The objective with its learned log Z set, in the units it is kept in."""
    objective = objective.double()
    assert isinstance(objective.log_z, LearnedLogZ)
    objective.log_z.value.data.copy_(torch.tensor(value, dtype=torch.float64))
    objective.log_z.initialised.fill_(True)
    return objective


class KlReinforce(nn.Module):
    """Another objective written as a user would: REINFORCE on r - alpha (log_q - log_p), group mean as baseline."""

    def prepare(self, prompts: int, dims: tuple[int, ...], features: int) -> None:
        """Owns nothing."""

    def forward(self, terms: Terms, beta: float) -> Loss:
        log_w = log_weight(terms.log_q, terms.log_p, terms.reward, beta).detach()
        advantage = (log_w - log_w.mean()) / beta
        loss = -torch.mean(advantage * terms.log_q.sum(dim=1))
        return Loss(loss, -advantage * beta, log_w.mean().expand(len(log_w)), to_nats=beta)
