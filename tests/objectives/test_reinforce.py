"""`reinforce_kl` and `reinforce_naive`: numbers by hand, identities with RTB, importance weights, the fixed point of the naive one.

Tolerances: float64, `close` is 1e-9 (see test_objectives). Averages over draws are held to 5 standard errors of each entry: six
entries, both sides, are exceeded by chance once in 3e5 times; seeds are fixed, so a pass stays one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn.functional import log_softmax

from diffusion_rtb.config.components import describe
from diffusion_rtb.interfaces import Terms
from diffusion_rtb.objectives._groups import group_baseline
from diffusion_rtb.objectives.reinforce_kl import ReinforceKL
from diffusion_rtb.objectives.reinforce_naive import ReinforceNaive
from diffusion_rtb.objectives.rtb import RTB
from tests.oracles.affine_policy import AffinePolicy, Estimate, example, expected_gradient
from tests.oracles.terms import betas, cases, close, cotangent, make_terms, random_terms, seeds

CHANCE = 5.0
BETA = 1.7


def by_hand() -> Terms:
    """Three trajectories of two steps: log_q - log_p = 0.5, 4 and 0; log_q - log_behaviour = log 2, 0 and -log 2."""
    log_q = torch.tensor([[-1.0, -2.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    log_p = torch.tensor([[-1.5, -2.0], [-1.0, -2.0], [1.0, 1.0]], dtype=torch.float64)
    terms = make_terms(log_q, log_p, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    shift = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64).log()[:, None] / 2
    return replace(terms, log_behaviour=log_q - shift)


def test_mean_baseline_by_hand() -> None:
    """beta 2: A = 1 - 0.25, 0.5 - 2, 0; their mean is -0.25, the cotangent -(A + 0.25) / 3 in every step."""
    terms = by_hand()
    objective = ReinforceKL("mean")
    answer = objective(terms, 2.0)
    above = torch.tensor([1.0, -1.25, 0.25], dtype=torch.float64)
    close(cotangent(objective, terms, 2.0), (-above / 3)[:, None].expand(3, 2))
    close(answer.loss, -(above * torch.tensor([-3.0, 1.0, 2.0])).mean())
    close(answer.residual, -2 * above)  # log Z - log w, in nats
    close(answer.log_z, torch.full((3,), -0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("importance", "weights"),
    [
        ("none", [1.0, 1.0, 1.0]),
        ("exact", [2.0, 1.0, 0.5]),
        ("self_normalised", [6 / 3.5, 3 / 3.5, 1.5 / 3.5]),
        # square roots, as there are 2 steps: sqrt 2, 1, sqrt 1/2
        ("tempered", [3 * 2**0.5 / (1 + 1.5 * 2**0.5), 3 / (1 + 1.5 * 2**0.5), 1.5 * 2**0.5 / (1 + 1.5 * 2**0.5)]),
    ],
)
def test_weights_by_hand(importance: Any, weights: list[float]) -> None:
    terms = by_hand()
    objective = ReinforceKL("leave_one_out", importance)
    expected = torch.tensor(weights, dtype=torch.float64)
    close(objective.weights(terms), expected)
    value = torch.tensor([0.75, -1.5, 0.0], dtype=torch.float64)
    w = torch.tensor([2.0, 1.0, 0.5]) if importance in ("exact", "self_normalised") else torch.ones(3)
    others = torch.stack(
        [(value * w * (torch.arange(3) != i)).sum() / (w * (torch.arange(3) != i)).sum() for i in range(3)]
    )
    close(objective.baseline_of(value, terms), others)
    close(cotangent(objective, terms, 2.0), (-expected * (value - others) / 3)[:, None].expand(3, 2))


@pytest.mark.parametrize("importance", ["self_normalised", "tempered"])
def test_weights_are_normalised_within_each_prompt(importance: Any) -> None:
    terms = replace(random_terms(3, batch=8, prompts=2), log_behaviour=random_terms(4, batch=8).log_p)
    both = ReinforceKL(importance=importance).weights(terms)
    for row in (0, 1):
        inside = terms.prompt == row
        assert terms.log_behaviour is not None
        alone = make_terms(terms.log_q[inside], terms.log_p[inside], terms.reward[inside])
        alone = replace(alone, log_behaviour=terms.log_behaviour[inside])
        close(ReinforceKL(importance=importance).weights(alone), both[inside])
        close(both[inside].mean(), torch.ones((), dtype=torch.float64))


def test_a_dominant_weight_keeps_the_others_mean_exact() -> None:
    """exp(80) against exp(0): the baseline of the heavy trajectory is made of the others, not of a difference of sums."""
    terms = make_terms(torch.tensor([[80.0], [0.0], [0.0]]), torch.zeros(3, 1), torch.zeros(3))
    terms = replace(terms, log_behaviour=torch.zeros(3, 1))
    baseline = ReinforceKL(importance="exact").baseline_of(torch.tensor([1e3, 1.0, 2.0]), terms)
    torch.testing.assert_close(baseline, torch.tensor([1.5, 1e3, 1e3]))


@cases
@given(seeds, betas)
def test_it_is_vargrad(seed: int, beta: float) -> None:
    """Group mean: beta times its gradient is VarGrad's; leave-one-out: n/(n - 1) times that. Residuals and log Z agree."""
    terms = random_terms(seed, batch=8, prompts=2)
    vargrad = cotangent(RTB(), terms, beta)
    close(beta * cotangent(ReinforceKL("mean"), terms, beta), vargrad)
    close(beta * cotangent(ReinforceKL(), terms, beta), 4 / 3 * vargrad)
    of_rtb, of_reinforce = RTB()(terms, beta), ReinforceKL("mean")(terms, beta)
    close(of_reinforce.residual, of_rtb.residual)
    close(of_reinforce.log_z, of_rtb.log_z)


