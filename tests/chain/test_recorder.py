"""The recorder sees what a stock pipeline does and changes nothing: images, generators, the scheduler itself."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from torch import Tensor
from torch.distributions import Normal

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay, replay_backward
from tests.oracles.tiny import tiny_3_arguments, tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_vae

STEPS = 5
PROMPTS = ["a cat", "a dog"]

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "euler_ancestral": (EulerAncestralDiscreteScheduler, {}),
    "sde_dpm": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "sde_dpm_first_order": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 1}),
}


def with_scheduler(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A tiny pipeline on the named scheduler and the arguments of its call, without generator."""
    if name == "flow_match":
        return tiny_stable_diffusion_3(), tiny_3_arguments(len(PROMPTS), STEPS)
    pipe = tiny_stable_diffusion()
    pipe.text_encoder.requires_grad_(False)  # computed once for all steps: its graph cannot be freed in each
    kind, arguments = SCHEDULERS[name]
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **arguments)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPTS, "num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 64, "width": 64}
    return pipe, call | ({"eta": 1.0} if name == "ddim" else {})


def images_of(pipe: Any, call: dict[str, Any]) -> Tensor:
    torch.manual_seed(5)  # FlowMatchEuler draws from the global generator
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    images: Tensor = pipe(**call, generator=generators, output_type="pt").images
    return images


ALL = [*SCHEDULERS, "flow_match"]


@pytest.mark.parametrize("name", ALL)
def test_images_are_bit_identical_and_the_global_generator_is_untouched(name: str) -> None:
    pipe, call = with_scheduler(name)
    plain, after_plain = images_of(pipe, call), torch.rand(1)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        recorded, after_recorded = images_of(pipe, call), torch.rand(1)
    assert torch.equal(plain, recorded)
    assert torch.equal(after_plain, after_recorded)
    trajectory = recorder.trajectory
    assert trajectory.x.shape == (2, STEPS + 1, 4, 8, 8)
    assert trajectory.log_prob.dtype == torch.float32
    assert trajectory.log_prob.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_replayed_equals_recorded_exactly(name: str) -> None:
    pipe, call = with_scheduler(name)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    before = torch.get_rng_state()
    assert torch.equal(replay(pipe, recorder.trajectory, **call), recorder.trajectory.log_prob)
    assert torch.equal(torch.get_rng_state(), before), "replay drew random numbers"


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral", "sde_dpm_first_order", "flow_match"])
def test_a_subset_of_steps_replays_exactly(name: str) -> None:
    pipe, call = with_scheduler(name)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    part = replay(pipe, recorder.trajectory, steps=[1, 3], **call)
    assert torch.equal(part[:, [1, 3]], recorder.trajectory.log_prob[:, [1, 3]])
    assert (part[:, [0, 2, 4]] == 0).all()


