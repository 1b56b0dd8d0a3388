"""Full fine-tuning of a denoiser: two networks in one, whose numbers are those of two networks apart."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Normal

from diffusion_rtb.chain.rollout import replay_backward, rollout, score
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.run.checks import check_posterior
from pipelines._diffusers.full import add_full, full_parameters, plain_weights, prior_weights
from pipelines._diffusers.lora import ATTENTION
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny, tiny_ddpm

PROMPTS, SEEDS, STEPS = ["a red heart", "a dog"], [0, 1], 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def load(path: str, **settings: Any) -> StableDiffusion:
    given = {"component": "stable_diffusion", "path": path, "steps": STEPS, "device": "cpu"}
    prior: StableDiffusion = build(given | settings, "prior")
    return prior


def move(prior: StableDiffusion, size: float = 0.02) -> None:
    """As training does, off the prior."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def moved(path: str, targets: list[str] | None = None, **settings: Any) -> StableDiffusion:
    prior = load(path, **settings)
    prior.attach(full=True, target_modules=targets)
    move(prior)
    return prior


def gradients(prior: StableDiffusion) -> tuple[Trajectory, dict[str, Tensor]]:
    """Of the sum of log q over two trajectories."""
    drawn = rollout(prior, PROMPTS, SEEDS)
    replay_backward(prior.pipe, drawn, torch.ones(2, STEPS), call=prior.arguments(PROMPTS))
    return drawn, {name: p.grad.clone() for name, p in prior.parameters().items() if p.grad is not None}