@cases
@given(seeds)
def test_leave_one_out_is_the_mean_of_the_others(seed: int) -> None:
    terms = random_terms(seed, batch=9, prompts=3)
    found = group_baseline(terms.reward, terms.prompt, "leave_one_out")
    for i in range(9):
        others = (terms.prompt == terms.prompt[i]) & (torch.arange(9) != i)
        close(found[i], terms.reward[others].mean())


@cases
@given(seeds, betas)
def test_on_policy_all_weights_are_one(seed: int, beta: float) -> None:
    terms = random_terms(seed)
    terms = replace(terms, log_behaviour=terms.log_q.detach())
    for importance in ("exact", "self_normalised", "tempered"):
        weighted = ReinforceKL("mean", importance)
        close(cotangent(weighted, terms, beta), cotangent(ReinforceKL("mean"), terms, beta))


def truth(policy: AffinePolicy) -> Tensor:
    """Gradient of alpha·KL(q || p) - E_q[r]."""
    return policy.gradient(lambda theta: policy.kl(theta) / BETA - policy.expected_reward(theta))


@pytest.mark.parametrize(("baseline", "factor"), [("mean", 7 / 8), ("leave_one_out", 1.0)])
def test_on_policy_the_gradient_is_that_of_the_kl_to_the_posterior(baseline: Any, factor: float) -> None:
    policy = example()
    found = expected_gradient(policy, ReinforceKL(baseline), beta=BETA)
    assert found.distance(factor * truth(policy)) < CHANCE
    if baseline == "mean":
        assert found.distance(truth(policy)) > CHANCE  # the factor is seen


def off_policy(baseline: str, importance: str, group: int) -> tuple[Estimate, float]:
    """Trajectories of a chain that is elsewhere and wider; the estimate, and how far it is off relative to the gradient."""
    policy = example()
    elsewhere = policy.theta + torch.tensor([0.05, -0.1], dtype=torch.float64)
    objective = ReinforceKL(baseline, importance)  # type: ignore[arg-type]
    found = expected_gradient(
        policy, objective, beta=BETA, group=group, groups=1600 // group, behaviour=(elsewhere, 1.15)
    )
    exact = truth(policy)
    return found, float((found.mean - exact).norm() / exact.norm())


@pytest.mark.parametrize("group", [4, 16])
def test_exact_weights_with_the_others_as_baseline_are_unbiased(group: int) -> None:
    found, _ = off_policy("leave_one_out", "exact", group)
    assert found.distance(truth(example())) < CHANCE


def test_self_normalised_weights_are_biased_in_small_groups_alone() -> None:
    few, far = off_policy("leave_one_out", "self_normalised", 8)
    many, near = off_policy("leave_one_out", "self_normalised", 64)
    assert few.distance(truth(example())) > CHANCE
    assert many.distance(truth(example())) < CHANCE
    assert near < 0.5 * far


@pytest.mark.parametrize("importance", ["tempered", "none"])
def test_tempered_and_missing_weights_are_biased_in_any_group(importance: str) -> None:
    for group in (8, 64):
        found, off = off_policy("leave_one_out", importance, group)
        assert found.distance(truth(example())) > 3 * CHANCE
        assert off > 0.3


def test_naive_by_hand() -> None:
    """beta 2: R = e², e, 1; -(R - mean R) / 3 + kl_weight·2·(0.5, 4, 0) / 3 in every step."""
    terms, e = by_hand(), float(torch.tensor(1.0, dtype=torch.float64).exp())
    objective = ReinforceNaive(0.7)
    mean = (e**2 + e + 1) / 3
    expected = [-(e**2 - mean) + 0.7 * 2 * 0.5, -(e - mean) + 0.7 * 2 * 4, -(1 - mean)]
    close(cotangent(objective, terms, 2.0), (torch.tensor(expected, dtype=torch.float64) / 3)[:, None].expand(3, 2))
    close(objective(terms, 2.0).residual, RTB()(terms, 2.0).residual)  # those of the posterior it does not go to