def test_unconditional_pipelines_without_latents_argument_replay_exactly() -> None:
    pipe = tiny_ddpm()
    pipe.set_progress_bar_config(disable=True)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        pipe(batch_size=3, num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np")
    trajectory = recorder.trajectory
    assert torch.equal(replay(pipe, trajectory, num_inference_steps=4), trajectory.log_prob)


def ddim_closed_form(ab_t: Tensor, ab_s: Tensor, x_t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Song et al. 2021 (arXiv 2010.02502) at eta = 1."""
    std = ((1 - ab_s) / (1 - ab_t) * (1 - ab_t / ab_s)).sqrt()
    x_0 = (x_t - (1 - ab_t).sqrt() * eps) / ab_t.sqrt()
    return ab_s.sqrt() * x_0 + (1 - ab_s - std**2).sqrt() * eps, std


def ddpm_closed_form(ab_t: Tensor, ab_s: Tensor, x_t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020 (arXiv 2006.11239): the Gaussian q(x_s | x_t, x_0) at the predicted x_0."""
    a = ab_t / ab_s
    x_0 = (x_t - (1 - ab_t).sqrt() * eps) / ab_t.sqrt()
    mean = ab_s.sqrt() * (1 - a) / (1 - ab_t) * x_0 + a.sqrt() * (1 - ab_s) / (1 - ab_t) * x_t
    return mean, ((1 - ab_s) / (1 - ab_t) * (1 - a)).sqrt()


def euler_ancestral_closed_form(s_t: Tensor, s_s: Tensor, x_t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Karras et al. 2022 / k-diffusion: sigma_up² = s_s²(s_t² - s_s²)/s_t², deterministic step to sigma_down."""
    up = (s_s**2 * (s_t**2 - s_s**2) / s_t**2).sqrt()
    return x_t + eps * ((s_s**2 - up**2).sqrt() - s_t), up


def network_outputs(pipe: Any, call: dict[str, Any]) -> list[Tensor]:
    """What the scheduler's `step` was given at each step of one recorded call."""
    outputs: list[Tensor] = []

    def keep(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs.append(model_output.double())
        return original(model_output, *args, **kwargs)

    original = pipe.scheduler.step
    pipe.scheduler.step = keep
    keep.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    images_of(pipe, call)
    del pipe.scheduler.step
    return outputs


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral"])
def test_log_density_equals_the_closed_form(name: str) -> None:
    pipe, call = with_scheduler(name)
    outputs = network_outputs(pipe, call)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    trajectory, scheduler = recorder.trajectory, pipe.scheduler
    x = trajectory.x.double()
    ab = scheduler.alphas_cumprod.double()
    for i, eps in enumerate(outputs):
        if not trajectory.stochastic[i]:
            continue
        if name == "euler_ancestral":
            s_t, s_s = scheduler.sigmas.double()[i : i + 2]
            mean, std = euler_ancestral_closed_form(s_t, s_s, x[:, i], eps)
        else:
            t = int(trajectory.timesteps[i])
            s = t - scheduler.config.num_train_timesteps // STEPS
            final = scheduler.final_alpha_cumprod.double() if name == "ddim" else torch.tensor(1.0).double()
            form = ddim_closed_form if name == "ddim" else ddpm_closed_form
            mean, std = form(ab[t], ab[s] if s >= 0 else final, x[:, i], eps)
        expected = Normal(mean, std).log_prob(x[:, i + 1]).flatten(1).sum(1)
        assert trajectory.std[i].item() == pytest.approx(std.item(), rel=2e-5)
        # fp32 schedules: 256 squared errors, each relative 1e-5, next to a density of about 1e2 to 1e3 nats.
        torch.testing.assert_close(trajectory.log_prob[:, i].double(), expected, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("name", ["ddpm", "euler_ancestral", "sde_dpm", "flow_match"])
def test_the_final_step_without_variance_carries_no_density(name: str) -> None:
    pipe, call = with_scheduler(name)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    trajectory = recorder.trajectory
    assert trajectory.stochastic.tolist() == [True] * (STEPS - 1) + [False]
    assert trajectory.std[-1] == 0
    assert (trajectory.log_prob[:, -1] == 0).all()


def denoise(scheduler: Any, x: Tensor) -> None:
    """Down the whole schedule with a network that answers a tenth of the state."""
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_a_variance_clamped_to_nothing_is_none_in_every_dimension(size: float, dtype: torch.dtype) -> None:
    """DDPM's last variance is 1e-20: the noise moves states near 0 by bits, which shows in large batches only."""
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(timesteps=[700, 150])
    x_T = size * torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with TrajectoryRecorder(scheduler) as recorder:
        denoise(scheduler, x_T)
    assert recorder.trajectory.std[-1] == 0


def test_hardly_any_noise_from_elsewhere_is_refused_in_a_last_step() -> None:
    class Foreign(DDPMScheduler):  # type: ignore[misc]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            output = super().step(model_output, timestep, sample, **kwargs)
            output.prev_sample = output.prev_sample + 1e-4 * torch.empty_like(sample).uniform_() * (timestep == 0)
            return output

    scheduler = Foreign()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"does not come from torch\.randn"), TrajectoryRecorder(scheduler):
        denoise(scheduler, torch.randn(2, 4, 8, 8))


def test_ddim_keeps_a_density_at_the_final_step_unless_alpha_is_one() -> None:
    pipe, call = with_scheduler("ddim")
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    assert recorder.trajectory.stochastic.all()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    assert recorder.trajectory.stochastic.tolist() == [True] * (STEPS - 1) + [False]


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        (DDIMScheduler, "eta=1.0"),
        (EulerDiscreteScheduler, "EulerAncestralDiscreteScheduler"),
        (PNDMScheduler, "DDIMScheduler"),
        (DPMSolverMultistepScheduler, 'algorithm_type="sde-dpmsolver++"'),
    ],
)
def test_deterministic_schedulers_are_refused_with_the_remedy(kind: Any, remedy: str) -> None:
    pipe, call = with_scheduler("ddpm")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="deterministic step") as error, TrajectoryRecorder(pipe.scheduler):
        images_of(pipe, call)
    assert remedy in str(error.value)
    assert kind.__name__ in str(error.value)
    assert "step" not in vars(pipe.scheduler)


def test_flow_matching_without_noise_is_refused_with_the_remedy() -> None:
    pipe, call = with_scheduler("flow_match")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with (
        pytest.raises(ValueError, match=r"use diffusion_rtb\.schedulers\.FlowMatchSDEScheduler"),
        TrajectoryRecorder(pipe.scheduler),
    ):
        images_of(pipe, call)


def test_noise_from_elsewhere_than_randn_is_refused() -> None:
    class Foreign(DDIMScheduler):  # type: ignore[misc]
        def step(self, *args: Any, **kwargs: Any) -> Any:
            output = super().step(*args, **(kwargs | {"eta": 0.0}))
            return (output[0] + 0.3 * torch.empty_like(output[0]).normal_(), *output[1:])

    pipe, call = with_scheduler("ddim")
    pipe.scheduler = Foreign.from_config(pipe.scheduler.config)
    call.pop("eta")
    with pytest.raises(ValueError, match=r"does not come from torch\.randn"), TrajectoryRecorder(pipe.scheduler):
        images_of(pipe, call)


def test_the_scheduler_is_restored_after_success_and_after_an_exception() -> None:
    pipe, call = with_scheduler("ddim")
    attributes, signature = set(vars(pipe.scheduler)), inspect.signature(pipe.scheduler.step)
    with TrajectoryRecorder(pipe.scheduler):
        assert inspect.signature(pipe.scheduler.step) == signature
        assert isinstance(pipe.scheduler, DDIMScheduler)
        images_of(pipe, call)
    assert "step" not in vars(pipe.scheduler)
    assert set(vars(pipe.scheduler)) == attributes
    with pytest.raises(ZeroDivisionError), TrajectoryRecorder(pipe.scheduler):
        raise ZeroDivisionError
    assert "step" not in vars(pipe.scheduler)


def test_the_scheduler_is_restored_after_replay_and_after_an_exception_in_it() -> None:
    pipe, call = with_scheduler("euler_ancestral")
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    timesteps = pipe.scheduler.timesteps.clone()
    replay(pipe, recorder.trajectory, **call)
    assert not {"step", "scale_model_input", "set_timesteps"} & set(vars(pipe.scheduler))
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    with pytest.raises(ValueError, match="recorded"):
        replay(pipe, recorder.trajectory, **(call | {"num_inference_steps": STEPS + 2}))
    assert not {"step", "scale_model_input", "set_timesteps"} & set(vars(pipe.scheduler))


def test_recording_twice_at_once_is_refused() -> None:
    pipe, _ = with_scheduler("ddim")
    with (
        TrajectoryRecorder(pipe.scheduler),
        pytest.raises(RuntimeError, match="already"),
        TrajectoryRecorder(pipe.scheduler),
    ):
        pass


def test_an_empty_recording_says_so() -> None:
    pipe, _ = with_scheduler("ddim")
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        pass
    with pytest.raises(RuntimeError, match="Nothing was recorded"):
        _ = recorder.trajectory


def test_latents_changed_between_steps_are_refused() -> None:
    pipe, call = with_scheduler("ddim")

    def shift(pipe: Any, step: int, timestep: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": state["latents"] + 1}

    with pytest.raises(ValueError, match="changed between steps"), TrajectoryRecorder(pipe.scheduler):
        images_of(pipe, call | {"callback_on_step_end": shift})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_half_precision_pipelines_have_fp32_densities(name: str, dtype: torch.dtype) -> None:
    pipe, call = with_scheduler(name)
    pipe.to(dtype)
    call = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in call.items()}
    rows = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    torch.manual_seed(5)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        seen = pipe(**call, output_type="latent", generator=rows).images
    trajectory = recorder.trajectory
    torch.manual_seed(5)
    rows = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    assert torch.equal(pipe(**call, output_type="latent", generator=rows).images, seen)
    assert trajectory.x.dtype == seen.dtype
    assert trajectory.log_prob.dtype == torch.float32
    assert torch.equal(replay(pipe, trajectory, **call), trajectory.log_prob)


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "sde_dpm_first_order"])
def test_image_to_image_is_replayed_in_whole_and_in_part(name: str, strength: float) -> None:
    """Its chain is the end of the schedule; the last step is without noise for two of these schedulers."""
    text_to_image, call = with_scheduler(name)
    pipe = StableDiffusionImg2ImgPipeline(**text_to_image.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    del call["height"], call["width"]
    call |= {"image": image, "strength": strength}
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    trajectory = recorder.trajectory
    assert trajectory.steps == round(strength * STEPS)
    assert torch.equal(replay(pipe, trajectory, **call), trajectory.log_prob)
    part = replay(pipe, trajectory, steps=[1], **call)
    assert torch.equal(part[:, 1], trajectory.log_prob[:, 1])
    assert torch.equal(replay_backward(pipe, trajectory, torch.ones(2, trajectory.steps), **call), trajectory.log_prob)


def test_pipelines_without_latents_and_batch_size_replay_exactly() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = DiTTransformer2DModel(
            sample_size=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ).eval()
        pipe = DiTPipeline(transformer, tiny_vae(), DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    call = {"class_labels": [1, 2], "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
    with torch.no_grad(), TrajectoryRecorder(pipe.scheduler) as recorder:
        pipe(**call, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
    trajectory = recorder.trajectory
    assert torch.equal(replay(pipe, trajectory, call=call), trajectory.log_prob)
    assert torch.equal(replay(pipe, trajectory, steps=[2], call=call)[:, 2], trajectory.log_prob[:, 2])


def test_exploration_scales_the_noise_and_keeps_both_densities() -> None:
    pipe, call = with_scheduler("ddim")
    with TrajectoryRecorder(pipe.scheduler, noise_scale=lambda std: 1 + std) as recorder:
        images_of(pipe, call)
    trajectory = recorder.trajectory
    assert trajectory.log_behaviour is not None
    torch.testing.assert_close(replay(pipe, trajectory, **call), trajectory.log_prob, rtol=0, atol=0)
    # With e = |x - mean|²/std²: log_prob = -e/2 - D log std + c, log_behaviour = -e/(2 f²) - D log(f std) + c.
    dims = 256
    f = 1 + trajectory.std
    constant = dims * (trajectory.std.log() + 0.5 * torch.tensor(2 * torch.pi).log())
    e = -2 * (trajectory.log_prob + constant)
    torch.testing.assert_close(
        -e / (2 * f**2) - constant - dims * f.log(), trajectory.log_behaviour, rtol=1e-4, atol=1e-2
    )
    assert (e.mean(0) / dims / f**2 - 1).abs().max() < 0.35  # 512 squared normals: standard error 0.06


def brute_force(pipe: Any, call: dict[str, Any], trajectory: Any, cotangent: Tensor) -> dict[str, Tensor]:
    """Autograd through the graph of all steps at once."""
    pipe.unet.zero_grad()
    (cotangent * replay(pipe, trajectory, grad=True, **call)).sum().backward()
    return {n: p.grad.clone() for n, p in pipe.unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral", "sde_dpm_first_order"])
def test_backward_inside_the_step_is_the_exact_gradient(name: str) -> None:
    pipe, call = with_scheduler(name)
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    trajectory = recorder.trajectory
    cotangent = torch.randn(2, STEPS)
    expected = brute_force(pipe, call, trajectory, cotangent)
    pipe.unet.zero_grad()
    log_prob = replay_backward(pipe, trajectory, cotangent, **call)
    assert torch.equal(log_prob, trajectory.log_prob)
    assert not log_prob.requires_grad
    assert len(expected) > 20
    whole = torch.cat([g.flatten() for g in expected.values()])
    ours = torch.cat([p.grad.flatten() for n, p in pipe.unet.named_parameters() if n in expected])
    assert (ours - whole).norm() <= 1e-5 * whole.norm()


def test_gradient_equals_finite_differences() -> None:
    """An oracle without any of our replay gradients: central differences of the replayed density."""
    pipe, call = with_scheduler("ddim")
    pipe.unet.double(), pipe.text_encoder.double(), pipe.vae.double()
    with TrajectoryRecorder(pipe.scheduler, dtype=torch.float64) as recorder:
        images_of(pipe, call)
    trajectory = recorder.trajectory
    replay_backward(pipe, trajectory, torch.ones(2, STEPS, dtype=torch.float64), dtype=torch.float64, **call)
    weight = pipe.unet.conv_out.bias
    h = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0] += sign * h
            values.append(replay(pipe, trajectory, dtype=torch.float64, **call).sum())
            weight[0] -= sign * h
    assert weight.grad[0].item() == pytest.approx(((values[0] - values[1]) / (2 * h)).item(), rel=1e-5)


def test_multistep_solvers_refuse_backward_inside_the_step() -> None:
    pipe, call = with_scheduler("sde_dpm")
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    with pytest.raises(ValueError, match="solver_order=1"):
        replay_backward(pipe, recorder.trajectory, torch.ones(2, STEPS), **call)


def test_steps_without_density_cannot_be_asked_for() -> None:
    pipe, call = with_scheduler("ddpm")
    with TrajectoryRecorder(pipe.scheduler) as recorder:
        images_of(pipe, call)
    with pytest.raises(ValueError, match=r"Steps \[4\] have no log-density"):
        replay(pipe, recorder.trajectory, steps=[1, 4], **call)
