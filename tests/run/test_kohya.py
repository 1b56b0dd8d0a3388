"""The exported LoRA under kohya's names: every adapter is found by the programs that read them, and diffusers reads it back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_rtb.config.load import load_config
from diffusion_rtb.run.export import export_posterior
from diffusion_rtb.run.progress import Progress
from pipelines._diffusers.kohya import KOHYA
from pipelines.gaussian import Gaussian
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.ldm_unet import by_arithmetic, ldm_unet
from tests.oracles.tiny import WIDTH, save_tiny, tiny_stable_diffusion

CHANNELS = (4, 8, 12, 16)
EVERYTHING = [
    "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "linear_1", "linear_2", "net.2", "proj", "proj_in",
    "proj_out", "time_emb_proj", "to_k", "to_out.0", "to_q", "to_v",
]  # fmt: skip
RANK, ALPHA = 4, 6.0


def published_shape(linear: bool) -> UNet2DConditionModel:
    """The blocks of Stable Diffusion 1.x or, with linear projections, 2.x; narrow."""
    unet: UNet2DConditionModel = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=CHANNELS,
        norm_num_groups=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        use_linear_projection=linear,
    )
    return unet


def tuned(folder: Path, targets: list[str], **settings: Any) -> StableDiffusion:
    """A posterior far from its prior, whose alpha is not its rank."""
    arguments: dict[str, Any] = {"steps": 4, "device": "cpu", "guidance": 3.0}
    prior = StableDiffusion(str(folder), **arguments | settings)
    prior.attach(rank=RANK, alpha=ALPHA, target_modules=targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in prior.parameters().values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return prior


def adapted(unet: nn.Module) -> dict[str, Tensor]:
    """Module -> what its adapter adds to its weight, by peft."""
    return {
        name: module.get_delta_weight(module.active_adapters[0])
        for name, module in unet.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def patch(file: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """What a program adds to the weight it found for `key`: alpha / rank · up · down, flattened, in the weight's shape."""
    up, down = file[f"{key}.lora_up.weight"], file[f"{key}.lora_down.weight"]
    if down.ndim == 4 and down.shape[2:] == (1, 1) and len(shape) == 2:
        raise AssertionError("a convolution's factors for a linear layer")
    return float(file[f"{key}.alpha"]) / len(down) * (up.flatten(1) @ down.flatten(1)).reshape(shape)


@pytest.mark.parametrize("linear", [False, True], ids=["1.x", "2.x"])
def test_every_adapter_is_found_by_the_names_that_programs_look_up(tmp_path: Path, linear: bool) -> None:
    pipe = tiny_stable_diffusion()
    pipe.register_modules(unet=published_shape(linear))
    pipe.save_pretrained(tmp_path / "prior")
    prior = tuned(tmp_path / "prior", EVERYTHING)
    prior.export(tmp_path, "")
    file, wanted = load_file(tmp_path / KOHYA), adapted(prior.pipe.unet)
    structure = ldm_unet(CHANNELS, WIDTH, linear)
    assert structure.keys() == wanted.keys()  # the walk is right, and nothing is left without an adapter
    comfy = {f"lora_unet_{name.replace('.', '_')}": name for name in structure}
    assert {key.partition(".")[0] for key in file} == comfy.keys()
    assert len([name for name in structure if re.search(r"attn\d\.", name)]) == 128
    for key, name in comfy.items():
        ldm, shape = structure[name]
        assert by_arithmetic(key) == ldm.replace(".", "_")
        torch.testing.assert_close(patch(file, key, shape), wanted[name], atol=1e-6, rtol=1e-5)
    assert len(file) == 3 * len(structure)
    assert all(value.dtype == torch.float32 for value in file.values())


def image(prior: StableDiffusion) -> Tensor:
    call = prior.arguments(["a cat emoji"])
    images: Tensor = prior.pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    return images


PLAIN = """
import sys, torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
pipe = StableDiffusionPipeline.from_pretrained("prior")
pipe.load_lora_weights(sys.argv[1])
image = pipe("a cat emoji", num_inference_steps=4, guidance_scale=3.0, eta=1.0, output_type="pt",
             generator=torch.Generator().manual_seed(0)).images
layer = next(m for m in pipe.unet.modules() if hasattr(m, "lora_A"))
save_file({"image": image, "scale": torch.tensor(next(iter(layer.scaling.values())))}, "image.safetensors")
assert not {"diffusion_rtb", "pipelines", "rewards"} & {name.partition(".")[0] for name in sys.modules}
"""


