"""What users put into a published model: another autoencoder, a LoRA below the trained one, tokens of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from diffusion_rtb.chain.rollout import rollout
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.checkpoint import check_compatible
from diffusion_rtb.run.checkpoint_reading import CheckpointError, read_latest
from diffusion_rtb.run.export import export_posterior
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.training.assemble import assemble
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import WIDTH, save_tiny, tiny_vae

TOKEN = "<cat-toy>"
CALL = {"num_inference_steps": 3, "eta": 1.0, "guidance_scale": 1.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it a LoRA, an embedding and an autoencoder for it."""
    root = tmp_path_factory.mktemp("additions")
    save_tiny(root / "model")
    pipe = StableDiffusionPipeline.from_pretrained(root / "model")
    write_lora(pipe, root / "lora")
    torch.manual_seed(1)
    save_file({TOKEN: 3 * torch.randn(2, WIDTH)}, root / "token.safetensors")
    tiny_vae().save_pretrained(root / "vae")
    return root


def write_lora(pipe: Any, folder: Path) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(pipe.unet)
    type(pipe).save_lora_weights(folder, unet_lora_layers=layers)


def stock(places: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(places / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, scheduler: Any, prompt: str = "a cat") -> torch.Tensor:
    pipe.scheduler = scheduler
    latents: torch.Tensor = pipe(prompt, generator=torch.Generator().manual_seed(0), **CALL).images
    return latents


def test_a_lora_stays_below_the_trained_one(places: Path) -> None:
    prior = StableDiffusion(str(places / "model"), steps=3, device="cpu", lora=str(places / "lora"), lora_scale=0.5)
    ours, plain = drawn(prior.pipe, prior.pipe.scheduler), drawn(stock(places), prior.pipe.scheduler)
    merged = stock(places)
    merged.load_lora_weights(places / "lora")
    merged.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(ours, drawn(merged, prior.pipe.scheduler), rtol=1e-5, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3
    before = prior.fingerprint()["weights"]
    assert before != StableDiffusion(str(places / "model"), device="cpu").fingerprint()["weights"]
    prior.attach(rank=2)
    assert all(".lora_" in name for name in prior.parameters())
    assert not any(p.requires_grad for n, p in prior.network.named_parameters() if n not in prior.parameters())


def test_a_run_on_top_of_a_lora(places: Path, tmp_path: Path, shapes_unchecked: None) -> None:
    """The posterior starts as the base with the LoRA, the run loads both again, says both, and refuses another strength of it."""
    prior = {"component": "stable_diffusion", "path": str(places / "model"), "steps": 2, "device": "cpu"}
    below = {"lora": str(places / "lora"), "lora_scale": 0.5}
    sizes = {"iterations": 1, "prompts_per_iteration": 1, "group": 2, "micro_batch": 2, "grid_every": 0, "lr": 0.05}
    run = {
        "name": "tiny",
        "out": str(tmp_path),
        "prior": prior | below,
        "reward": {"component": "brightness"},
        "beta": 1.0,
    }
    trainer = assemble(RunConfig.model_validate(run | {"prompts": {"list": ["a"]}, "train": sizes}))
    merged = build(prior | below, "prior")
    base = build(prior, "prior")
    start, wanted, other = (rollout(made, ["a"], [3]).x_0 for made in (trainer.prior, merged, base))
    assert torch.equal(start, wanted)
    assert not torch.equal(start, other)
    trainer.fit()
    trained = rollout(trainer.prior, ["a"], [3]).x_0
    again = open_trained_run(tmp_path / "tiny").prior()
    assert torch.equal(rollout(again, ["a"], [3]).x_0, trained)
    assert not torch.equal(trained, start)
    with again.as_prior():
        assert torch.equal(rollout(again, ["a"], [3]).x_0, wanted)
    config = trainer.config
    card = export_posterior(config, again, trainer.folder, trainer.progress) / "README.md"
    assert "fuse_lora(lora_scale=0.5)" in card.read_text()
    stronger = build(prior | below | {"lora_scale": 0.6}, "prior")
    stronger.attach(**config.posterior)
    held = read_latest(trainer.folder / "checkpoints")
    assert held is not None
    with pytest.raises(CheckpointError, match="weights"):
        check_compatible(held.state["prior"], stronger.fingerprint())


def test_the_snippet_adds_them_again(places: Path, tmp_path: Path) -> None:
    prior = StableDiffusion(
        str(places / "model"),
        steps=2,
        device="cpu",
        lora=str(places / "lora"),
        vae=str(places / "vae"),
        textual_inversions={TOKEN: str(places / "token.safetensors")},
    )
    prior.attach(rank=2)
    with torch.no_grad():
        for parameter in prior.parameters().values():
            parameter.add_(0.1)
    (tmp_path / "out").mkdir()
    prior.export(tmp_path / "out", "a card")
    images = prior.pipe(f"a {TOKEN}", generator=torch.Generator().manual_seed(0), **prior.settings()).images
    images[0].save(tmp_path / "ours.png")
    code = prior.snippet(folder=str(tmp_path / "out"), prompt=f"a {TOKEN}")
    code += f"\nimage.save({str(tmp_path / 'theirs.png')!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    assert (tmp_path / "ours.png").read_bytes() == (tmp_path / "theirs.png").read_bytes()


def test_tokens_of_ones_own_are_read(places: Path) -> None:
    prior = StableDiffusion(
        str(places / "model"), device="cpu", textual_inversions={TOKEN: str(places / "token.safetensors")}
    )
    pipe = stock(places)
    pipe.load_textual_inversion(str(places / "token.safetensors"), token=TOKEN)
    theirs, _ = pipe.encode_prompt(f"a {TOKEN}", "cpu", 1, False)
    torch.testing.assert_close(prior.arguments([f"a {TOKEN}"])["prompt_embeds"], theirs, rtol=0, atol=0)
    unknown, _ = stock(places).encode_prompt(f"a {TOKEN}", "cpu", 1, False)
    assert not torch.allclose(theirs, unknown)


def test_another_autoencoder_decodes(places: Path) -> None:
    prior = StableDiffusion(str(places / "model"), device="cpu", vae=str(places / "vae"))
    own = StableDiffusion(str(places / "model"), device="cpu")
    x_0 = torch.randn(1, *prior.dims, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(prior.decode(x_0), own.decode(x_0))
    assert own.fingerprint()["weights"] != prior.fingerprint()["weights"]


@pytest.fixture(scope="module")
def wrong(places: Path) -> dict[str, Any]:
    """Settings that cannot be meant."""
    save_file({"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 40)},
              places / "other.safetensors")  # fmt: skip
    save_file({"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.zeros(2, 40)},
              places / "kohya.safetensors")  # fmt: skip
    save_file({"weight": torch.zeros(2)}, places / "none.safetensors")
    save_file({TOKEN: torch.zeros(768)}, places / "wide.safetensors")
    (places / "token.pt").write_bytes(b"pickle")
    tiny_vae().save_pretrained(places / "eight")
    config = (places / "eight" / "config.json").read_text()
    (places / "eight" / "config.json").write_text(config.replace('"latent_channels": 4', '"latent_channels": 16'))
    return {
        "another base": {"lora": places / "other.safetensors"},
        "another base, kohya": {"lora": places / "kohya.safetensors"},
        "no LoRA": {"lora": places / "none.safetensors"},
        "no file": {"lora": places / "nothing"},
        "scale alone": {"lora_scale": 0.5},
        "wide token": {"textual_inversions": {TOKEN: places / "wide.safetensors"}},
        "pickle": {"textual_inversions": {TOKEN: places / "token.pt"}},
        "vae channels": {"vae": places / "eight"},
        "no vae": {"vae": places / "model"},
    }


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another base", "another base model.*takes 40 numbers, this model's 16"),
        ("another base, kohya", "another base model.*takes 40"),
        ("no LoRA", "holds no LoRA"),
        ("no file", "there is no LoRA at"),
        ("scale alone", "no effect without a lora"),
        ("wide token", "has 768 numbers, and the text encoders of this model 16"),
        ("pickle", "pickles and never read"),
        ("vae channels", "latents of 16 channels, this model of 4"),
        ("no vae", "holds no config.json"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_weights_load(
    places: Path, wrong: dict[str, Any], case: str, message: str
) -> None:
    settings: Any = {
        key: {token: str(file) for token, file in value.items()} if isinstance(value, dict) else
        str(value) if isinstance(value, Path) else value
        for key, value in wrong[case].items()
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        StableDiffusion(str(places / "model"), device="cpu", **settings)
