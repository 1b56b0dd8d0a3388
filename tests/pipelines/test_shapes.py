"""Parts that do not fit each other are refused from their config files; NaN is named where it arises."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build
from diffusion_rtb.config.load import ConfigError, RunConfig, load_config
from diffusion_rtb.sampling.images import draw_images
from diffusion_rtb.sampling.sampler import DecodingError, decoded
from diffusion_rtb.training.chain_checks import check_configured_steps
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.pixel import PixelPrior
from tests.oracles.tiny import WIDTH, save_tiny, tiny_unet

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "tiny")


def unet_with(**changes: Any) -> UNet2DConditionModel:
    own = {key: value for key, value in tiny_unet().config.items() if not key.startswith("_")}
    return UNet2DConditionModel(**own | changes)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"in_channels": 9}, "in_channels is 9, and the VAE's latents have 4: it fills in pictures"),
        ({"in_channels": 8}, "in_channels is 8.*it edits pictures"),
        ({"in_channels": 16, "out_channels": 16}, "in_channels is 16.*something beside the noise"),
        ({"out_channels": 8}, "out_channels is 8.*it predicts a variance besides"),
        ({"cross_attention_dim": 2 * WIDTH}, f"cross_attention_dim is {2 * WIDTH}.*embeddings have {WIDTH} numbers"),
        ({"encoder_hid_dim": 24, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim is 24"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep', so this UNet wants a class label"),
        ({"num_class_embeds": 10}, "num_class_embeds is 10"),
        ({"addition_embed_type": "text"}, "addition_embed_type is 'text'"),
    ],
)
def test_other_networks_are_refused_before_loading(
    folder: Path, changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real networks of these shapes, saved by diffusers; the stock pipeline fails on them when it samples."""
    unet_with(**changes).save_pretrained(folder / "unet")
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=expected):
        StableDiffusion(str(folder), steps=2, device="cpu")


def test_what_fits_is_taken(folder: Path) -> None:
    assert StableDiffusion(str(folder), steps=2, device="cpu").dims == (4, 8, 8)
    hidden = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 24}
    unet_with(**hidden).save_pretrained(folder / "unet")
    images = draw_images(StableDiffusion(str(folder), steps=2, device="cpu"), ["a cat"], 1)
    assert images.isfinite().all()


