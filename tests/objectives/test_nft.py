"""DiffusionNFT: its pull against the published loss, its old posterior, and that it has no strength."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_rtb.chain.forward_process import knowing, signal_and_noise
from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.interfaces import Samples
from diffusion_rtb.objectives.nft import NFT
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from tests.oracles.behaving import run
from tests.oracles.states import states_of

UNSEEN = [{"component": "on_policy", "measured": 0}]


def published(
    v: torch.Tensor, old: torch.Tensor, x_t: torch.Tensor, x_0: torch.Tensor, t: float, rho: torch.Tensor
) -> torch.Tensor:
    """a_max/b·mean[rho·|x+ - x_0|²/s+ + (1 - rho)·|x- - x_0|²/s-] with b 0.6 and a_max 5, x± = x_t - t·v±."""
    b, total = 0.6, torch.zeros((), dtype=torch.float64)
    for sign, share in ((b, rho), (-b, 1 - rho)):
        error = x_t - t * (sign * v + (1 - sign) * old) - x_0
        s = error.detach().abs().mean(1, keepdim=True)
        total = total + (share[:, None] * error**2 / s).mean()
    return 5 / b * total


def test_the_pull_is_the_gradient_of_the_published_loss() -> None:
    flow = FlowMatchSDEScheduler()
    flow.set_timesteps(5)
    _, levels = signal_and_noise(flow, flow.timesteps)
    x_0, x_t, answer, old = torch.randn(4, 6, 3, dtype=torch.float64)
    rho = torch.rand(6, dtype=torch.float64)
    for i in (1, 3):
        t = float(levels[i])

        def mean(given: torch.Tensor, i: int = i) -> torch.Tensor:
            flow._step_index = i
            return previous_sample(StepCall(flow, flow.step, given, flow.timesteps[i], x_t).mean())

        v = answer.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(published(v, old, x_t, x_0, t, rho), v)
        moved, exact = mean(v), mean(knowing("velocity", x_0, x_t, 1 - t, t))
        at = states_of(moved.detach(), moved.detach(), mean_old=mean(old), mean_0=exact, weight=rho)
        (found,) = torch.autograd.grad(((moved - NFT(0.6, kl=0.0).aim(at, 1.0)) ** 2).sum(), v)
        factor = (found * wanted).sum() / (wanted * wanted).sum()
        assert float(factor) > 0
        torch.testing.assert_close(found, factor * wanted, atol=1e-4 * float(found.abs().max()), rtol=1e-3)


def test_the_second_term_pulls_to_the_prior() -> None:
    q, p, old, zero = torch.randn(4, 6, 3, dtype=torch.float64)
    at = states_of(q, p, mean_old=old, mean_0=zero, weight=torch.rand(6, dtype=torch.float64))
    torch.testing.assert_close(NFT(kl=0.3).aim(at, 1.0), NFT(kl=0.0).aim(at, 1.0) - 0.3 * (q - p))


def test_rho_is_of_the_prompt_and_knows_no_beta() -> None:
    samples = Samples(torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 3.0, -5.0, -5.0]))
    found = NFT(a_max=2.0).weights(samples, 1.0)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75, 0.5, 0.5], dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(NFT(a_max=2.0).weights(samples, 50.0), found, atol=1e-4, rtol=0)
    assert NFT(a_max=0.5).weights(samples, 1.0).tolist() == [0, 1, 0.5, 0.5]


def test_the_old_posterior_is_the_moving_average(tmp_path: Path, shapes_unchecked: None) -> None:
    """That draws; and the reward rises beyond that of any posterior, whatever beta is."""
    train = {"iterations": 8, "group": 32, "micro_batch": 32, "lr": 0.1}
    trainer = run(
        tmp_path, objective={"component": "nft", "decay": 0.2, "kl": 0.0}, train=train, beta=0.01, behaviours=UNSEEN
    )
    assert trainer.updates.old is not None
    expected = {name: torch.zeros_like(parameter) for name, parameter in trainer.prior.parameters().items()}
    after = trainer.updates.settle

    def settle(iteration: int) -> None:
        after(iteration)
        kept = min(0.2 * iteration, 0.5)
        for name, parameter in trainer.prior.parameters().items():
            expected[name] = kept * expected[name] + (1 - kept) * parameter.detach()

    object.__setattr__(trainer.updates, "settle", settle)
    trainer.fit()
    for name, tensor in trainer.updates.old.held.items():
        torch.testing.assert_close(tensor, expected[name])
    own = trainer.sampler.draw([0] * 500, list(range(500)))
    prior = trainer.sampler.draw([0] * 500, list(range(500)), of_prior=True)
    assert float(own.reward.mean()) > float(prior.reward.mean()) + float(prior.reward.std())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": 0.0}, "b must be a positive finite number"),
        ({"kl": -1.0}, "kl is a weight, 0 or more; got -1"),
        ({"decay_max": 1.0}, "decay_max is a share of the old posterior that stays"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NFT(**arguments)
