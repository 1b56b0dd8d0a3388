"""`ddpo`, `dpok` and `grpo`: numbers by hand, expected gradients on a solved chain, several updates, what is refused.

Tolerances: `close` is 1e-9 in float64 (see test_objectives). Averages over draws are held to 5 standard errors of each of six
parameters, which chance exceeds once in 3e5 times; what is biased has to be beyond that.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.interfaces import Objective, Terms
from diffusion_rtb.objectives._groups import STD_FLOOR
from diffusion_rtb.objectives._policy import clipped_loss
from diffusion_rtb.objectives.ddpo import DDPO
from diffusion_rtb.objectives.dpok import DPOK
from diffusion_rtb.objectives.grpo import GRPO
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.reinforce_naive import ReinforceNaive
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.training.assemble import assemble
from tests.oracles.affine_policy import AffinePolicy, example, expected_gradient
from tests.oracles.terms import close, cotangent, make_terms, random_terms

CHANCE = 5.0
BETA = 1.7


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_kl(terms: Terms) -> Terms:
    kl = torch.rand(terms.log_q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return replace(terms, kl=kl.requires_grad_(), log_behaviour=terms.log_q.detach())


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (2.0, 1.0, -2.0, -2.0),  # at the first update: -A, and the gradient of -A·log_q
        (2.0, 1.1, -2.2, -2.2),  # inside: -A·rho, whose derivative by log_q is itself
        (2.0, 1.5, -2.4, 0.0),  # above, and A wants more: held at 1.2
        (2.0, 0.5, -1.0, -1.0),  # below, but A wants it back
        (-2.0, 0.5, 1.6, 0.0),  # below, and A wants less: held at 0.8
        (-2.0, 1.5, 3.0, 3.0),  # above, but A wants it back
    ],
)
def test_clipping_by_hand(advantage: float, ratio: float, loss: float, slope: float) -> None:
    log_q = tensor(ratio).log()[:, None].requires_grad_()
    found = clipped_loss(log_q, torch.zeros(1, 1, dtype=torch.float64), tensor(advantage)[:, None], 0.2)
    close(found, tensor(loss))
    (gradient,) = torch.autograd.grad(found.sum(), log_q)
    close(gradient, tensor(slope)[:, None])


def four(prompt: list[int] | None = None) -> Terms:
    """Rewards 0, 2, 5, 9 of two prompts, three steps, on-policy."""
    zero = torch.zeros(4, 3, dtype=torch.float64)
    return make_terms(zero, zero, tensor(0, 2, 5, 9), prompt or [0, 0, 1, 1])


def test_ddpo_by_hand() -> None:
    """Per prompt: mean 1, deviation 1, and mean 7, deviation 2; over the batch: mean 4, variance (16 + 4 + 1 + 25) / 4."""
    per_prompt = tensor(-1 / (1 + STD_FLOOR), 1 / (1 + STD_FLOOR), -2 / (2 + STD_FLOOR), 2 / (2 + STD_FLOOR))
    close(cotangent(DDPO(), four(), 1.0), (-per_prompt / 4)[:, None].expand(4, 3))
    whole = tensor(-4, -2, 1, 5) / (11.5**0.5 + STD_FLOOR)
    close(DDPO(normalise="batch").advantage(four(), 1.0), whole)
    close(DDPO(normalise="batch", advantage_clip=0.5).advantage(four(), 1.0), whole.clamp(-0.5, 0.5))
    assert float(DDPO()(four(), 2.0).residual[0]) == pytest.approx(2.0)  # log Z - beta·r = 2·1 - 0


@pytest.mark.parametrize("objective", [DDPO(), GRPO("none")])
def test_equal_rewards_move_nothing(objective: Objective) -> None:
    terms = four()
    terms = replace(terms, reward=torch.full((4,), 0.1, dtype=torch.float64) + 1e-12 * torch.randn(4))
    assert float(cotangent(objective, terms, 1.0).abs().max()) < 1e-7


def test_grpo_by_hand() -> None:
    """The others' mean: ±2 and ±4 for the two prompts, deviations 1 and 2; k1 of 1 per step for the second trajectory."""
    plain = cotangent(GRPO("none", normalise="none"), four(), 1.0)
    close(plain, (-tensor(-2, 2, -4, 4) / 4)[:, None].expand(4, 3))
    terms = four()
    terms = replace(terms, log_p=terms.log_p - tensor(0, 1, 0, 0)[:, None])
    paid = tensor(-3, 3, 0, 0)  # 3 nats, against the other's 0
    s = tensor(1, 1, 2, 2) + STD_FLOOR / BETA
    held = (tensor(-2, 2, -4, 4) - paid / BETA) / s
    close(cotangent(GRPO("k1_reward"), terms, BETA), (-held / 4)[:, None].expand(4, 3))
    fixed = tensor(-2, 2, -4, 4) / s - 0.3 * paid
    close(cotangent(GRPO("k1_reward", kl_weight=0.3), terms, BETA), (-fixed / 4)[:, None].expand(4, 3))
    # k2 in the loss: c·l in the steps of the second trajectory, l = 1
    in_loss = -tensor(-2, 2, -4, 4)[:, None] / s[:, None] + 0.3 * tensor(0, 1, 0, 0)[:, None]
    close(cotangent(GRPO("k2_loss", kl_weight=0.3), terms, BETA), in_loss.expand(4, 3) / 4)