MODE_WEIGHTS = torch.tensor([4, 10, 4, 5, 10, 5, 4, 15, 4] + [0] * 16, dtype=torch.float64) / 61


def naive_target(kl_weight: float) -> Tensor:
    """q ∝ p·exp(R / (2·kl_weight)) over the 25 modes, R = 25·weight."""
    return torch.softmax(25 * MODE_WEIGHTS / (2 * kl_weight), 0)


# Published code's table, as computed from the fixed point: kl_weight, mass on the 16 modes without weight, total variation.
TABLE = [
    (1.0, 0.236, 0.31),
    (0.8, 0.150, 0.34),
    (0.7, 0.103, 0.38),
    (0.5, 0.025, 0.51),
    (0.3, 0.0005, 0.69),
    (0.1, 0.0, 0.754),
]


@pytest.mark.parametrize(("kl_weight", "off", "distance"), TABLE)
def test_the_predicted_targets_of_the_25_modes(kl_weight: float, off: float, distance: float) -> None:
    target = naive_target(kl_weight)
    assert float(target[9:].sum()) == pytest.approx(off, abs=0.0006)  # as many digits as the table has
    assert float(0.5 * (target - MODE_WEIGHTS).abs().sum()) == pytest.approx(distance, abs=0.0051)


@pytest.mark.parametrize("kl_weight", [1.0, 0.5])
def test_naive_reinforce_goes_to_its_target_on_the_25_modes(kl_weight: float) -> None:
    """A categorical q over the modes, trained on its own draws; 4,000 draws leave about 0.01 in total variation."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.zeros(25, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    reward = torch.log(25 * MODE_WEIGHTS + 1e-30)
    for _ in range(300):
        log_q = log_softmax(logits, 0)
        mode = torch.multinomial(log_q.detach().exp(), 4000, replacement=True, generator=generator)
        drawn = log_q[mode][:, None]
        terms = make_terms(drawn, torch.full_like(drawn, 1 / 25).log().detach(), reward[mode])
        optimizer.zero_grad()
        drawn.backward(cotangent(ReinforceNaive(kl_weight), terms, 1.0))
        optimizer.step()
        schedule.step()
    found = torch.softmax(logits.detach(), 0)
    assert float(0.5 * (found - naive_target(kl_weight)).abs().sum()) < 0.03
    assert float(0.5 * (found - MODE_WEIGHTS).abs().sum()) == pytest.approx(
        float(0.5 * (naive_target(kl_weight) - MODE_WEIGHTS).abs().sum()), abs=0.03
    )


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"component": "reinforce_kl", "baseline": "median"}, "baseline"),
        ({"component": "reinforce_kl", "importance": "clipped"}, "importance"),
        ({"component": "reinforce_kl", "importnace": "exact"}, "Did you mean 'importance'"),
        ({"component": "reinforce_naive", "kl_weight": 0.0}, "kl_weight must be a positive finite number, got 0.0"),
        ({"component": "reinforce_naive", "kl_weight": float("inf")}, "got inf"),
        ({"component": "reinforce"}, "no objective named 'reinforce'. Did you mean 'reinforce_"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(component: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(component, "objective")


def test_what_a_batch_may_not_be() -> None:
    with pytest.raises(ValueError, match="prompt 1 has a group of size 1"):
        ReinforceKL()(random_terms(0, batch=3, prompts=2), 1.0)
    with pytest.raises(ValueError, match="needs the log-density of the chain that drew"):
        ReinforceKL(importance="exact")(random_terms(0), 1.0)
    far = replace(random_terms(0), log_behaviour=torch.full((6, 4), -300.0, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"exact importance weights overflow: .*self_normalised"):
        ReinforceKL(importance="exact")(far, 1.0)
    assert torch.isfinite(ReinforceKL(importance="self_normalised")(far, 1.0).loss)
    nan = replace(random_terms(0), log_behaviour=torch.full((6, 4), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="log_behaviour of trajectory 0, step 0, is nan"):
        ReinforceKL(importance="exact")(nan, 1.0)
    with pytest.raises(ValueError, match=r"exp\(beta·r\) overflows at beta·r = "):
        ReinforceNaive()(random_terms(0), 1e4)


def test_what_the_trainer_is_told() -> None:
    assert ReinforceKL().on_policy_only
    assert not ReinforceKL().importance_weighted
    for importance in ("exact", "self_normalised", "tempered"):
        weighted = ReinforceKL(importance=importance)
        assert weighted.importance_weighted
        assert not weighted.on_policy_only
    assert ReinforceNaive().on_policy_only