def test_diffusers_reads_it_back_in_a_clean_process(tmp_path: Path) -> None:
    save_tiny(tmp_path / "prior")
    prior = tuned(tmp_path / "prior", EVERYTHING)
    prior.export(tmp_path / "lora", "")
    (tmp_path / "plain.py").write_text(PLAIN)
    # Isolated mode: neither PYTHONPATH nor the current folder leads to this package.
    command = [sys.executable, "-I", "plain.py", str(Path("lora", KOHYA))]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    plain = load_file(tmp_path / "image.safetensors")
    torch.testing.assert_close(plain["image"], image(prior), atol=1e-5, rtol=0)
    assert plain["scale"] == ALPHA / RANK
    with prior.as_prior():
        assert (plain["image"] - image(prior)).abs().max() > 0.01


@pytest.mark.parametrize("target", EVERYTHING)
def test_the_converter_s_inverse_gives_back_every_kind_of_layer(tmp_path: Path, target: str) -> None:
    save_tiny(tmp_path / "prior")
    prior = tuned(tmp_path / "prior", [target])
    prior.export(tmp_path, "")
    plain = tiny_stable_diffusion()
    plain.load_lora_weights(str(tmp_path / KOHYA))
    (loaded, trained) = ([d for _, d in sorted(adapted(p.unet).items())] for p in (plain, prior.pipe))
    assert len(loaded) == len(trained) > 0
    torch.testing.assert_close(loaded, trained)


def test_the_folder_is_still_loaded_by_diffusers_own_name(tmp_path: Path) -> None:
    save_tiny(tmp_path / "prior")
    prior = tuned(tmp_path / "prior", ["to_q", "conv1"])
    prior.export(tmp_path / "lora", "")
    state, alphas = type(prior.pipe).lora_state_dict(tmp_path / "lora")
    assert alphas is None
    assert len(state) == len(prior.parameters())


def table(markdown: str) -> dict[str, list[str]]:
    """The rows on other programs, by their first cell."""
    section = markdown.split("## Which file is for what")[1].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_the_card_says_which_file_is_for_what(tmp_path: Path) -> None:
    save_tiny(tmp_path / "prior")
    overrides = [f"prior.path={tmp_path / 'prior'}", "prior.steps=4", "prior.guidance=3", "prior.device=cpu"]
    config = load_config("configs/quickstart.yaml", [*overrides, "prior.negative_prompt=a|b"])
    prior = tuned(tmp_path / "prior", ["to_q"], negative_prompt="a|b")
    folder = export_posterior(config, prior, tmp_path, Progress(1, 1, config.beta.value))
    card = (folder / "README.md").read_text()
    for file in folder.glob("*.safetensors"):
        assert f"`{file.name}`" in card
    rows = table(card)
    assert "`ddpm`" in rows["sampler"][0]
    assert "*Eta for DDIM* at 1" in rows["sampler"][1]
    assert rows["CFG scale"] == ["3", "3"]
    assert rows["size"] == ["64 x 64", "64 x 64"]
    assert "`a\\|b`" in card
    assert "was not tried inside of them" in card


def test_priors_of_vectors_write_no_such_file(tmp_path: Path) -> None:
    prior = Gaussian([0.0, 0.0])
    prior.attach()
    prior.export(tmp_path, "")
    assert not (tmp_path / KOHYA).exists()
    assert not hasattr(prior, "elsewhere")


def test_with_eta_1_ddim_is_ancestral_euler() -> None:
    """What the card advises: the two draw the same x_s, up to the scale of x, from the same x_t, prediction and noise."""
    betas: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    ddim = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    euler = EulerAncestralDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    for scheduler in (ddim, euler):
        scheduler.set_timesteps(10)
    assert torch.equal(ddim.timesteps, euler.timesteps.long())
    x, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t, s, own in zip(ddim.timesteps[:-1], ddim.timesteps[1:], euler.timesteps[:-1], strict=True):
        scale_t, scale_s = (ddim.alphas_cumprod[i].sqrt() for i in (t, s))
        generator = torch.Generator().manual_seed(7)
        by_ddim = ddim.step(noise, t, x, eta=1.0, generator=generator).prev_sample
        euler.scale_model_input(x, own)
        by_euler = euler.step(noise, own, x / scale_t, generator=generator.manual_seed(7)).prev_sample * scale_s
        torch.testing.assert_close(by_ddim, by_euler, atol=1e-4, rtol=1e-4)
        x = by_ddim
