"""A latent model's decoder is a cost of its own: whatever is drawn is decoded once, for its reward and everything else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_rtb.comparison.truths.measure import draw_posterior
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.samples import draw
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.sampling.images import draw_images
from diffusion_rtb.sampling.sampler import Sampler, numbered
from diffusion_rtb.training.observers import Sheets
from tests.oracles.pixel import PixelPrior, Signs, green

PROMPTS = ["one", "two"]
TOOLS = {"labeller": {"component": "tests.oracles.pixel:Signs"}, "factors": [{"name": "sign", "classes": ["-", "+"]}]}


class Counting(PixelPrior):
    """Counts how often each sample is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded: Counter[bytes] = Counter()

    def decode(self, x_0: Tensor) -> Tensor:
        self.decoded.update(row.numpy().tobytes() for row in x_0)
        return super().decode(x_0)


def evaluation(prior: Prior, folder: Path) -> None:
    sampler, config = Sampler(prior, green, PROMPTS, 3), EvalConfig.model_validate(TOOLS)
    draw(sampler, config, 4, 0, posterior=True, embedder=Signs(), labeller=Signs())


def evaluation_of_the_prior(prior: Prior, folder: Path) -> None:
    draw(Sampler(prior, green, PROMPTS, 3), EvalConfig(), 4, 0, posterior=False)


def comparison(prior: Prior, folder: Path) -> None:
    draw_posterior(prior, green, PROMPTS, 8, 0, scored=5)


def sheet(prior: Prior, folder: Path) -> None:
    sampler = Sampler(prior, green, PROMPTS, 3)
    Sheets(sampler, nullcontext, 0, count=4, every=1, folder=folder, show=lambda *_: None).after(0, {})


def pictures(prior: Prior, folder: Path) -> None:
    draw_images(prior, PROMPTS, 4, batch=3)


@pytest.mark.parametrize("way", [evaluation, evaluation_of_the_prior, comparison, sheet, pictures])
def test_each_sample_is_decoded_once(way: Callable[[Prior, Path], None], tmp_path: Path) -> None:
    prior = Counting()
    way(prior, tmp_path)
    assert len(prior.decoded) == 8
    assert set(prior.decoded.values()) == {1}


def test_images_are_those_of_the_samples_and_kept_only_on_demand() -> None:
    prior = PixelPrior()
    sampler = Sampler(prior, green, PROMPTS, 3)
    batch = sampler.draw([0, 1, 1, 0], [1, 2, 3, 4], images=True)
    assert batch.images is not None
    assert torch.equal(batch.images, prior.decode(batch.trajectory.x_0))
    assert torch.equal(batch.reward, green(batch.images, ["one", "two", "two", "one"]))
    assert sampler.draw([0], [1]).images is None
    assert [len(part) for part in sampler.stream([0, 1, 1, 0], [1, 2, 3, 4])] == [3, 1]


def test_a_prompt_that_comes_twice_is_numbered_on() -> None:
    assert numbered([5, 2, 5], 2) == [(5, 0), (5, 1), (2, 0), (2, 1), (5, 2), (5, 3)]
