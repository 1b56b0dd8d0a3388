"""What a prior may do to take less memory or to be faster: the same numbers, and switched on for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from diffusion_rtb.chain.rollout import replay_backward, rollout, score
from diffusion_rtb.config.components import build, describe
from pipelines._models.kept_embeddings import digest_of
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny, tiny_ddpm, tiny_stable_diffusion

PROMPTS = ["a cat emoji", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("tiny")))


def load(folder: str, **settings: Any) -> StableDiffusion:
    """By a config, as users give them."""
    given = {"component": "stable_diffusion", "path": folder, "steps": 3, "device": "cpu"}
    prior: StableDiffusion = build(given | settings, "prior")
    prior.attach(rank=2, alpha=2.0, seed=1)
    with torch.no_grad():
        for number, parameter in enumerate(prior.parameters().values()):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return prior


def gradients(prior: StableDiffusion) -> tuple[list[Tensor], int]:
    """Of sum log_q of two trajectories, and how often the last block of the middle was evaluated."""
    trajectory = rollout(prior, PROMPTS, [0, 1])
    count = [0]
    hook = prior.network.mid_block.resnets[-1].register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    replay_backward(prior.pipe, trajectory, torch.ones(2, 3), call=prior.arguments(PROMPTS))
    hook.remove()
    return [parameter.grad for parameter in prior.parameters().values() if parameter.grad is not None], count[0]


def test_checkpointed_activations_give_the_same_gradients(folder: str) -> None:
    plain, once = gradients(load(folder))
    checkpointed, twice = gradients(load(folder, memory={"gradient_checkpointing": True}))
    assert twice == 2 * once
    assert len(plain) == len(checkpointed) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("offload", ["text_encoders", "all"])
def test_networks_that_wait_give_the_same_numbers(folder: str, offload: str) -> None:
    plain, waiting = load(folder), load(folder, memory={"offload": offload})
    trajectories = [rollout(prior, PROMPTS, [0, 1]) for prior in (plain, waiting)]
    assert torch.equal(trajectories[0].x, trajectories[1].x)
    assert torch.equal(score(waiting, PROMPTS, trajectories[1]), trajectories[0].log_prob)
    assert torch.equal(plain.decode(trajectories[0].x_0), waiting.decode(trajectories[1].x_0))
    assert plain.fingerprint() == waiting.fingerprint()


def test_tiles_of_the_vae_belong_to_the_fingerprint(folder: str, tmp_path: Path) -> None:
    tiled = load(folder, memory={"vae_tiling": True})
    assert tiled.pipe.vae.use_tiling
    assert tiled.fingerprint()["vae_tiling"] is True
    tiny_ddpm().save_pretrained(tmp_path)
    for setting in ({"vae_tiling": True}, {"embeddings": str(tmp_path)}):
        with pytest.raises(ValueError, match=f"memory.{next(iter(setting))}: .*Leave it out"):
            build({"component": "unconditional", "path": str(tmp_path), "memory": setting}, "prior")


def test_kept_embeddings_need_no_text_encoder(folder: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "guidance": 2.0,
        "negative_prompt": "grey",
        "memory": {"embeddings": str(tmp_path), "offload": "all"},
    }
    expected = load(folder, guidance=2.0, negative_prompt="grey").arguments(PROMPTS)
    load(folder, **settings).arguments(PROMPTS)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2, "of the first prompt together with the negative one, and of the second"
    again = load(folder, **settings)
    again.pipe.text_encoder.register_forward_pre_hook(lambda *_: pytest.fail("asked"))
    found = again.arguments(PROMPTS)
    with pytest.raises(pytest.fail.Exception, match="asked"):
        again.arguments(["a prompt that is new"])
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        assert torch.equal(found[name], expected[name])

    files[0].write_bytes(b"cut off")
    assert torch.equal(load(folder, **settings).arguments(PROMPTS)["prompt_embeds"], expected["prompt_embeds"])
    assert load_file(files[0])


def test_other_weights_and_vocabularies_have_other_embeddings() -> None:
    pipe = tiny_stable_diffusion()
    before = digest_of(pipe)
    assert digest_of(tiny_stable_diffusion()) == before
    pipe.vae.decoder.conv_in.weight.data.add_(1)  # no part in it
    assert digest_of(pipe) == before
    list(pipe.text_encoder.parameters())[-3].data.flatten()[-1] += 1e-6
    changed = digest_of(pipe)
    assert changed != before
    pipe.tokenizer.add_tokens("<mine>")
    assert digest_of(pipe) not in (before, changed)


@pytest.mark.parametrize(
    "speed", [{"channels_last": True}, {"attention": "math"}, {"compile": "aot_eager"}, {"tf32": False}], ids=str
)
def test_speed_changes_rounding_alone(folder: str, speed: dict[str, Any], restored: None) -> None:
    plain, fast = load(folder), load(folder, speed=speed)
    expected = rollout(plain, PROMPTS, [0, 1])
    found = rollout(fast, PROMPTS, [0, 1])
    assert_close(found.x, expected.x, rtol=1e-4, atol=1e-4)
    assert_close(score(fast, PROMPTS, found), found.log_prob, rtol=0, atol=1e-3)
    assert fast.fingerprint()["speed"] == speed
    assert "speed" not in plain.fingerprint()


@pytest.fixture
def restored() -> Any:
    """What torch holds for the whole process."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = cudnn
    for name in ("flash", "mem_efficient", "cudnn", "math"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(True)


def test_settings_are_checked_before_anything_loads(folder: str) -> None:
    for given, said in (
        (
            {"speed": {"compile": "turbo"}},
            "speed.compile='turbo' is no back end of torch.compile; use one of .*inductor",
        ),
        ({"speed": {"attention": "fast"}}, "'flash', 'efficient', 'cudnn' or 'math'"),
        ({"memory": {"offlod": "all"}}, "memory"),
    ):
        with pytest.raises(ValueError, match=said):
            describe({"component": "stable_diffusion", "path": folder} | given, "prior")
