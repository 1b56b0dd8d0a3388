"""(c·r, beta/c) is the posterior of (r, beta): a run learns it in the same steps, whatever unit the reward comes in.

A power of two for c rounds nothing, so everything must be equal to the last bit, at a millionth of the unit and at a million of
them. 1e-6 and 1e6 round every reward in its 24th bit. Adam makes a full step of lr = 0.03 of a gradient that is nothing but such
rounding, as the first one of a V that starts at the mean is; the ELBO, a mean over samples, may differ by as much.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.behaving import BETA, rows, run

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")

HALF_PRIOR = [{"component": "prior_buffer", "share": 0.5, "capacity": 8, "resample": False}]

VARIANTS: dict[str, dict[str, Any]] = {
    "rtb": {"objective": {"component": "rtb"}},
    "rtb learned": {"objective": {"component": "rtb", "log_z": "learned"}},
    "scale reward": {"objective": {"component": "rtb", "scale": "reward", "log_z": "per_prompt"}},
    "whole": {"objective": {"component": "trust_pcl"}},
    "whole huber": {"objective": {"component": "trust_pcl", "loss": "huber", "huber_delta": 0.5, "dead_zone": 0.1}},
    "whole learned": {"objective": {"component": "trust_pcl", "log_z": "learned"}},
    "whole annealed": {
        "objective": {"component": "trust_pcl", "log_z": "learned"},
        "beta": {"anneal": {"start": 0.2, "iterations": 4}},
    },
    "consistency": {"objective": {"component": "trust_pcl", "length": 1}},
    "consistency warmed": {
        "objective": {"component": "trust_pcl", "length": 2, "warm_up_updates": 20},
        "behaviours": HALF_PRIOR,
    },
    "returns": {
        "objective": {"component": "trust_pcl", "length": 2, "value_loss": "returns"},
        "behaviours": HALF_PRIOR,
    },
    "none": {
        "objective": {"component": "trust_pcl", "length": 1, "value_loss": "none", "warm_up_updates": 20},
        "behaviours": HALF_PRIOR,
    },
    "kl_budget": {
        "objective": {"component": "trust_pcl", "length": 2},
        "beta": {"kl_budget": {"nats": 2.0}},
    },
    "reinforce_kl": {"objective": {"component": "reinforce_kl"}},
    "dpok": {"objective": {"component": "dpok", "kl": "gaussian"}},
    "grpo": {"objective": {"component": "grpo"}},
    "grpo none": {"objective": {"component": "grpo", "normalise": "none"}},
    "ddpo": {"objective": {"component": "ddpo"}},
}


def trained(out: Path, c: float, variant: dict[str, Any]) -> tuple[list[dict[str, Any]], Tensor]:
    """Metrics in units of r, and the posterior's parameters, of 4 iterations with c·r and beta/c; gradients are clipped."""
    sizes = {"iterations": 4, "group": 16, "micro_batch": 16, "grad_clip": 1.0}
    beta = {"value": BETA / c} | variant.get("beta", {})
    trainer = run(out, **variant | {"beta": beta}, train=sizes)
    reward = trainer.sampler.reward
    trainer.sampler.reward = lambda images, prompts: c * reward(images, prompts)
    trainer.fit()
    found = rows(trainer)
    for row in found:
        for key in row.keys() & {"reward", "reward_std", "prior_share_reward"}:
            row[key] /= c
        for key in row.keys() & {"beta", "beta_realised"}:
            row[key] *= c
        row.pop("loss")  # in its own unit, which is another for each objective
    return found, torch.cat([p.detach().flatten() for p in trainer.prior.parameters().values()])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_does_not_depend_on_the_unit_of_the_reward(variant: str, tmp_path: Path) -> None:
    metrics, parameters = trained(tmp_path / "1", 1.0, VARIANTS[variant])
    assert float(parameters.abs().max()) > 0.01
    for c in (2.0**-20, 2.0**20):
        own_metrics, own = trained(tmp_path / str(c), c, VARIANTS[variant])
        assert torch.equal(own, parameters)
        assert own_metrics == metrics


@pytest.mark.parametrize("variant", ["whole", "consistency", "none"])
def test_nor_where_the_unit_rounds_the_reward(variant: str, tmp_path: Path) -> None:
    metrics, parameters = trained(tmp_path / "1", 1.0, VARIANTS[variant])
    for c in (1e-6, 1e6):
        own_metrics, own = trained(tmp_path / str(c), c, VARIANTS[variant])
        torch.testing.assert_close(own, parameters, rtol=0, atol=0.03)
        assert own_metrics[-1]["elbo"] == pytest.approx(metrics[-1]["elbo"], abs=0.03)
