"""PixArt of both pipelines, from a folder whose scheduler is of another kind: what belonged to that one is not asked of DDIM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffusion_rtb.chain.recordable import solver_order
from diffusion_rtb.chain.rollout import rollout, score
from pipelines.pixart import PixArt
from tests.oracles.families import pixart
from tests.oracles.tiny import save_tiny


def test_a_folder_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    for build, tokens in ((pixart.build, 300), (pixart.build_alpha, 120)):
        pipe, folder = build(), tmp_path / build.__name__
        pipe.save_pretrained(folder)
        prior = PixArt(str(folder), steps=3, guidance=2.0, device="cpu")
        drawn = rollout(prior, pixart.PROMPTS, [1, 2])
        assert type(prior.pipe) is type(pipe)
        assert prior.arguments(["a"])["prompt_embeds"].shape[1] == tokens, "as the pipeline's own call encodes"
        assert torch.equal(score(prior, pixart.PROMPTS, drawn), drawn.log_prob)
        assert type(pipe).__name__ in prior.snippet()


def test_settings_of_the_folders_scheduler_are_not_those_of_another(tmp_path: Path) -> None:
    pixart.build().save_pretrained(tmp_path / "model")
    prior = PixArt(str(tmp_path / "model"), steps=3, device="cpu")
    assert prior.pipe.scheduler.config.solver_order == 2, "kept of DPMSolverMultistepScheduler, meaningless to DDIM"
    assert type(prior.pipe.scheduler).__name__ == "DDIMScheduler"
    own = PixArt(
        str(tmp_path / "model"),
        steps=3,
        device="cpu",
        scheduler="DPMSolverMultistepScheduler",
        scheduler_arguments={"algorithm_type": "sde-dpmsolver++"},
    )
    assert solver_order(own.pipe.scheduler) == 2, "its own, for it to use: trajectories of it are refused by objectives"
    other = save_tiny(tmp_path / "sd")
    with pytest.raises(ValueError, match="this prior needs a PixArtSigmaPipeline or PixArtAlphaPipeline"):
        PixArt(str(other), device="cpu")
