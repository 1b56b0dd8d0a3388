"""V of a chain of few steps, against chains whose F is known: by quadrature, and in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_rtb.interfaces import Walks
from diffusion_rtb.objectives._bounded_value import BoundedValue
from diffusion_rtb.objectives._chain_value import LINEAR, agree, linex
from diffusion_rtb.objectives.value_gradient import ValueGradient
from diffusion_rtb.training.chain_checks import check_noise
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import QUADRATIC, known, run

STDS = [0.8, 0.5, 0.4]


def pulled(x: Tensor) -> Tensor:
    """Towards one of two sides: no normal stays one."""
    return 0.6 * x + 0.7 * torch.tanh(3 * x)


def log_f_by_quadrature(log_end: Tensor, grid: Tensor, stds: list[float]) -> list[Tensor]:
    """log F on a grid, the noisiest state first."""
    found = [log_end]
    for std in reversed(stds):
        if std == 0:
            place = torch.searchsorted(grid, pulled(grid)).clamp(max=len(grid) - 1)
            found.append(found[-1][place])
            continue
        weight = torch.softmax(-((grid[None] - pulled(grid)[:, None]) ** 2) / (2 * std**2), dim=1)
        found.append(torch.log(weight @ found[-1].exp()))
    return found[::-1]


def walked(n: int, stds: list[float], end: Any) -> tuple[Walks, Tensor]:
    """Trajectories of that chain, and log F(x_0) of each."""
    generator = torch.Generator().manual_seed(0)
    x, means = [torch.randn(n, 1, generator=generator)], []
    for std in stds:
        means.append(pulled(x[-1]))
        x.append(means[-1] + std * torch.randn(n, 1, generator=generator))
    times = torch.tensor([900.0, 600.0, 300.0, 0.0])
    log_end = end(x[-1][:, 0])
    walks = Walks(torch.stack(x, 1), times, torch.stack(means, 1), torch.tensor(stds), log_end, torch.zeros(n, 0))
    return walks, log_end


@pytest.mark.parametrize("last", [0.0, 0.3])
def test_f_is_the_expectation_of_its_own_next_values(last: float) -> None:
    """With a last step with and without noise; far from the walks nobody knows."""

    def end(x: Tensor) -> Tensor:
        return -2.5 * (x - 1.2) ** 2 - 0.1

    stds = [*STDS[:2], last]
    walks, log_end = walked(3000, stds, end)
    torch.manual_seed(0)
    value = BoundedValue((1,), 0, width=32)
    agree(value.logit, walks, log_end, lambda _: torch.zeros(()), 1600, 1e-2)
    grid = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    exact = log_f_by_quadrature(end(grid), grid, stds)
    for i, t in enumerate(walks.times.tolist()):
        x = walks.x[:500, i]
        with torch.no_grad():
            found = value.log_f(x, torch.full((500,), t), torch.zeros(500, 0))
        expected = exact[i][torch.searchsorted(grid, x[:, 0].double()).clamp(max=2000)]
        error = (found - expected)[expected > -4]  # below, a state is as good as lost, and few next states say how much
        assert len(error) > 100
        assert float(error.abs().mean()) < 0.16, (i, t)
        assert abs(float(error.mean())) < 0.1, (i, t)


@given(st.lists(st.floats(-LINEAR / 2, LINEAR / 2), min_size=1, max_size=8))
def test_the_loss_is_least_at_the_log_of_the_mean(logs: list[float]) -> None:
    """That of the square is at the mean of the logs."""
    y = torch.tensor(logs, dtype=torch.float64)
    best = (torch.logsumexp(y, 0) - math.log(len(logs))).requires_grad_()
    (slope,) = torch.autograd.grad(linex(y - best).sum(), best)
    assert abs(float(slope)) < 1e-9
    for other in (best.detach() - 0.1, best.detach() + 0.1):
        assert float(linex(y - other).sum()) > float(linex(y - best).sum())


def test_one_state_cannot_outvote_all_others() -> None:
    d = torch.tensor([-50.0, 0.0, LINEAR, LINEAR + 1, 50.0], dtype=torch.float64, requires_grad=True)
    loss = linex(d)
    (slope,) = torch.autograd.grad(loss.sum(), d)
    assert float(loss[1].detach()) == 0
    assert bool((loss >= 0).all())
    torch.testing.assert_close(slope[2:], torch.full((3,), math.exp(LINEAR) - 1, dtype=torch.float64))
    assert float(slope[0]) == pytest.approx(-1)


def led(out: Path, **arguments: Any) -> Trainer:
    """Four steps, of which the forward process says something else than the chain does."""
    trainer = run(
        out,
        reward=QUADRATIC,
        objective={"component": "value_gradient", "warm_up_updates": 400, "draws": 4, **arguments},
        behaviours=[{"component": "prior_buffer", "share": 0.875, "capacity": 512, "noised": True}],
        train={"group": 128, "micro_batch": 128, "iterations": 8, "updates_per_iteration": 4, "lr_decay": "linear"},
    )
    assert isinstance(trainer.objective, ValueGradient)
    trainer.objective.round_updates = 700
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trainer]:
    return {rounds: led(tmp_path_factory.mktemp(str(rounds)), rounds=rounds, walks=256) for rounds in (0, 1)}


def test_v_becomes_that_of_the_chain(both: dict[int, Trainer], shapes_unchecked: None) -> None:
    """Where the posterior goes, against the closed form; before x_0 there is nothing else to be learned than the reward."""
    error = {}
    for rounds, trainer in both.items():
        tilt, chain = known(trainer), trainer.sampler.draw([0] * 400, list(range(400))).trajectory
        assert isinstance(trainer.objective, ValueGradient)
        value = trainer.objective.value
        assert value is not None
        error[rounds] = torch.zeros(4)
        for i in range(1, 4):
            t = chain.timesteps[i].expand(400)
            with torch.no_grad():
                found = 1.3 * value(
                    chain.x[:, i].float(), t, trainer.sampler.features(torch.zeros(400, dtype=torch.long))
                )
            error[rounds][i] = (found - tilt.log_f[i](chain.x[:, i].double())).abs().mean()
    assert float(error[1].sum()) < 0.5 * float(error[0].sum()), error


def test_what_a_short_chain_misses_is_made_up_for(both: dict[int, Trainer], shapes_unchecked: None) -> None:
    """log Z - ELBO against the best chain of these deviations."""
    missing = {}
    for rounds, trainer in both.items():
        batch = trainer.sampler.completed(trainer.sampler.draw([0] * 1024, list(range(1024))))
        assert batch.log_q is not None
        assert batch.log_p is not None
        elbo = 1.3 * batch.reward - (batch.log_q - batch.log_p).sum(1)
        missing[rounds] = known(trainer).best_elbo - float(elbo.mean())
    assert missing[1] < 0.5 * missing[0], missing


def test_it_is_said_what_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    led(tmp_path, rounds=1, walks=8)
    assert (
        "then 400 updates of V, and 1 time 8 trajectories of each prompt led by V"
        in capsys.readouterr().err.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": -1}, "rounds=-1 refine a V: at least 0"),
        ({"rounds": 1, "warm_up_updates": 0, "from_samples": 1.0}, "only with warm_up_updates, which are 0"),
        ({"walks": 0}, "walks must be at least 1, got 0"),
    ],
)
def test_rounds_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValueGradient(**arguments)


class Ode:
    """A prior that says what its sampler lacks."""

    why_no_noise = "Its sampler is an ODE."


def test_a_sampler_without_noise_cannot_be_led(tmp_path: Path) -> None:
    trainer = run(tmp_path, reward=QUADRATIC)
    with pytest.raises(
        ValueError, match=r"rounds: V leads the prior in steps with noise. Its sampler is an ODE. Or set"
    ):
        check_noise(trainer.config, Ode(), ValueGradient(rounds=1), trainer.sources)
    check_noise(trainer.config, Ode(), ValueGradient(), trainer.sources)
