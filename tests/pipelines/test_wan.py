"""Videos: which of their frames a reward sees, the sizes they can have, and models of two denoisers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from diffusion_rtb.chain.rollout import rollout
from pipelines.wan import Wan
from tests.oracles.families import wan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wan") / "model"
    wan.build().save_pretrained(path)
    return path


def made(folder: Path, **settings: Any) -> Wan:
    given: dict[str, Any] = {"steps": 3, "device": "cpu", **wan.SETTINGS} | settings
    return Wan(str(folder), **given)


def test_a_reward_sees_the_frames_of_the_pipelines_own_video(folder: Path) -> None:
    prior = made(folder, frames="all")
    drawn = rollout(prior, wan.PROMPTS, [1, 2])
    assert drawn.dims == (4, 2, 2, 2), "channels, latents of 5 frames, rows, columns"
    pipe, latents = prior.pipe, drawn.x_0
    mean, std = (torch.tensor(pipe.vae.config[name]).view(1, 4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        videos = (pipe.vae.decode(latents * std + mean).sample / 2 + 0.5).clamp(0, 1)  # (batch, 3, frames, h, w)
    assert videos.shape == (2, 3, 5, 16, 16)
    torch.testing.assert_close(prior.decode(latents), torch.cat(videos.unbind(2), dim=2))
    frames: tuple[tuple[Literal["first", "middle", "last"], int], ...] = (("first", 0), ("middle", 2), ("last", 4))
    for prior.frames, frame in frames:
        torch.testing.assert_close(prior.decode(latents), videos[:, :, frame])
    assert prior.fingerprint()["frames"] == "last"


def test_lengths_that_no_video_has_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"num_frames=6.* Set num_frames: 5 or 9"):
        made(folder, num_frames=6)
    with pytest.raises(ValueError, match=r"Set num_frames: 1 or 5"):
        made(folder, num_frames=0)
    with pytest.raises(ValueError, match="positive multiples of 16"):
        made(folder, height=24, width=32)


def test_two_denoisers_are_refused(folder: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    for part in folder.iterdir():
        (two / part.name).symlink_to(part)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"transformer_2": index["transformer"], "boundary_ratio": 0.875}
    (two / "model_index.json").unlink()
    (two / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="two denoisers"):
        made(two)