def test_grpo_without_normalising_is_kl_reinforce() -> None:
    """k1 in the reward, on-policy, the others' mean: the same numbers."""
    terms = replace(random_terms(5), log_behaviour=random_terms(5).log_q.detach())
    close(cotangent(GRPO(normalise="none"), terms, BETA), cotangent(ReinforceKL(), terms, BETA))


def test_normalising_rescales_prompts_and_keeps_their_direction() -> None:
    terms = replace(random_terms(6, batch=8), log_behaviour=random_terms(6, batch=8).log_q.detach())
    scaled, plain = cotangent(GRPO(), terms, BETA), cotangent(GRPO(normalise="none"), terms, BETA)
    for row in (0, 1):
        inside = terms.prompt == row
        s = float(terms.reward[inside].std(correction=0)) + STD_FLOOR / BETA
        close(scaled[inside], plain[inside] / s)


def test_dpok_returns_by_hand() -> None:
    kl = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64).expand(4, 3)
    terms = replace(four(), kl=kl.clone().requires_grad_())
    close(DPOK().returns(terms, 2.0), tensor(0, 2, 5, 9)[:, None].expand(4, 3))
    # beta 2: half of what is still to be paid after each step
    close(DPOK("gaussian").returns(terms, 2.0), tensor(0, 2, 5, 9)[:, None] - tensor(3, 2, 0))


def test_dpok_gradients_go_where_they_belong() -> None:
    """alpha into the KL, -(r - V) into log_q, (V - r) / steps into V, and none of V's fit into the policy."""
    terms = with_kl(four())
    objective = DPOK()
    objective.prepare(2, (2,), 3)
    objective.double()
    answer = objective(terms, 2.0)  # sets V to the mean reward, 4
    answer.loss.backward()
    assert terms.kl is not None
    assert terms.kl.grad is not None
    assert terms.log_q.grad is not None
    close(terms.kl.grad, torch.full((4, 3), 1 / 2 / 4, dtype=torch.float64))
    close(terms.log_q.grad, (-(tensor(0, 2, 5, 9) - 4) / 4)[:, None].expand(4, 3))
    assert objective.value is not None
    bias = dict(objective.value.named_parameters())["output.bias"].grad
    assert bias is not None
    close(bias, tensor(0))  # at the mean of the returns
    close(answer.residual, RTB()(terms, 2.0).residual)


def truth(policy: AffinePolicy, *, local: bool = False) -> Tensor:
    kl = policy.local_kl if local else policy.kl
    return policy.gradient(lambda theta: kl(theta) / BETA - policy.expected_reward(theta))


