"""What single families do besides the contract: two guidances of FLUX.1, refusals before weights load, lengths of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import build, describe
from tests.oracles.families import flux, flux2, stable_diffusion_3, z_image

SIZE: dict[str, Any] = {"height": 64, "width": 64, "max_sequence_length": 32, "steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 with and without its scale, klein distilled, SD 3 without T5, Z-Image."""
    folder = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        flux.build().save_pretrained(folder / "flux")
        schnell = flux.build()
        schnell.transformer.register_to_config(guidance_embeds=False)
        schnell.save_pretrained(folder / "schnell")
        flux2.build(is_distilled=True).save_pretrained(folder / "flux2")
        three = stable_diffusion_3.build()
        three.register_modules(text_encoder_3=None, tokenizer_3=None)
        three.save_pretrained(folder / "stable_diffusion_3")
        z_image.build().save_pretrained(folder / "z_image")
    return folder


def prior(folders: Path, name: str, **settings: Any) -> Any:
    return build({"component": name, "path": str(folders / name), **SIZE, **settings}, "prior")


def drawn(of: Any, call: dict[str, Any]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        latents: Tensor = of.pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    return latents


def test_the_guidances_of_flux_are_two_things(folders: Path) -> None:
    plain = prior(folders, "flux")
    assert (plain.settings()["guidance_scale"], plain.settings()["true_cfg_scale"]) == (3.5, 1.0)
    other = prior(folders, "flux", distilled_guidance=1.0)
    true = prior(folders, "flux", guidance=3.5, negative_prompt="a dog")
    assert (true.settings()["guidance_scale"], true.settings()["true_cfg_scale"]) == (3.5, 3.5)
    pictures = [drawn(each, each.arguments(["a cat"])) for each in (plain, other, true)]
    assert not torch.allclose(pictures[0], pictures[1], atol=1e-4)
    assert not torch.allclose(pictures[0], pictures[2], atol=1e-4)
    stock = {"prompt": "a cat", "negative_prompt": "a dog", "true_cfg_scale": 3.5, "guidance_scale": 3.5}
    size = {"height": 64, "width": 64, "max_sequence_length": 32, "num_inference_steps": 2}
    assert torch.equal(pictures[2], drawn(true, stock | size))
    prints = [each.fingerprint() for each in (plain, other, true)]
    assert [found["distilled_guidance"] for found in prints] == [3.5, 1.0, 3.5]
    assert [found["guidance"]["tilted_prior"] for found in prints] == ["unguided", "unguided", "guided"]


def test_z_image_counts_guidance_from_0(folders: Path) -> None:
    """u + g·(u(prompt) - u) is what the pipeline calls g - 1."""
    guided = prior(folders, "z_image", guidance=5.0, negative_prompt="a dog")
    assert guided.settings()["guidance_scale"] == 4.0
    assert prior(folders, "z_image").settings()["guidance_scale"] == 0.0
    outputs = guided.network(
        [torch.ones(4, 1, 8, 8)] * 2,
        torch.tensor([0.0, 0.0]),
        guided.arguments(["a cat"])["prompt_embeds"] + guided.arguments(["a cat"])["negative_prompt_embeds"],
        return_dict=False,
    )[0]
    told, against = (-output.squeeze(1).detach() for output in outputs)
    seen: list[Tensor] = []
    step = guided.pipe.scheduler.step

    def watched(velocity: Tensor, *rest: Any, **more: Any) -> Any:
        seen.append(velocity)
        return step(velocity, *rest, **more)

    guided.pipe.scheduler.step = watched
    guided.pipe(**guided.arguments(["a cat"]), latents=torch.ones(1, 4, 8, 8), output_type="latent")
    torch.testing.assert_close(seen[0][0], against + 5.0 * (told - against))


def test_without_the_third_text_encoder(folders: Path) -> None:
    """As saved by `text_encoder_3=None`: what the pipeline itself makes of the prompt."""
    three = prior(folders, "stable_diffusion_3")
    assert three.pipe.text_encoder_3 is None
    stock = {"prompt": "a cat", "guidance_scale": 1.0, "height": 64, "width": 64, "num_inference_steps": 2}
    assert torch.equal(drawn(three, three.arguments(["a cat"])), drawn(three, stock | {"max_sequence_length": 32}))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flux", {"distilled_guidance": -1.0}, "distilled_guidance=-1.0: it is a number >= 0"),
        ("flux", {"path": "schnell", "distilled_guidance": 3.5}, "guidance_embeds: false .*Leave distilled_guidance out"),
        ("flux", {"height": 56}, "must be positive multiples of 16"),
        ("flux", {"distilled_guidence": 2.0}, "Did you mean 'distilled_guidance'"),
        ("flux2", {"guidance": 4.0}, "is_distilled: true.* Set guidance: 1.0"),
        ("flux2", {"negative_prompt": "a dog", "guidance": 2.0}, "takes no other. Leave negative_prompt out"),
        ("flux2", {"path": "flux"}, "holds a FluxPipeline; this prior needs a Flux2KleinPipeline"),
        ("z_image", {"max_sequence_length": 0}, "max_sequence_length=0 must be at least 1"),
        ("z_image", {"scheduler": "DDIMScheduler"}, "velocity of a flow"),
        ("stable_diffusion_3", {"height": 128, "width": 144}, "positions for at most 128 pixels a side"),
        ("stable_diffusion", {"path": "flux"}, "StableDiffusionPipeline takes none, its text encoders have a fixed length"),
    ],
)  # fmt: skip
def test_refused_before_weights_load(
    folders: Path, name: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loads)
    given = {"component": name, **SIZE, **settings, "path": str(folders / settings.get("path", name))}
    with pytest.raises(ValueError, match=message):
        describe(given, "prior").construct()
