"""The Stable Diffusion prior on tiny real pipelines: stock samples, exact prior with adapters off, early refusals."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from diffusers.models.attention_processor import Attention
from huggingface_hub import constants
from torch import Tensor

from diffusion_rtb.chain.rollout import replay_backward, rollout, score
from diffusion_rtb.config.components import describe
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.checkpoint import check_compatible
from diffusion_rtb.run.checkpoint_reading import CheckpointError
from diffusion_rtb.run.process_state import load_parameters
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny, tiny_ddpm, tiny_stable_diffusion

PROMPTS = ["a cat emoji", "a dog", "a cat emoji"]
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "seed": 3}
OTHER_TARGETS = [
    "conv_in",
    "conv1",
    "conv_shortcut",
    "time_emb_proj",
    "linear_1",
    "proj_in",
    "ff.net.0.proj",
    "ff.net.2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def load(folder: str, **settings: Any) -> StableDiffusion:
    arguments: dict[str, Any] = {"steps": 4, "device": "cpu"}
    return StableDiffusion(folder, **arguments | settings)


def generators(n: int = len(PROMPTS)) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


def sample(prior: StableDiffusion, prompts: list[str] = PROMPTS, output_type: str = "pt") -> Tensor:
    images: Tensor = prior.pipe(
        **prior.arguments(prompts), generator=generators(len(prompts)), output_type=output_type
    ).images
    return images


def perturb(prior: StableDiffusion) -> None:
    """Stands for training: A and B become anything."""
    for parameter in prior.parameters().values():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))


def test_it_is_a_prior(folder: str) -> None:
    prior = load(folder)
    assert isinstance(prior, Prior)
    assert prior.dims == (4, 8, 8)
    assert prior.device == torch.device("cpu")
    assert type(prior.pipe).__name__ == "StableDiffusionPipeline"
    assert prior.parameters() == {}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_samples_are_those_of_the_stock_pipeline(tmp_path: Path, guidance: float, prediction_type: Any) -> None:
    prior = load(str(save_tiny(tmp_path, prediction_type)), guidance=guidance)
    stock = tiny_stable_diffusion(prediction_type)
    expected = stock(
        PROMPTS, guidance_scale=guidance, num_inference_steps=4, eta=1.0, generator=generators(), output_type="pt"
    ).images
    assert torch.equal(sample(prior), expected)


def test_negative_prompt_and_size_are_those_of_the_stock_pipeline(folder: str) -> None:
    prior = load(folder, guidance=3.0, negative_prompt="blurry", height=32, width=48)
    assert prior.dims == (4, 4, 6)
    call: dict[str, Any] = {"num_inference_steps": 4, "eta": 1.0, "generator": generators(), "output_type": "pt"}
    expected = tiny_stable_diffusion()(
        PROMPTS, negative_prompt=["blurry"] * 3, guidance_scale=3.0, height=32, width=48, **call
    ).images
    assert torch.equal(sample(prior), expected)


@pytest.mark.parametrize(
    ("scheduler", "arguments"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
        ("LCMScheduler", {}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_stochastic_schedulers_by_name(folder: str, scheduler: str, arguments: dict[str, Any]) -> None:
    prior = load(folder, scheduler=scheduler, scheduler_arguments=arguments)
    assert type(prior.pipe.scheduler).__name__ == scheduler
    assert arguments.items() <= prior.pipe.scheduler.config.items()
    assert torch.equal(prior.pipe.scheduler.betas, tiny_stable_diffusion().scheduler.betas)
    assert ("eta" in prior.arguments(PROMPTS)) is (scheduler == "DDIMScheduler")
    assert sample(prior).isfinite().all()


def test_default_sampler_is_ddim_on_the_pipelines_own_schedule(tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion()
    betas = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, **betas)  # says nothing about clip_sample, as old models do
    pipe.save_pretrained(tmp_path)
    scheduler = load(str(tmp_path)).pipe.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.clip_sample is False
    assert scheduler.config.steps_offset == 1
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.cumprod(1 - torch.linspace(0.001, 0.02, 1000), 0))


def test_text_encoder_sees_each_prompt_once(folder: str) -> None:
    prior = load(folder, guidance=2.0)
    seen: list[int] = []
    prior.pipe.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    first = prior.arguments(PROMPTS)["prompt_embeds"]
    assert len(seen) == 3  # two prompts and the negative one
    again = prior.arguments(PROMPTS[::-1])["prompt_embeds"]
    prior.features(PROMPTS)
    assert len(seen) == 3
    assert torch.equal(first[1], again[1])
    assert not first.requires_grad


def test_features_are_mean_token_embeddings(folder: str) -> None:
    tiny = tiny_stable_diffusion()
    embedded = tiny.encode_prompt("a dog", torch.device("cpu"), 1, False)[0].detach()
    torch.testing.assert_close(load(folder).features(["a dog"]), embedded.mean(1))


@pytest.mark.parametrize("decode_batch", [2, 8])
def test_decode_is_the_pipelines_own_output(folder: str, decode_batch: int) -> None:
    prior = load(folder, decode_batch=decode_batch)
    images = prior.decode(sample(prior, output_type="latent"))
    torch.testing.assert_close(images, sample(prior), atol=1e-6, rtol=0)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert images.min() >= 0
    assert images.max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_posterior_starts_as_the_prior(folder: str, guidance: float) -> None:
    prior = load(folder, guidance=guidance)
    before = sample(prior)
    prior.attach(**LORA)
    assert torch.equal(sample(prior), before)
    trajectory = rollout(prior, PROMPTS, range(3))
    with prior.as_prior():
        log_p = score(prior, PROMPTS, trajectory)
    assert torch.equal(trajectory.log_prob, log_p)  # KL 0, exactly


@pytest.mark.parametrize("targets", [LORA["target_modules"], OTHER_TARGETS])
def test_adapters_off_is_the_prior_bit_for_bit(folder: str, targets: list[str]) -> None:
    prior = load(folder, guidance=2.0)
    before = sample(prior)
    prior.attach(**LORA | {"target_modules": targets})
    perturb(prior)
    after = sample(prior)
    assert not torch.allclose(after, before, atol=1e-3)
    with prior.as_prior():
        assert torch.equal(sample(prior), before)
    assert torch.equal(sample(prior), after)


def test_as_prior_nests_and_survives_exceptions(folder: str) -> None:
    prior = load(folder)
    with prior.as_prior():  # nothing attached yet
        before = sample(prior)
    prior.attach(**LORA)
    perturb(prior)
    after = sample(prior)
    with pytest.raises(KeyError), prior.as_prior(), prior.as_prior():
        raise KeyError
    assert torch.equal(sample(prior), after)
    with prior.as_prior():
        with prior.as_prior():
            pass
        assert torch.equal(sample(prior), before)
    assert all(parameter.requires_grad for parameter in prior.parameters().values())


def test_only_adapters_are_trainable(folder: str) -> None:
    prior = load(folder, dtype="bfloat16")
    prior.attach(**LORA)
    networks = [prior.pipe.unet, prior.pipe.vae, prior.pipe.text_encoder]
    trainable = [p for network in networks for p in network.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in prior.parameters().values()}
    attention = [module for module in prior.pipe.unet.modules() if isinstance(module, Attention)]
    assert len(trainable) == 2 * 4 * len(attention)
    assert {p.dtype for p in trainable} == {torch.float32}
    assert prior.pipe.unet.dtype == prior.pipe.vae.dtype == torch.bfloat16
    assert not any(network.training for network in networks)
    assert prior.decode(sample(prior, output_type="latent")).dtype == torch.float32


def test_gradients_reach_every_adapter_and_nothing_else(folder: str) -> None:
    prior = load(folder, guidance=2.0)
    prior.attach(**LORA | {"target_modules": [*LORA["target_modules"], "conv1", "time_emb_proj"]})
    trajectory = rollout(prior, PROMPTS, range(3))
    replay_backward(prior.pipe, trajectory, torch.ones(3, 4), **prior.arguments(PROMPTS))
    for name, parameter in prior.parameters().items():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()) is (".lora_B." in name)  # A moves once B has left 0
    assert all(p.grad is None for p in prior.pipe.unet.parameters() if not p.requires_grad)


def test_attach_depends_on_its_seed_alone(folder: str) -> None:
    states = []
    for seed in (3, 3, 4):
        torch.rand(7)
        prior, rng = load(folder), torch.get_rng_state()
        prior.attach(**LORA | {"seed": seed})
        assert torch.equal(torch.get_rng_state(), rng)
        states.append(torch.cat([value.detach().flatten() for value in prior.parameters().values()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_lora_is_a_low_rank_change_of_the_weights(folder: str) -> None:
    prior = load(folder)
    prior.attach(**LORA)
    perturb(prior)
    merged = tiny_stable_diffusion()
    weights = dict(merged.unet.named_parameters())
    state = prior.parameters()
    for name in [name for name in state if ".lora_A." in name]:
        A, B = state[name], state[name.replace("lora_A", "lora_B")]
        weights[name.replace(".lora_A.default", "")].data += LORA["alpha"] / LORA["rank"] * (B @ A).detach()
    expected = merged(
        PROMPTS, guidance_scale=1.0, num_inference_steps=4, eta=1.0, generator=generators(), output_type="pt"
    ).images
    torch.testing.assert_close(sample(prior), expected, atol=1e-5, rtol=0)


def test_parameters_round_trip(folder: str) -> None:
    first, second = load(folder), load(folder)
    first.attach(**LORA)
    perturb(first)
    second.attach(**LORA | {"seed": 9})
    load_parameters(second, first.parameters())
    assert torch.equal(sample(first), sample(second))


def test_foreign_adapters_are_refused_and_change_nothing(folder: str) -> None:
    prior = load(folder)
    prior.attach(**LORA)
    before = {name: parameter.detach().clone() for name, parameter in prior.parameters().items()}
    wider = load(folder)
    wider.attach(**LORA | {"rank": 5})
    fewer = dict(list(before.items())[:-1])
    foreign: list[tuple[Mapping[str, Tensor], str]] = [
        (wider.parameters(), f"{len(before)} parameters differ"),
        (fewer, "1 parameters differ"),
        ({}, f"{len(before)} parameters differ"),
    ]
    for state, message in foreign:
        with pytest.raises(ValueError, match=message):
            load_parameters(prior, state)
    assert all(torch.equal(value, before[name]) for name, value in prior.parameters().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": ["to_w"]}, "'to_w' matches nothing .* to_v"),
        ({"target_modules": ["norm1"]}, "neither linear nor"),
        ({"target_modules": []}, "empty"),
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
    ],
)
def test_impossible_adapters_are_refused(folder: str, change: dict[str, Any], message: str) -> None:
    prior = load(folder)
    with pytest.raises(ValueError, match=message):
        prior.attach(**LORA | change)
    assert prior.parameters() == {}
    prior.attach(**LORA)
    with pytest.raises(ValueError, match="already"):
        prior.attach(**LORA)


def test_fingerprint_survives_json_and_names_what_differs(folder: str, tmp_path: Path) -> None:
    def fingerprint(path: str = folder, lora: dict[str, Any] = LORA, **settings: Any) -> dict[str, Any]:
        prior = load(path, **settings)
        prior.attach(**lora)
        found: dict[str, Any] = json.loads(json.dumps(prior.fingerprint()))
        return found

    own = fingerprint(guidance=2.0)
    check_compatible(own, fingerprint(str(shutil.copytree(folder, tmp_path / "moved")), guidance=2.0))
    beta = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    other = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    assert own["sampler"]["settings"] == beta | other
    reweighted = str(save_tiny(tmp_path / "other", seed=1))
    for now, named in [
        (fingerprint(), 'guidance.tilted_prior: "guided" in the checkpoint, "unguided" now'),
        (
            fingerprint(guidance=2.0, negative_prompt="blurry"),
            'guidance.negative_prompt: "" in the checkpoint, "blurry"',
        ),
        (fingerprint(reweighted, guidance=2.0), "weights: "),
        (fingerprint(lora=LORA | {"rank": 5}, guidance=2.0), "adapter.rank: 4 in the checkpoint, 5 now"),
        (fingerprint(guidance=2.0, height=32, width=32), "dims"),
        (fingerprint(guidance=2.0, steps=5), "sampler.steps: 4 in the checkpoint, 5 now"),
    ]:
        with pytest.raises(CheckpointError, match=re.escape(named)):
            check_compatible(own, now)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 1.5}, r"eta=1\.5 is outside"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 3, "timesteps": [9, 5]}, r"steps=3, but there are 2 timesteps"),
        ({"timesteps": []}, r"0 timesteps"),
        ({"guidance": 0.5}, r"guidance=0\.5"),
        ({"guidance": 5.0, "tilted_prior": "unguided"}, r"set guidance=1\.0"),
        ({"guidance": 1.0, "tilted_prior": "guided"}, "set guidance above 1"),
        ({"tilted_prior": "both"}, "'tilted_prior': got 'both'"),
        ({"negative_prompt": "blurry"}, "no effect at guidance=1"),
        ({"scheduler": "DDIMSheduler"}, "did you mean DDIMScheduler"),
        ({"dtype": "float64"}, "'float32', 'float16' or 'bfloat16'"),
        ({"height": 64}, "give both"),
        ({"height": 60, "width": 64}, "multiples of 8"),
        ({"device": "gpu"}, "not a torch device"),
        ({}, "not a folder, not a bundled prior .emoji, emoji_flow, fashion. and not a hub id"),
    ],
)
def test_bad_settings_are_refused_before_any_file_is_read(settings: dict[str, Any], message: str) -> None:
    # The path does not exist, and only the last case may complain about that.
    with pytest.raises(ValueError, match=message):
        describe({"component": "stable_diffusion", "path": "no-such-folder", **settings}, "prior")


def test_the_constructor_checks_too() -> None:
    with pytest.raises(ValueError, match=r"eta=1\.5"):
        StableDiffusion("no-such-folder", eta=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheduler_arguments": {"timesteps_spacing": "trailing"}}, "Did you mean 'timestep_spacing'"),
        ({"scheduler": "DDPMScheduler", "eta": 0.5}, "DDPMScheduler has no eta"),
        ({"steps": 2000}, "0 to 999"),
        ({"steps": None, "timesteps": [900, 500]}, r"DDIMScheduler takes no timesteps.*DDPMScheduler"),
        ({"steps": None, "timesteps": [900, 900], "scheduler": "DDPMScheduler"}, "must fall from at most 999"),
        ({"steps": None, "timesteps": [1000, 900], "scheduler": "DDPMScheduler"}, "must fall from at most 999"),
    ],
)
def test_bad_samplers_are_refused_before_weights_are_loaded(
    folder: str, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", loads)
    with pytest.raises(ValueError, match=message):
        load(folder, **settings)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"scheduler": "EulerDiscreteScheduler"},
            r"EulerDiscreteScheduler draws no noise.*DDIMScheduler \(with eta 1\.0\)",
        ),
        ({"scheduler": "DPMSolverMultistepScheduler"}, "sde-dpmsolver"),
        ({"eta": 0.0}, r"eta=0 .*Set eta=1\.0"),
        ({}, "^$"),
    ],
)
def test_a_sampler_says_why_it_has_no_density(folder: str, settings: dict[str, Any], why: str) -> None:
    said = load(folder, **settings).why_no_noise
    assert said is not None
    assert re.search(why, said)


def test_eta_below_one_warns(folder: str) -> None:
    with pytest.warns(UserWarning, match="memoryless"):
        load(folder, eta=0.5)


def test_damaged_folders_are_refused_by_name(folder: str, tmp_path: Path) -> None:
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    truncated = Path(shutil.copytree(folder, tmp_path / "truncated"))
    whole = (truncated / weights).read_bytes()
    for length in (len(whole) // 2, 4, 0):
        (truncated / weights).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{weights} is truncated or damaged"):
            load(str(truncated))
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    (lacking / weights).unlink()
    (lacking / weights.with_suffix(".bin")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"No weights in .*unet.*pickles"):
        load(str(lacking))
    (lacking / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ValueError, match="scheduler_config"):
        load(str(lacking))
    (lacking / "model_index.json").unlink()
    with pytest.raises(ValueError, match="model_index"):
        load(str(lacking))
    tiny_ddpm().save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="DDPMPipeline; this prior needs a StableDiffusionPipeline"):
        load(str(tmp_path / "ddpm"))


def test_half_precision_files_are_found(folder: str, tmp_path: Path) -> None:
    tiny_stable_diffusion().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    prior = load(str(tmp_path))
    assert prior.pipe.unet.dtype == prior.pipe.text_encoder.dtype == torch.float32
    torch.testing.assert_close(sample(prior), sample(load(folder)), atol=0.02, rtol=0)


def test_hub_ids_come_from_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit, cached = "a" * 40, tmp_path / "models--someone--tiny"
    save_tiny(cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    prior = load("someone/tiny")
    assert prior.base_model == "someone/tiny"
    assert prior.dims == (4, 8, 8)
    StableDiffusion(path="someone/else")  # a hub id is not looked up before the run starts
    with pytest.raises(OSError, match=r"someone/else.*local folder"):
        load("someone/else").load_weights()