class Brittle(PixelPrior):
    """A prior whose decoder makes what its weights make of x_0."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def decode(self, x_0: Tensor) -> Tensor:
        return x_0 * self.factor


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_named_where_it_arises(bad: float) -> None:
    x = torch.ones(3, 4, 2, 2)
    prior = Brittle(2.0)
    assert torch.equal(decoded(prior, x), 2 * x)
    with pytest.raises(DecodingError, match=r"Sample 0 is finite.*Brittle's decoder"):
        decoded(Brittle(bad), x)
    x[1, 0, 0, 0] = bad
    with pytest.raises(DecodingError, match="x_0 of sample 1 is not finite: the prior's network"):
        decoded(prior, x)


def test_the_vae_is_blamed_and_not_the_reward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VAE whose numbers are finite and too large for its precision, as half-precision ones are."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "tiny")
    file = tmp_path / "tiny" / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {k: v * 1e30 if k.startswith("decoder") else v for k, v in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    config = {
        "prior": {"component": "stable_diffusion", "path": "tiny", "steps": 2},
        "reward": {"component": "brightness"},
        "beta": 1.0,
        "prompts": {"list": ["a cat"]},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 2, "micro_batch": 2},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    for argv in (["train", "c.yaml"], ["sample", "c.yaml", "--prior", "-n", "1"]):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 1
        said = capsys.readouterr().err
        assert (
            "StableDiffusion's decoder (the VAE of a latent model) made NaN or infinity, before the reward saw it"
            in said
        )


def small(**train: Any) -> RunConfig:
    return load_config(QUICKSTART, [f"train.{key}={json.dumps(value)}" for key, value in train.items()])


@pytest.mark.parametrize("weights", [[1.0], [1.0] * 200])
def test_step_weights_of_another_length_are_seen_by_the_config(
    weights: Sequence[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["config", str(QUICKSTART), f"train.step_weights={weights}"])
    assert left.value.code == 1
    assert f"train.step_weights has {len(weights)} entries, the prior takes" in capsys.readouterr().err


def test_as_many_step_weights_as_steps_pass() -> None:
    run = load_config(QUICKSTART, ["prior.timesteps=null", "prior.steps=4", "train.step_weights=[1, 2, 3, 4]"])
    check_configured_steps(run, build({"component": "rtb"}, "objective"))
    with pytest.raises(ValueError, match="length"):
        check_configured_steps(run, build({"component": "trust_pcl", "length": 3}, "objective"))


def test_missing_trackers_are_seen_by_the_config(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("trackio") is not None:
        monkeypatch.setattr("diffusion_rtb.training.tracker.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as left:
        main(["config", str(QUICKSTART), "train.tracker=[trackio]"])
    assert left.value.code == 1
    assert "pip install 'diffusion-rtb[trackio]'" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**64, 2**70, -1])
def test_seeds_that_torch_does_not_take_are_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed: got"):
        load_config(QUICKSTART, [f"seed={seed}"])
    assert load_config(QUICKSTART, [f"seed={2**64 - 1}"]).seed == 2**64 - 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.batch_size", "train.micro_batch what is in memory"),
        ("train.learning_rate", "train.lr"),
        ("train.num_epochs", "train.iterations"),
        ("lora_rank", "posterior.rank"),
        ("kl_weight", "beta is its inverse"),
        ("train.mixed_precision", "prior.dtype"),
        ("train.grup", "Did you mean 'train.group'"),
    ],
)
def test_names_of_other_trainers_are_translated(key: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: there is no such key.*{expected}"):
        load_config(QUICKSTART, [f"{key}=1"])


def test_every_translation_names_keys_that_exist() -> None:
    from diffusion_rtb.config.load import ELSEWHERE, field_types

    known = {key for key, _, _ in field_types()} | {"prior.dtype", "prior.path", "prior.steps", "prior.guidance"}
    known |= {"posterior.rank", "posterior.alpha"}
    for text in ELSEWHERE.values():
        keys = {word.strip(",.:") for word in text.split() if "." in word.strip(",.:")}
        assert keys <= known, text


def gaussian(folder: Path, reward: str) -> Path:
    (folder / "flat_reward.py").write_text(
        "def flat(images, prompts):\n    return images.new_full((len(images),), 0.25)\n"
    )
    config = {
        "prior": {"component": "gaussian", "steps": 3, "mean": [0.0, 0.0], "covariance": [[1.0, 0.0], [0.0, 1.0]]},
        "reward": {"component": reward},
        "beta": 1.0,
        "prompts": {"list": [""]},
        "train": {"iterations": 3, "prompts_per_iteration": 1, "group": 4, "micro_batch": 4, "grid_every": 0},
    }
    (folder / "c.yaml").write_text(json.dumps(config))
    return folder / "c.yaml"


def test_a_constant_reward_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["train", str(gaussian(tmp_path, "flat_reward:flat"))])
    assert not left.value.code
    assert capsys.readouterr().err.count("Every reward of iteration 0 is 0.25: it tells no sample from another") == 1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed ('true' in ACCELERATE_USE_DEEPSPEED) cannot be used"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "It came from accelerate's launch settings"),
    ],
)
def test_launch_settings_that_fail_are_named(settings: dict[str, str], said: str, tmp_path: Path) -> None:
    """In a process of its own: accelerate sets itself up once."""
    command = [sys.executable, str(QUICKSTART.parents[1] / "train.py"), str(gaussian(tmp_path, "flat_reward:flat"))]
    environment = {k: v for k, v in os.environ.items() if k not in {"MASTER_ADDR", "MASTER_PORT"}}
    environment |= {"ACCELERATE_USE_CPU": "true", **settings}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("*"))