class Wavy(nn.Module):
    """A value function that is wrong everywhere, and differently at every step."""

    def forward(self, x: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return torch.sin(3 * x[:, 0] + t) + 0.5 * t


def dpok(kl: Any) -> DPOK:
    objective = DPOK(kl)
    objective.value = Wavy()
    return objective


@pytest.mark.parametrize(
    ("objective", "local"),
    [
        (dpok("gaussian"), False),
        (dpok("gaussian_loss"), True),
        (GRPO("k1_reward", normalise="none"), False),
        (GRPO("gaussian", normalise="none"), False),
        (GRPO("path_k2_loss", normalise="none"), False),
        (GRPO("k3_loss", normalise="none"), True),
        (GRPO("gaussian_loss", normalise="none"), True),
    ],
    ids=["dpok-gaussian", "dpok", "grpo-k1", "grpo-gaussian", "grpo-path_k2", "grpo-k3", "grpo-gaussian_loss"],
)
def test_expected_gradient_is_the_exact_one_or_lacks_the_future(objective: Objective, local: bool) -> None:
    """Whatever V is. What lacks the future is seen to lack it."""
    policy = example()
    found = expected_gradient(policy, objective, beta=BETA, batches=60)
    assert found.distance(truth(policy, local=local)) < CHANCE
    assert found.distance(truth(policy, local=not local)) > CHANCE


def test_normalising_by_the_deviation_shifts_small_groups() -> None:
    """The direction of GRPO's expected gradient, s = std: off in groups of 4, nearly right in groups of 64."""
    policy = example()
    exact = truth(policy)

    def off(group: int) -> float:
        mean = expected_gradient(policy, GRPO("gaussian"), beta=BETA, group=group, groups=1600 // group).mean
        return float((mean * exact.norm() / mean.norm() - exact).norm() / exact.norm())

    few, many = off(4), off(64)
    assert few > 0.2
    assert many < 0.3 * few


def test_ddpo_has_the_gradient_of_the_reward_alone() -> None:
    """Direction only, as rewards are divided by their deviation: in large groups that of -E_q[r], with no KL."""
    policy = example(curve=0.0)
    mean = expected_gradient(policy, DDPO(), beta=BETA, group=200, groups=8).mean
    wanted = policy.gradient(lambda theta: -policy.expected_reward(theta))
    assert float((mean * wanted).sum() / (mean.norm() * wanted.norm())) > 0.995
    with_the_kl = truth(policy)
    assert float((mean * with_the_kl).sum() / (mean.norm() * with_the_kl.norm())) < 0.98


def config(out: Path, **changes: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "pixel",
        "out": str(out),
        "prior": {"component": "tests.oracles.pixel:PixelPrior", "steps": 3},
        "reward": {"component": "tests.oracles.pixel:green"},
        "beta": 1.0,
        "prompts": {"list": [""]},
        "train": {
            "iterations": 2,
            "prompts_per_iteration": 1,
            "group": 8,
            "micro_batch": 8,
            "grid_every": 0,
            "lr": 0.3,
            "grad_clip": 100.0,
            "updates_per_iteration": 3,
        },
    }
    return RunConfig.model_validate(data | changes)


class Watched(DDPO):
    """Remembers the largest |log rho| of every update."""

    def __init__(self, clip_range: float = 0.2) -> None:
        super().__init__(clip_range)
        self.seen: list[float] = []
        self.still: list[bool] = []

    def forward(self, terms: Terms, beta: float) -> Any:
        assert terms.log_behaviour is not None
        log_ratio = (terms.log_q - terms.log_behaviour).detach()
        self.seen.append(float(log_ratio.abs().max()))
        answer = super().forward(terms, beta)
        (gradient,) = torch.autograd.grad(answer.loss, terms.log_q, retain_graph=True)
        wanted = self.advantage(terms, beta)[:, None].sign() * log_ratio
        outside = (log_ratio.exp() - 1).abs() > self.clip_range
        self.still.append(bool((gradient[outside & (wanted > 0)] == 0).all()) and bool((outside & (wanted > 0)).any()))
        return answer


def test_several_updates_are_clipped_against_the_drawing_chain(tmp_path: Path) -> None:
    """Each iteration's first update has ratio 1 and the next ones have not; a step that has gone too far gets no gradient."""
    trainer = assemble(config(tmp_path, objective={"component": "tests.objectives.test_policy_gradients:Watched"}))
    watched = trainer.objective
    for trainer.iteration in range(2):
        trainer.step()
    assert isinstance(watched, Watched)
    assert len(watched.seen) == 6
    assert watched.seen[0] == watched.seen[3] == 0
    assert min(watched.seen[1], watched.seen[2], watched.seen[4], watched.seen[5]) > 0.1
    assert watched.still[2]


@pytest.mark.parametrize("name", ["ddpo", "dpok", "grpo", "reinforce_kl", "reinforce_naive"])
@pytest.mark.parametrize(
    "behaviour",
    [
        [{"component": "prior_buffer", "share": 0.5, "capacity": 8}],
        [{"component": "on_policy", "exploration": 0.1, "until": 5}],
    ],
)
def test_an_on_policy_objective_refuses_other_trajectories(
    name: str, behaviour: list[dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"is on-policy: .*Take them out, .* or use an importance-weighted"):
        assemble(config(tmp_path, objective={"component": name}, behaviours=behaviour))


def test_importance_weights_refuse_selected_trajectories(tmp_path: Path) -> None:
    objective = {"component": "reinforce_kl", "importance": "exact"}
    with pytest.raises(ValueError, match=r"which nobody knows once they are selected by their reward"):
        assemble(
            config(
                tmp_path, objective=objective, behaviours=[{"component": "prior_buffer", "share": 0.5, "capacity": 8}]
            )
        )


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"component": "ddpo", "clip_range": 0.0}, "clip_range must be between 0 and 1, got 0.0"),
        ({"component": "ddpo", "clip_range": 2.0}, "meant for their mean is multiplied by their number"),
        ({"component": "ddpo", "advantage_clip": -1.0}, "advantage_clip must be a positive finite number, got -1.0"),
        ({"component": "ddpo", "normalise": "group"}, "argument 'normalise': got 'group'"),
        ({"component": "dpok", "kl": "k1_reward"}, "argument 'kl': got 'k1_reward'"),
        ({"component": "dpok", "width": 0}, "width must be at least 1 channel, got 0"),
        ({"component": "grpo", "kl": "k4"}, "argument 'kl': got 'k4'"),
        ({"component": "grpo", "kl_weight": 0.0}, "kl_weight must be a positive finite number, got 0.0"),
        ({"component": "grpo", "kl": "none", "kl_weight": 0.1}, "has no KL to weigh"),
        ({"component": "grpoo"}, "no objective named 'grpoo'. Did you mean 'grpo'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(component: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(component, "objective")


OBJECTIVES = [
    ReinforceKL(),
    ReinforceKL(importance="tempered"),
    ReinforceNaive(),
    DDPO(),
    DPOK(),
    GRPO(),
    GRPO("gaussian"),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_all_are_objectives(objective: Objective) -> None:
    """What the trainer relies on: prepare, call, backward into log_q, finite reports of the right shape, state_dict."""
    objective.prepare(2, (2,), 3)
    terms = with_kl(random_terms(0))
    answer = objective(terms, 2.0)
    answer.loss.backward()
    assert terms.log_q.grad is not None
    assert bool(terms.log_q.grad.isfinite().all())
    assert answer.residual.shape == answer.log_z.shape == (6,)
    assert not answer.residual.requires_grad
    assert all(isinstance(value, Tensor) for value in objective.state_dict().values())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("name", ["log_q", "log_p", "reward", "log_behaviour"])
def test_values_must_be_finite(objective: Objective, name: str) -> None:
    objective.prepare(2, (2,), 3)
    terms = with_kl(random_terms(0))
    broken = getattr(terms, name).detach().clone()
    broken[4] = torch.nan
    with pytest.raises(ValueError, match=f"{name} of trajectory 4"):
        objective(replace(terms, **{name: broken}), 1.0)


def test_groups_of_one() -> None:
    """Refused where trajectories of a prompt are compared, and fine where they are not."""
    terms = with_kl(random_terms(0, batch=3, prompts=3))
    for objective in (ReinforceKL(), ReinforceNaive(), DDPO(), GRPO()):
        with pytest.raises(ValueError, match="prompt 0 has a group of size 1"):
            objective(terms, 1.0)
    for alone in (DDPO(normalise="batch"), DPOK()):
        alone.prepare(3, (2,), 3)
        assert torch.equal(alone(terms, 1.0).residual, torch.zeros(3, dtype=torch.float64))


def test_dpok_must_be_prepared_and_given_the_kl() -> None:
    with pytest.raises(RuntimeError, match="call prepare"):
        DPOK()(with_kl(random_terms(0)), 1.0)
    with pytest.raises(ValueError, match="needs the closed-form KL"):
        dpok("gaussian")(random_terms(0), 1.0)
