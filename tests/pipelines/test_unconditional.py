"""Models without conditioning: either pipeline from either folder, one prompt, colour or grey, in every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusion_rtb.chain.rollout import rollout, score
from diffusion_rtb.chain.seeds import generators
from pipelines.unconditional import Unconditional
from tests.oracles.families import unconditional


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unconditional") / "model"
    unconditional.build().save_pretrained(path)
    return path


def made(folder: Path, **settings: Any) -> Unconditional:
    return Unconditional(str(folder), steps=4, device="cpu", **settings)


@pytest.mark.parametrize(
    "kind, scheduler, eta", [(DDPMPipeline, None, {}), (DDIMPipeline, "DDIMScheduler", {"eta": 1.0})]
)
def test_the_sampler_decides_which_pipeline_runs(folder: Path, kind: Any, scheduler: str | None, eta: Any) -> None:
    prior = made(folder, scheduler=scheduler)
    drawn = rollout(prior, [""] * 2, [1, 2])
    assert type(prior.pipe) is kind
    images = prior.pipe(2, generators([1, 2]), num_inference_steps=4, output_type="pt", return_dict=False, **eta)[0]
    assert torch.equal(prior.decode(drawn.x_0), images)
    assert torch.equal(score(prior, [""] * 2, drawn), drawn.log_prob)
    assert prior.features(["", ""]).shape == (2, 0)


def test_bfloat16_never_meets_numpy(folder: Path) -> None:
    prior = made(folder, dtype="bfloat16")
    drawn = rollout(prior, [""], [1])
    assert drawn.x.dtype == torch.bfloat16
    assert torch.equal(score(prior, [""], drawn), drawn.log_prob)
    assert "output_type='pt'" in prior.snippet()
    assert "output_type" not in made(folder).snippet()


def test_grey_pictures_get_three_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",),
        "block_out_channels": (8,),
    }
    sizes = {"sample_size": 8, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    for channels in (1, 4):
        unet = UNet2DModel(in_channels=channels, out_channels=channels, **sizes, **blocks)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / str(channels))
    prior = made(tmp_path / "1")
    drawn = rollout(prior, [""], [1])
    images = prior.decode(drawn.x_0)
    assert prior.dims == (1, 8, 8)
    assert images.shape == (1, 3, 8, 8)
    torch.testing.assert_close(images, (drawn.x_0 / 2 + 0.5).clamp(0, 1).repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="in_channels is 4 and out_channels 4"):
        made(tmp_path / "4")


def test_one_prompt_of_any_text(folder: Path) -> None:
    prior = made(folder)
    prior.read_prompts(["a cat"], [{}], folder)
    with pytest.raises(ValueError, match="its posterior can be that of one prompt only"):
        prior.read_prompts(["a cat", "a dog"], [{}, {}], folder)
    with pytest.raises(ValueError, match="scales its states"):
        made(folder, scheduler="EulerAncestralDiscreteScheduler")
    with pytest.raises(ValueError, match="DDPMPipeline takes no timesteps"):
        Unconditional(str(folder), timesteps=[900, 500, 100], device="cpu")
    with pytest.raises(ValueError, match="TCDScheduler and DDPMPipeline: its steps take eta"):
        made(folder, scheduler="TCDScheduler")
