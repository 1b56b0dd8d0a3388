"""Published architectures with random weights: their sizes are the published ones, and the engine runs on them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.benchmark.iteration import measure_iteration
from diffusion_rtb.benchmark.plan import Model, Part
from diffusion_rtb.benchmark.subject import Subject
from diffusion_rtb.chain.rollout import rollout, score
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.training.assemble import assemble
from pipelines._models.random_weights import ARCHITECTURES, random_folder
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.architecture import save_architecture

PUBLISHED = {
    # Elements of the published weight files: 3.44 GB of float32; 5.14 GB of float16; 4.94 GB of bfloat16, of which the table of
    # positions, 384² places of 1536 numbers, is no parameter; 23.8 GB of bfloat16.
    "sd15": ("unet", 859_520_964),
    "sdxl": ("unet", 2_567_463_684),
    "sd35_medium": ("transformer", 2_469_663_936),
    "flux1_dev": ("transformer", 11_901_408_320),
}
VAE = {4: 83_653_863, 16: 83_819_683}
"""By latent channels; the 16-channel ones have no 1x1 convolutions around the latents."""


def _elements(architecture: str, part: str) -> int:
    import diffusers

    config = json.loads((ARCHITECTURES / architecture / part / "config.json").read_text())
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"]).from_config(config)
    return sum(value.numel() for value in network.state_dict().values())


def test_every_architecture_has_a_published_size() -> None:
    assert {folder.name for folder in ARCHITECTURES.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_an_architecture_has_as_many_weights_as_the_published_one(architecture: str) -> None:
    network, elements = PUBLISHED[architecture]
    assert _elements(architecture, network) == elements
    channels = json.loads((ARCHITECTURES / architecture / "vae" / "config.json").read_text())["latent_channels"]
    assert _elements(architecture, "vae") == VAE[channels]


@pytest.fixture(scope="module")
def tiny_architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_architecture(tmp_path_factory.mktemp("tiny"))


def _prior(folder: Path, **settings: Any) -> StableDiffusion:
    return StableDiffusion(f"random:{folder}", steps=2, device="cpu", **settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_made_in_their_dtype_and_replayed_exactly(tiny_architecture: Path, dtype: Any) -> None:
    before = torch.get_default_dtype()
    prior = _prior(tiny_architecture, dtype=dtype, guidance=2.0)
    assert {str(parameter.dtype) for parameter in prior.network.parameters()} == {f"torch.{dtype}"}
    assert torch.get_default_dtype() == before
    prior.attach(rank=2)
    trajectory = rollout(prior, ["a cat", "a dog"], [0, 1])
    assert torch.equal(score(prior, ["a cat", "a dog"], trajectory), trajectory.log_prob)
    assert prior.decode(trajectory.x_0).shape == (2, 3, 64, 64)


def test_weights_and_embeddings_are_the_same_every_time(tiny_architecture: Path) -> None:
    first, second = _prior(tiny_architecture), _prior(tiny_architecture)
    state = torch.get_rng_state()
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
    assert torch.equal(state, torch.get_rng_state())
    embedded = first.arguments(["a cat", "a dog", "a cat"])["prompt_embeds"]
    assert torch.equal(embedded[0], embedded[2])
    assert not torch.equal(embedded[0], embedded[1])
    assert torch.equal(embedded[:1], second.arguments(["a cat"])["prompt_embeds"])


WIDTHS = {"sd15": (768, None), "sdxl": (2048, 2816 - 6 * 256), "sd35_medium": (4096, 2048), "flux1_dev": (4096, 768)}
"""Of a token's embedding, and of the pooled one: what the networks' configs say."""


@pytest.mark.parametrize("architecture", WIDTHS)
def test_embeddings_are_as_wide_as_the_network_reads_them(architecture: str) -> None:
    folder = ARCHITECTURES / architecture
    config = json.loads((folder / PUBLISHED[architecture][0] / "config.json").read_text())
    shapes = json.loads((folder / "embeddings.json").read_text())
    tokens, pooled = WIDTHS[architecture]
    assert shapes["prompt_embeds"][-1] == tokens == config.get("cross_attention_dim", config.get("joint_attention_dim"))
    assert shapes.get("pooled_prompt_embeds", [None])[-1] == pooled
    assert pooled in (None, 1280, config.get("pooled_projection_dim"))


TEXT_4 = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
ANSWERS = {
    "stable_diffusion_xl": TEXT_4,
    "stable_diffusion_3": TEXT_4,
    "flux": ("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
}


@pytest.mark.parametrize("family", ANSWERS)
def test_an_iteration_runs_on_random_weights_of_every_family_that_is_published(family: str, tmp_path: Path) -> None:
    """The benchmark's own, on the family's tiny pipeline: the chain, log p, the gradient, the decoder."""
    oracle = importlib.import_module(f"tests.oracles.families.{family}")
    folder = save_architecture(tmp_path / family, oracle.build(), ANSWERS[family])
    prior = {"component": family, "path": f"random:{folder}"} | getattr(oracle, "SETTINGS", {})
    row = {"prior": prior, "steps": 2, "batches": [1], "iterations": [], "dtypes": ["float32"], "compile": 1.0}
    part = Part("iteration", "float32", family, 2, 2, Model.model_validate(row))
    subject = Subject(part, "cpu")
    found = measure_iteration(subject, part, None)
    assert found["parity"] == 0
    assert found["trajectories"] == 2
    assert found["flop"] > 2 * 2 * 3  # at least something in every pass
    assert all(parameter.grad is None for parameter in subject.prior.parameters().values())


def test_a_run_trains_random_weights_and_its_prompts_are_read(tiny_architecture: Path, tmp_path: Path) -> None:
    config = {
        "name": "tiny",
        "out": str(tmp_path),
        "prior": {"component": "stable_diffusion", "path": f"random:{tiny_architecture}", "steps": 2, "device": "cpu"},
        "reward": {"component": "brightness"},
        "beta": 1.0,
        "prompts": {"list": ["a cat"]},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 2, "micro_batch": 2, "grid_every": 0},
    }
    assemble(RunConfig.model_validate(config)).fit()
    assert '"parity": 0.0' in (tmp_path / "tiny" / "metrics.jsonl").read_text()


def test_random_weights_have_no_files(tiny_architecture: Path) -> None:
    assert _prior(tiny_architecture).weight_files() == {}


def test_an_unknown_architecture_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="random:sd35_medium, random:sdxl"):
        random_folder("random:sd14")


def test_an_architecture_of_another_family_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="holds a FluxPipeline; this prior needs a StableDiffusionPipeline"):
        StableDiffusion("random:flux1_dev", device="cpu")
