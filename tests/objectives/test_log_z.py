"""log Z: what a group of one prompt shares and with whom it does not, where learned values start and that they stay.

Tolerances: everything runs in float64 (unit roundoff 1e-16); sums of fewer than 1e3 terms of size S are good to 1e-12·S, so
`close` (1e-9) leaves three digits. Where another number is used its comment says why.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rtb.estimates import log_weight
from diffusion_rtb.objectives._log_z import LearnedLogZ, VarGrad
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.objectives.trust_pcl import TrustPCL
from tests.oracles.terms import at, betas, cases, close, cotangent, random_terms, seeds


@cases
@given(seeds, st.sampled_from(["per_prompt", "vargrad"]))
def test_prompts_do_not_leak(seed: int, kind: Any) -> None:
    """Another reward for prompt 1 leaves the residuals and cotangents of prompt 0 exactly as they were."""
    terms = random_terms(seed)
    changed = replace(terms, reward=torch.where(terms.prompt == 1, terms.reward + 100, terms.reward))
    answers, gradients = [], []
    for batch in (terms, changed):
        objective = RTB(kind)
        objective.prepare(2, (2,), 3)
        answers.append(objective(batch, 1.5))
        gradients.append(cotangent(objective, batch, 1.5))
    same = terms.prompt == 0
    assert torch.equal(answers[0].residual[same], answers[1].residual[same])
    assert torch.equal(gradients[0][same], gradients[1][same])
    assert not torch.equal(answers[0].log_z[~same], answers[1].log_z[~same])


def test_one_log_z_for_all_prompts_does_leak() -> None:
    """What `learned` is documented to get wrong: prompts with different Z leave a residual that no log Z removes."""
    terms = random_terms(0)
    terms = replace(terms, log_p=terms.log_q.detach(), reward=terms.prompt.double())
    assert RTB("vargrad")(terms, 1.0).loss == 0
    close(RTB("learned").double()(terms, 1.0).loss, torch.tensor(0.5 * 0.25, dtype=torch.float64))


def test_vargrad_is_a_constant_to_the_gradient() -> None:
    """Also under Huber, where a gradient through the mean would differ from RTB's at that log Z."""
    terms = random_terms(0, prompts=1)
    log_z = VarGrad()(log_weight(terms.log_q, terms.log_p, terms.reward, 2.0), terms.prompt, 2.0)
    assert not log_z.requires_grad
    learned, vargrad = at(RTB("learned", "huber"), [float(log_z[0])]), RTB("vargrad", "huber")
    close(cotangent(vargrad, terms, 2.0), cotangent(learned, terms, 2.0))


def test_vargrad_refuses_a_group_of_one() -> None:
    terms = replace(random_terms(0, batch=5, prompts=2), prompt=torch.tensor([0, 0, 7, 0, 0]))
    with pytest.raises(ValueError, match=r"prompt 7 has a group of size 1 .* at least 2 .*per_prompt"):
        RTB()(terms, 1.0)


def test_per_prompt_refuses_a_row_it_does_not_have() -> None:
    objective = RTB("per_prompt")
    with pytest.raises(ValueError, match=r"row 1 has no log Z: the table has 0 rows.*prepare"):
        objective(random_terms(0), 1.0)
    objective.prepare(2, (2,), 3)
    with pytest.raises(ValueError, match=r"row -1 has no log Z: the table has 2 rows"):
        objective(replace(random_terms(0), prompt=torch.tensor([0, 1, -1, 0, 0, 0])), 1.0)
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        objective.prepare(0, (2,), 3)


@cases
@given(seeds, betas, st.sampled_from(["nats", "reward"]))
def test_learned_log_z_starts_at_the_first_batch(seed: int, beta: float, scale: Any) -> None:
    terms = random_terms(seed)
    log_w = log_weight(terms.log_q, terms.log_p, terms.reward, beta).detach()
    scalar, table = RTB("learned", scale=scale), RTB("per_prompt", scale=scale)
    table.prepare(3, (2,), 3)
    for objective in (scalar.double(), table.double()):
        first = objective(terms, beta)
        second = objective(replace(terms, reward=terms.reward + 5), beta)
        close(second.log_z, first.log_z)  # set once, not again
    close(scalar(terms, beta).log_z, log_w.mean().expand(6))
    close(table(terms, beta).log_z, RTB("vargrad")(terms, beta).log_z)
    assert isinstance(table.log_z, LearnedLogZ)
    assert table.log_z.initialised.tolist() == [True, True, False]
    close(table.log_z.value[2], torch.zeros((), dtype=torch.float64))


def test_prompts_seen_later_are_set_when_seen() -> None:
    terms = random_terms(0)
    objective = RTB("per_prompt")
    objective.prepare(4, (2,), 3)
    objective.double()
    before = objective(terms, 2.0)
    later = replace(terms, prompt=torch.tensor([3, 1, 3, 1, 0, 1]), reward=terms.reward + 1)
    after = objective(later, 2.0)
    log_w = log_weight(later.log_q, later.log_p, later.reward, 2.0).detach()
    close(after.log_z[0], log_w[[0, 2]].mean())
    close(after.log_z[[4, 1]], before.log_z[:2])


@pytest.mark.parametrize("build", [partial(RTB, "learned"), partial(RTB, "per_prompt"), partial(TrustPCL, 2)])
def test_state_survives_a_round_trip(build: Any) -> None:
    """Also the flag that a value was set: a resumed run must not set it again from its first batch."""
    first, second = build(), build()
    for objective in (first, second):
        objective.prepare(3, (2,), 3)
        objective.double()
    terms = random_terms(1)
    expected = first(terms, 2.0)
    second.load_state_dict(first.state_dict())
    moved = replace(terms, reward=terms.reward + 10)
    close(second(moved, 2.0).log_z, expected.log_z)
    assert first.state_dict().keys() == second.state_dict().keys()


@pytest.mark.parametrize("objective", [RTB("learned", scale="reward"), RTB("learned")])
def test_annealing_keeps_the_units_of_log_z(objective: RTB) -> None:
    """Twice the beta: a log Z kept in reward units doubles with it, one kept in nats stays."""
    terms = random_terms(2)
    before, after = objective(terms, 1.0).log_z, objective(terms, 2.0).log_z
    close(after, before * (2 if objective.scale == "reward" else 1))