# What it computes


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With attention whose inputs lie in memory so that torch multiplies in another order where weights require gradients."""
    folder = tmp_path_factory.mktemp("pixels")
    tiny_ddpm().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "targets"),
    [({"guidance": 2.0}, None), ({"guidance": 2.0, "dtype": "bfloat16"}, ["to_q", "norm1"]), ({}, None)],
    ids=["latents", "some modules in bfloat16", "pixels"],
)
def test_the_posterior_starts_as_the_prior_which_never_moves(
    folder: str, pixels: str, settings: dict[str, Any], targets: list[str] | None
) -> None:
    """To the last bit, with guidance; and the prior inside a posterior that has moved is what it was."""
    own = {} if settings else {"component": "unconditional"}
    prior = load(folder if settings else pixels, **settings, **own)
    before = rollout(prior, PROMPTS, SEEDS)
    prior.attach(full=True, target_modules=targets)
    after = rollout(prior, PROMPTS, SEEDS)
    with prior.as_prior():
        log_p = score(prior, PROMPTS, after)
    assert torch.equal(before.x, after.x)
    assert float((score(prior, PROMPTS, after) - log_p).abs().max()) == 0.0
    assert torch.equal(log_p, before.log_prob)
    move(prior)
    assert not torch.equal(rollout(prior, PROMPTS, SEEDS).x, before.x)
    with prior.as_prior(), prior.as_prior():
        assert torch.equal(rollout(prior, PROMPTS, SEEDS).x, before.x)
        assert torch.equal(score(prior, PROMPTS, after), log_p)


def by_hand(network: nn.Module, prior: StableDiffusion, drawn: Trajectory) -> Tensor:
    """log q of each step by the formulas of DDIM at eta 1 for predicted velocities, of a network that is no prior's."""
    tokens = prior.arguments(PROMPTS)["prompt_embeds"]
    signal = prior.pipe.scheduler.alphas_cumprod.double()
    rows = []
    for i, t in enumerate(drawn.timesteps.long().tolist()):
        a, earlier = signal[t], signal[max(0, t - 1000 // STEPS)]
        x = drawn.x[:, i]
        v = network(x, t, encoder_hidden_states=tokens).sample
        x_0, noise = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
        variance = (1 - earlier) / (1 - a) * (1 - a / earlier)
        mean = earlier.sqrt() * x_0 + (1 - earlier - variance).sqrt() * noise
        rows.append(Normal(mean, variance.sqrt()).log_prob(drawn.x[:, i + 1].double()).flatten(1).sum(1))
    return torch.stack(rows, dim=1)


def test_a_step_on_the_bundled_prior_is_that_of_a_copy_made_by_hand() -> None:
    """Of the modules of a LoRA, by plain gradient ascent: so far that the sum of log q grows by half a nat to first order."""
    prior, targets = load("emoji"), list(ATTENTION)
    network = copy.deepcopy(prior.network).requires_grad_(True)
    prior.attach(full=True, target_modules=targets)
    drawn, found = gradients(prior)
    log_q = by_hand(network, prior, drawn)
    torch.testing.assert_close(drawn.log_prob.double(), log_q, rtol=1e-5, atol=1e-2)
    log_q.sum().backward()
    own = {name: weight for name, weight in network.named_parameters() if _in(name, targets)}
    assert found.keys() == own.keys()
    for name, weight in own.items():
        assert weight.grad is not None
        assert float((found[name] - weight.grad).norm()) <= 1e-4 * float(weight.grad.norm()) + 1e-6
    rate = 0.5 / sum(float(gradient.square().sum()) for gradient in found.values())
    with torch.no_grad():
        for name, weight in own.items():
            weight.add_(rate * weight.grad)
            prior.parameters()[name].add_(rate * found[name])
        grown = by_hand(network, prior, drawn) - log_q
        assert float(grown.sum()) == pytest.approx(0.5, rel=0.1)
        own_growth = score(prior, PROMPTS, drawn) - drawn.log_prob
        torch.testing.assert_close(own_growth.double(), grown, rtol=0, atol=2e-3)


def _in(name: str, targets: list[str]) -> bool:
    return any(f".{target}." in name for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_linear_network_has_its_closed_form(dtype: torch.dtype) -> None:
    """log q = -|y - W x|²/(2·std²) + ..., whose gradient is sum (y - W x) x' / std² at the weight as the network rounds it."""
    network, std = nn.Linear(3, 2, bias=False).to(dtype).requires_grad_(False), 0.5
    start = network.weight.clone()
    add_full(network, None)
    (own,) = full_parameters(network).values()
    assert own.dtype == torch.float32
    with torch.no_grad():
        own.add_(0.1 * torch.randn(2, 3))
    x, y = torch.randn(7, 3).to(dtype), torch.randn(7, 2).to(dtype)
    Normal(network(x).double(), std).log_prob(y.double()).sum().backward()
    W = own.detach().to(dtype)
    error = y.double() - (x @ W.T).double()
    expected = (error.T @ x.double() / std**2).float()
    torch.testing.assert_close(own.grad, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.3)
    with prior_weights(network):
        assert torch.equal(network(x), x @ start.T)
    assert torch.equal(plain_weights(network)["weight"], W)


# Beside the other settings


def test_offload_and_recomputed_activations_give_the_same_gradients(folder: str) -> None:
    plain, expected = gradients(moved(folder))
    drawn, found = gradients(moved(folder, memory={"gradient_checkpointing": True, "offload": "all"}))
    assert torch.equal(drawn.x, plain.x)
    assert found.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_only_what_is_trained_is_held_twice(folder: str) -> None:
    prior = load(folder)
    stock = {name: weight.numel() for name, weight in prior.network.named_parameters()}
    targets = ["to_q", "conv1"]
    prior.attach(full=True, target_modules=targets)
    wanted = {name: size for name, size in stock.items() if _in(name, targets)}
    assert {name: p.numel() for name, p in prior.parameters().items()} == wanted
    assert sum(p.numel() for p in prior.network.parameters()) == sum(stock.values()) + sum(wanted.values())
    assert prior.trained_numbers(full=True, target_modules=targets) == sum(wanted.values())
    assert prior.trained_numbers(full=True) == sum(stock.values())


def test_a_weight_that_modules_share_stays_shared() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    network[1].weight = network[0].weight
    add_full(network, None)
    assert list(full_parameters(network)) == ["0.weight", "0.bias", "1.bias"]
    with torch.no_grad():
        full_parameters(network)["0.weight"].zero_()
    assert not plain_weights(network)["1.weight"].any()


# What is handed out


def test_a_stock_pipeline_draws_the_posterior_from_what_is_written(folder: str, tmp_path: Path) -> None:
    """Of some modules, in half precision; the snippet below has the whole network in float32."""
    dtype = torch.bfloat16
    prior = moved(folder, ["to_q", "conv1"], dtype="bfloat16", guidance=2.0)
    call = prior.arguments(PROMPTS[:1]) | {"output_type": "pt"}
    expected = prior.pipe(**call, generator=torch.Generator().manual_seed(0)).images
    prior.export(tmp_path, "card")
    assert (tmp_path / "README.md").read_text() == "card"
    stock = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    stock.scheduler = prior.pipe.scheduler
    stock.set_progress_bar_config(disable=True)
    untrained = stock.unet
    stock.unet = UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet", dtype=dtype)
    assert torch.equal(stock(**call, generator=torch.Generator().manual_seed(0)).images, expected)
    # The names of what a checkpoint holds are the network's own, too.
    held = {name: value.detach() for name, value in prior.parameters().items()}
    told = untrained.load_state_dict(held, strict=False)
    assert not told.unexpected_keys
    stock.unet = untrained
    assert torch.equal(stock(**call, generator=torch.Generator().manual_seed(0)).images, expected)
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {dtype}


def test_the_snippet_of_the_card_draws_the_posterior(folder: str, tmp_path: Path) -> None:
    prior = moved(folder)
    prior.export(tmp_path, "")
    found: dict[str, Any] = {}
    exec(prior.snippet(str(tmp_path), PROMPTS[0]), found)
    call = prior.arguments(PROMPTS[:1]) | {"generator": torch.Generator().manual_seed(0)}
    assert found["image"].tobytes() == prior.pipe(**call).images[0].tobytes()
    assert prior.elsewhere() == ""


# What is refused


@pytest.mark.parametrize(
    ("posterior", "said"),
    [
        ({"full": True, "rank": 8}, r"posterior: full: true beside rank: 8, .*Leave rank out"),
        ({"full": True, "rank": 4, "alpha": 2.0}, r"beside rank: 4 and alpha: 2, .*Leave rank and alpha out"),
        ({"full": True, "target_modules": ["to_w"]}, r"target_modules: 'to_w' matches no module .*to_v"),
        ({"full": True, "target_modules": []}, "target_modules.*at least 1 item"),
        ({"full": 3}, "argument 'full': got 3"),
    ],
)
def test_what_cannot_go_together_is_refused_before_weights_load(
    folder: str, posterior: dict[str, Any], said: str
) -> None:
    prior = describe({"component": "stable_diffusion", "path": folder, "steps": STEPS}, "prior")
    with pytest.raises(ValueError, match=said):
        check_posterior(prior, posterior)
    assert prior.construct()._pipe is None


def test_networks_that_cannot_be_trained_in_full_are_refused(folder: str) -> None:
    prior = load(folder)
    before = sum(p.numel() for p in prior.network.parameters())
    prior.attach(rank=2)
    adapters = sum(p.numel() for p in prior.parameters().values())
    assert sum(p.numel() for p in prior.network.parameters()) == before + adapters  # a LoRA has no second copy
    with pytest.raises(ValueError, match="already carries a posterior"):
        prior.attach(full=True)
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight of Sequential is quantised \(torch\.int8\)"):
        add_full(network, None)
    assert full_parameters(network) == {}
