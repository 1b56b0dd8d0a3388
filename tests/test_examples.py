"""The examples are true: each runs, two arrive at the exact log Z, and the gradient of the third is the objective's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb import Terms, replay
from diffusion_rtb.objectives.rtb import RTB

ROOT = Path(__file__).parents[1]
LOOPS = ["rtb_loop", "trust_pcl_loop", "black_box_reward_loop"]
LOG_Z = -1.3704157


def run(name: str, changes: dict[str, str]) -> dict[str, Any]:
    """Run an example with some of its numbers exchanged; its names afterwards."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    for old, new in changes.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, f"examples/{name}.py", "exec"), names)
    return names


def column(printed: str, word: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{re.escape(word)} ([+-][\d.]+)", printed)]


@pytest.mark.parametrize("name", LOOPS)
def test_an_example_is_one_short_file(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize(("name", "log_z"), [("rtb_loop", "ELBO"), ("trust_pcl_loop", "V(x_T)")])
def test_the_elbo_rises_to_the_exact_log_z(name: str, log_z: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(name, {", 100\n": ", 50\n"})
    printed = capsys.readouterr().out
    elbo = column(printed, "ELBO")
    assert elbo[0] < -3
    assert elbo[-1] == pytest.approx(LOG_Z, abs=0.08)  # the best chain's is -1.401, and a batch's varies by 0.02
    assert column(printed, log_z)[-1] == pytest.approx(LOG_Z, abs=0.08)
    assert column(printed, "log Z") == [pytest.approx(LOG_Z, abs=1e-6)]


def test_the_black_box_gradient_is_that_of_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of the loop, against plain autograd through all steps at once of the loss that `rtb` computes."""
    monkeypatch.chdir(ROOT)
    few = {", 16, 40\n": ", 3, 1\n", '"num_inference_steps": 8': '"num_inference_steps": 3', "lr=2e-3": "lr=0.0"}
    names = run("black_box_reward_loop", few)
    pipe, trajectory, posterior = names["pipe"], names["trajectory"], names["posterior"]
    gradients = [parameter.grad.clone() for parameter in posterior]
    log_q = replay(pipe, trajectory, grad=True, dtype=torch.float64, **names["call"])
    zeros = torch.zeros(3, dtype=torch.long)
    terms = Terms(log_q, names["log_p"], names["r"], zeros, trajectory.x, trajectory.timesteps, torch.zeros(3, 0))
    objective = RTB("vargrad")
    objective.prepare(1, tuple(trajectory.x.shape[2:]), 0)
    expected = torch.autograd.grad(objective(terms, names["BETA"]).loss, posterior)
    scale = max(float(gradient.abs().max()) for gradient in expected)
    assert scale > 1e-3
    for found, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * scale)
