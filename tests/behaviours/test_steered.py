"""Steered trajectories for training: their densities, their distribution, and the log Z that they estimate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.behaviours.steered import Steered
from diffusion_rtb.chain.rollout import score
from tests.oracles.behaving import BETA, QUADRATIC, known, run

SETTINGS: dict[str, Any] = {"component": "steered", "share": 0.5, "particles": 8}


@pytest.mark.usefixtures("shapes_unchecked")
def test_they_stand_for_the_posterior_and_know_log_z(tmp_path: Path) -> None:
    steering = {**SETTINGS, "threshold": 0.9, "temper": 0.0}
    trainer = run(tmp_path, reward=QUADRATIC, behaviours=[steering])
    trainer.sampler.micro_batch = 1600
    source = trainer.sources["steered"][0]
    assert isinstance(source, Steered)
    tilt = known(trainer)
    batch = source.draw(trainer.sampler, [0] * 400, 4, 0, BETA)
    assert batch.log_z is not None
    z, exact = batch.log_z[::4].exp(), math.exp(tilt.log_z)
    error = float(z.std()) / 20
    assert error < 0.05 * exact
    assert abs(float(z.mean()) - exact) < 3.5 * error
    means = batch.reward.double().unflatten(0, (400, 4)).mean(1)
    of_posterior = float(tilt.beta_r.expectation(*tilt.end)) / BETA
    of_prior = float(tilt.beta_r.expectation(*(m[-1] for m in tilt.p.marginals))) / BETA
    assert abs(float(means.mean()) - of_posterior) < 0.2 * (of_posterior - of_prior)  # the error of 8 particles
    first = batch[list(range(8))]
    with trainer.prior.as_prior():
        log_p = score(trainer.prior, [""] * 8, first.trajectory)
    assert first.log_p is not None
    torch.testing.assert_close(first.log_p, log_p)
    again = source.draw(trainer.sampler, [0] * 400, 4, 0, BETA)
    assert torch.equal(again.trajectory.x, batch.trajectory.x)


def test_a_run_logs_the_third_log_z(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        behaviours=[{**SETTINGS, "particles": 2}],  # four from two particles: two groups
        train={"iterations": 2, "group": 8},
    )
    trainer.fit()
    rows = [json.loads(line) for line in (tmp_path / "known" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert {"log_z", "elbo", "log_z_steered", "steered_share_reward"} <= row.keys()
        assert math.isfinite(row["log_z_steered"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"behaviours": [{**SETTINGS, "particles": 64}]}, "draws 64 particles in one call, and train.micro_batch is 8"),
        ({"objective": {"component": "grpo"}}, "on-policy.*behaviours Steered"),
        (
            {"objective": {"component": "reinforce_kl", "importance": "self_normalised"}},
            "chains chosen by their reward on the way. Take steered out",
        ),
        (
            {
                "reward": {
                    "component": "standardise",
                    "samples": None,
                    "reward": {"component": "density", "density": QUADRATIC},
                }
            },
            "lets it judge unfinished samples",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"behaviours": [SETTINGS], **sections})
