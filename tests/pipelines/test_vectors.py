"""What was made for pictures works for vectors: rewards, sheets of samples, the evaluation of an analytic prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.evaluation.evaluate import sheet_of
from diffusion_rtb.evaluation.metric import metrics_of
from diffusion_rtb.evaluation.samples import DOTS, draw
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.files.pictures import DOT, PANEL, grid, panels, side_by_side, to_pil
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from diffusion_rtb.training.assemble import assemble
from pipelines.gaussian import Gaussian
from rewards.density import Density

QUADRATIC: dict[str, Any] = {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}


def run_config(out: Path) -> RunConfig:
    """configs/gaussian.yaml in small, with sheets."""
    return RunConfig.model_validate(
        {
            "name": "small",
            "out": str(out),
            "prior": {
                "component": "gaussian",
                "mean": [1.0, -2.0],
                "covariance": [[2.0, 0.6], [0.6, 0.5]],
                "steps": 12,
            },
            "reward": {"component": "density", "density": QUADRATIC},
            "beta": 1.0,
            "prompts": {"list": [""]},
            "train": {
                "iterations": 40,
                "prompts_per_iteration": 1,
                "group": 128,
                "micro_batch": 128,
                "lr": 0.05,
                "lr_decay": "cosine",
                "grad_clip": 100.0,
                "grid_every": 40,
                "grid_samples": 32,
            },
            "eval": {"samples": 1500, "prior_samples": 1500, "batch": 500, "bootstrap": 20},
        }
    )


def dots(picture: Tensor) -> Tensor:
    """Where a panel has the colour of a dot; (side, side)."""
    return (picture - torch.tensor(DOT)[:, None, None]).abs().amax(0) < 0.01


def test_the_reward_of_vectors_is_checked_like_that_of_pictures() -> None:
    x = torch.randn(5, 2)
    values = evaluate_reward(Density(QUADRATIC), x, [""] * 5, "density", chunk=2)
    assert torch.allclose(values, Density(QUADRATIC)(x, [""] * 5), rtol=1e-6)
    with pytest.raises(RewardError, match=r"on vectors 0 to 4 is nan for vector 3, prompt ''"):
        evaluate_reward(lambda x, _: x[:, 0] / (x[:, 0] != 3) * 0, torch.arange(5.0)[:, None], [""] * 5, "broken")


def test_dots_are_where_the_vectors_are() -> None:
    (picture,) = panels([torch.tensor([[0.0, 0.0], [1.0, 1.0]])])
    rows, columns = dots(picture).nonzero().T
    # Two dots of two by two pixels; y grows upwards.
    assert len(rows) == 8
    lower_left = (rows > PANEL // 2) & (columns < PANEL // 2)
    assert int(lower_left.sum()) == 4
    assert int(((rows < PANEL // 2) & (columns > PANEL // 2)).sum()) == 4


def test_panels_share_their_axes() -> None:
    a, b = panels([torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 2.0]])])
    (both,) = panels([torch.tensor([[0.0, 0.0], [4.0, 2.0]])])
    assert torch.equal(dots(a) | dots(b), dots(both))


def test_numbers_become_bars_as_high_as_they_are_frequent() -> None:
    (picture,) = panels([torch.tensor([0.0] * 30 + [1.0] * 10)[:, None]])
    heights = dots(picture).sum(0)
    left, right = int(heights[:16].max()), int(heights[-16:].max())
    assert right / left == pytest.approx(1 / 3, abs=0.02)
    assert int(heights[32:-32].max()) == 0


def test_a_grid_of_vectors_has_a_panel_per_row_and_side() -> None:
    x = torch.randn(2, 50, 2)
    single = grid(x.flatten(0, 1), 50, ["1.0"] * 100, rows=["a", "b"])
    double = side_by_side(x, x + 1, ["a", "b"])
    assert single.width < double.width
    pixels = torch.frombuffer(bytearray(double.tobytes()), dtype=torch.uint8).view(double.height, double.width, 3)
    blue = (pixels[..., 2].int() - pixels[..., 0].int()) > 60
    half = double.width // 2
    # The posterior is the prior shifted to the upper right.
    for top in (0, double.height // 2):
        rows, columns = blue[top : top + double.height // 2].nonzero().T
        left, right = columns < half, columns >= half
        assert (columns[right] - half).float().mean() > columns[left].float().mean()
        assert rows[right].float().mean() < rows[left].float().mean()


def test_a_vector_is_no_picture() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\) is no picture .* vectors"):
        to_pil(torch.zeros(2))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_run_on_vectors_is_trained_and_evaluated(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    trainer = assemble(config)
    trainer.fit()
    (sheet,) = (tmp_path / "small" / "samples").iterdir()
    assert Image.open(sheet).width > PANEL
    trained = open_trained_run(tmp_path / "small")
    loaded, prior = trained.config, trained.prior()
    assert loaded == config
    sampler = Sampler(prior, Density(QUADRATIC), [""], config.eval.batch)
    before, left = draw(sampler, config.eval, 1500, 0, posterior=False)
    after, right = draw(sampler, config.eval, 1500, 0, posterior=True)
    assert left.image.shape == (min(1500, DOTS), 2)
    found = summarise(before, after, [""], 1.0, config.eval, metrics_of(trained.components.eval.metrics))
    numbers = json.loads(json.dumps(found, allow_nan=False))["overall"]
    assert isinstance(prior, Gaussian)
    exact = prior.solve(1.0, **QUADRATIC)
    # 1,500 samples: standard errors of about 0.03 for KL and ELBO; log Z from the prior has an ESS of 0.4.
    assert numbers["elbo"] == pytest.approx(exact.best_elbo, abs=0.12)
    assert numbers["log_z"]["from_prior"] == pytest.approx(exact.log_z, abs=0.15)
    picture = sheet_of({"prior": left, "posterior": right}, sampler.prompts)
    assert picture.width > 2 * PANEL
