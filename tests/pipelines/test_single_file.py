"""Checkpoints in one file, under the names of the first implementation: the very same model, or refused by name before loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from pipelines._models.single_file import check_single_file, configs_for, read_single_file
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.families import stable_diffusion_xl
from tests.oracles.ldm_checkpoint import ldm_state, save_ldm
from tests.oracles.tiny import tiny_stable_diffusion, tiny_vae


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a folder and as a file; its autoencoder attends, as published ones do."""
    root = tmp_path_factory.mktemp("single")
    pipe = tiny_stable_diffusion()
    torch.manual_seed(0)
    pipe.register_modules(vae=tiny_vae(mid_block_add_attention=True))
    pipe.save_pretrained(root / "folder")
    save_ldm(pipe, root / "model.safetensors")
    return root


def test_it_is_the_model_of_the_folder(places: Path) -> None:
    file = StableDiffusion(str(places / "model.safetensors"), config=str(places / "folder"), steps=2, device="cpu")
    folder = StableDiffusion(str(places / "folder"), steps=2, device="cpu")
    assert file.fingerprint() == folder.fingerprint()
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(prior.pipe, name).state_dict() for prior in (file, folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert file.trained_numbers(rank=2) == folder.trained_numbers(rank=2) > 0
    assert "from_single_file" in file.snippet()


def test_sdxl_is_read_whole(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl.build()
    config = pipe.text_encoder_2.config
    config.hidden_size += (
        8  # diffusers tells the two text encoders by their widths, which differ in the published model
    )
    pipe.register_modules(text_encoder_2=CLIPTextModelWithProjection(config))
    pipe.save_pretrained(tmp_path / "folder")
    file = save_ldm(pipe, tmp_path / "model.safetensors")
    check_single_file(file, tmp_path / "folder")
    read = read_single_file(
        StableDiffusionXLPipeline, file, tmp_path / "folder", dtype=torch.float32, scheduler=pipe.scheduler
    )
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(of, name).state_dict() for of in (read, pipe))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_the_bundled_configs_are_found_by_the_names_in_the_file(tmp_path: Path) -> None:
    for mark, pipeline, folder in (
        ("cond_stage_model.transformer.text_model.x", "StableDiffusionPipeline", "sd15"),
        ("conditioner.embedders.1.model.x", "StableDiffusionXLPipeline", "sdxl"),
    ):
        save_file({mark: torch.zeros(1)}, tmp_path / "model.safetensors")
        assert configs_for(tmp_path / "model.safetensors", pipeline, None).name == folder


def test_the_vocabulary_is_clips_own(places: Path, tmp_path: Path) -> None:
    """Ids that OpenAI's tokenizer is known to give, and SDXL's second tokenizer pads with "!"."""
    bare = tmp_path / "bare"
    pipe = StableDiffusionPipeline.from_pretrained(places / "folder")
    pipe.save_pretrained(bare)
    for file in (bare / "tokenizer").iterdir():
        file.unlink()
    (bare / "tokenizer").rmdir()
    read = read_single_file(
        StableDiffusionPipeline,
        places / "model.safetensors",
        bare,
        dtype=torch.float32,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    assert isinstance(read.tokenizer, CLIPTokenizer)
    assert read.tokenizer("a photo of a cat")["input_ids"] == [49406, 320, 1125, 539, 320, 2368, 49407]


def only(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name.removeprefix(part): v for name, v in state.items() if name.startswith(part)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (only("model.diffusion_model."), "no checkpoint of a whole model"),
        (lambda s: {k: v for k, v in s.items() if "output_blocks.1" not in k}, "unet .UNet2DConditionModel.*missing|lacks"),
        (lambda s: {k: v for k, v in s.items() if "first_stage_model.decoder.conv_out" not in k}, "vae|lacks"),
        (lambda s: s | {"model.diffusion_model.out.2.weight": torch.zeros(8, 8, 3, 3)}, "out.*shape|conv_out"),
        (lambda s: s | {"conditioner.embedders.1.model.x": torch.zeros(1)}, "SDXL.*Choose component: stable_diffusion_xl"),
        (lambda s: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "LoRA"),
        (lambda s: {"double_blocks.0.x": torch.zeros(1)}, "FLUX"),
    ],
)  # fmt: skip
def test_other_files_are_refused_before_weights_load(
    places: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(places / "folder")
    save_file(change(ldm_state(pipe)), tmp_path / "changed.safetensors")
    bundled = "conditioner" in message or "SDXL" in message or "FLUX" in message
    config = None if bundled else str(places / "folder")
    with pytest.raises(ValueError, match=message):
        StableDiffusion(str(tmp_path / "changed.safetensors"), config=config, steps=2, device="cpu")


@pytest.mark.parametrize(
    ("path", "message"),
    [("model.ckpt", "pickles.*safetensors"), ("nothing.safetensors", "There is no checkpoint at path")],
)
def test_pickles_and_missing_files_are_refused(tmp_path: Path, path: str, message: str) -> None:
    for place in (tmp_path / path, Path("models") / path):  # the second looks like a hub id
        with pytest.raises(ValueError, match=message):
            StableDiffusion(str(place), steps=2, device="cpu")


def test_configs_are_for_single_files(places: Path) -> None:
    with pytest.raises(ValueError, match="is for a checkpoint in a single file"):
        StableDiffusion(str(places / "folder"), config=str(places / "folder"), steps=2, device="cpu")
