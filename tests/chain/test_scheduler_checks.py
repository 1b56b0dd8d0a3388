"""Samplers that cannot be trained are refused before weights load, in a sentence that says what works."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffusion_rtb.chain.forward_process import noised_chain, signal_and_noise
from diffusion_rtb.chain.recordable import check_single_step
from diffusion_rtb.chain.scheduler import StepCall, previous_sample
from diffusion_rtb.not_finite import NotFiniteError
from pipelines._diffusers.scheduler import REMEDY, build_scheduler, check_sampler
from tests.oracles.loops import LATENT, Loop, sampler
from tests.oracles.tiny import tiny_ddim

CONFIG = dict(tiny_ddim().config)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler")]
FIT = {
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
}


def refuse_without_density(scheduler: Any, steps: int) -> None:
    """What objectives that read log-densities need of a scheduler."""
    if why := check_sampler(scheduler, steps, 1.0):
        raise ValueError(why)
    check_single_step(scheduler)


def check(name: str, arguments: dict[str, Any] | None = None, steps: int = 20) -> None:
    scheduler = build_scheduler(CONFIG, name, arguments or {})
    refuse_without_density(scheduler, steps)


@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_of_diffusers_fits_or_is_refused_with_a_reason(name: str) -> None:
    if name in FIT:
        check(name)
        return
    with pytest.raises(ValueError, match=r"(Choose|Use) .*DDPMScheduler|only supports `beta_schedule`"):
        check(name)


def flow_check(name: str, arguments: dict[str, Any] | None = None, steps: int = 20, **config: Any) -> Any:
    scheduler = build_scheduler(FLOW | config, name, arguments or {}, predicts="flow_prediction")
    refuse_without_density(scheduler, steps)
    return scheduler


FLOW_SDE = {"algorithm_type": "sde-dpmsolver++", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_REASONS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "FlowMatchEulerDiscreteScheduler",
        {"stochastic_sampling": True},
        {},
        "another distribution.*FlowMatchSDEScheduler",
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {},
        {"stochastic_sampling": True},
        "another distribution.*FlowMatchSDEScheduler",
    ),
    ("FlowMatchLCMScheduler", {}, {}, "another distribution.*FlowMatchSDEScheduler"),
    ("FlowMatchEulerDiscreteScheduler", {}, {}, "draws no noise.*Choose FlowMatchSDEScheduler"),
    ("FlowMatchEulerDiscreteScheduler", {}, {"use_dynamic_shifting": True}, "draws no noise.*FlowMatchSDEScheduler"),
    ("FlowMatchHeunDiscreteScheduler", {}, {}, "FlowMatchSDEScheduler"),
    ("DDIMScheduler", {}, {}, "velocity of a flow.*FlowMatchSDEScheduler"),
    ("FlowMatchSDEScheduler", {"noise_level": 3.0}, {}, r"outside \[0, 2\]"),
    ("FlowMatchSDEScheduler", {"noise_level": 0.0}, {}, "draws no noise"),
    ("FlowMatchSDEScheduler", {"window": [0, 21]}, {}, r"window=\[0, 21\] does not fit 20 steps.*stop <= 20"),
    ("FlowMatchSDEScheduler", {"window": [19, 20]}, {}, "start < 19"),
    ("FlowMatchSDEScheduler", {"level": 1.0}, {}, "has no argument 'level'"),
    ("FlowMatchSDEScheduler", {}, {"stochastic_sampling": True}, "another distribution"),
    ("DPMSolverMultistepScheduler", FLOW_SDE, {}, r"solver_order: 1"),
]


@pytest.mark.parametrize(("name", "arguments", "config", "reason"), FLOW_REASONS)
def test_samplers_that_do_not_fit_a_flow_are_refused(
    name: str, arguments: dict[str, Any], config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        flow_check(name, arguments, **config)


@pytest.mark.filterwarnings("error:.*log Z")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("FlowMatchSDEScheduler", {}),
        ("FlowMatchSDEScheduler", {"kernel": "posterior"}),
        ("FlowMatchSDEScheduler", {"window": [0, 5]}),
        ("DPMSolverMultistepScheduler", {**FLOW_SDE, "solver_order": 1}),
        ("LTXEulerAncestralRFScheduler", {}),
    ],
)
def test_what_samples_a_flow_is_let_through(name: str, arguments: dict[str, Any], dynamic: bool) -> None:
    """With dynamic shifting too, where pipelines give a shift that follows from the size."""
    flow_check(name, arguments, use_dynamic_shifting=dynamic)


@pytest.mark.parametrize(
    ("name", "arguments", "warning"),
    [
        (
            "FlowMatchSDEScheduler",
            {"noise_level": 0.7},
            "noise_level=0.7 of the marginal kernel.*log Z.*Leave noise_level out",
        ),
        (
            "FlowMatchSDEScheduler",
            {"kernel": "posterior", "noise_level": 0.5},
            "noise_level=0.5 of the posterior kernel",
        ),
        ("FlowMatchSDEScheduler", {"window": [3, 9]}, r"window=\[3, 9\] starts from states.*log Z.*value network"),
        ("LTXEulerAncestralRFScheduler", {"eta": 0.5}, "eta=0.5 < 1 is not memoryless"),
    ],
)
def test_a_flow_sampler_with_memory_is_warned_of(name: str, arguments: dict[str, Any], warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        flow_check(name, arguments)


def test_a_flow_keeps_its_shift_whatever_the_scheduler_calls_it() -> None:
    """Folders of Wan and Sana hold multistep solvers, whose `flow_shift` is Euler's `shift`."""
    wan = {"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0, "prediction_type": "flow_prediction"}
    ours = build_scheduler(wan, "FlowMatchSDEScheduler", {}, predicts="flow_prediction")
    assert ours.config.shift == 5.0
    solver = build_scheduler(FLOW, "DPMSolverMultistepScheduler", FLOW_SDE, predicts="flow_prediction")
    assert solver.config.flow_shift == 3.0
    assert build_scheduler(wan, "FlowMatchSDEScheduler", {"shift": 2.0}, predicts="flow_prediction").config.shift == 2.0


def test_timesteps_of_ones_own_are_refused_for_a_flow() -> None:
    scheduler = build_scheduler(FLOW, "FlowMatchSDEScheduler", {}, predicts="flow_prediction")
    with pytest.raises(ValueError, match="Give steps"):
        check_sampler(scheduler, 2, 1.0, [900, 400])


SDE = {"algorithm_type": "sde-dpmsolver++"}
REASONS: list[tuple[str, dict[str, Any], int, str]] = [
    ("DDIMScheduler", {}, 1000, "set steps to at most 999"),
    ("DDPMScheduler", {}, 1000, "set steps to at most 999"),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, 1000, "set steps to at most 999"),
    ("EulerAncestralDiscreteScheduler", {}, 1500, "set steps to at most 999"),
    ("DDPMScheduler", {"steps_offset": 0}, 1001, "set steps to at most 1000"),
    ("DPMSolverMultistepScheduler", SDE, 20, r"scheduler_arguments: \{solver_order: 1\}"),
    ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 1, "use_flow_sigmas": True}, 20, "samples flows"),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, 20, "samples flows.*predicts 'epsilon'"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, 20, "variance_type: fixed_small"),
    ("DDPMScheduler", {"variance_type": "fixed_large_log"}, 20, "fixed_large_log has no finite variance"),
    (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        20,
        "rescale_betas_zero_snr: false",
    ),
    ("DPMSolverSDEScheduler", {}, 20, "needs a package that is not installed.*torchsde"),
    ("CogVideoXDPMScheduler", {}, 20, "old_pred_original_sample"),
    ("SASolverScheduler", {}, 20, "noise of the step before"),
    ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 1, "use_beta_sigmas": True}, 50, "two equal noise levels"),
]


@pytest.mark.parametrize(("name", "arguments", "steps", "reason"), REASONS)
def test_the_reason_is_the_right_one(name: str, arguments: dict[str, Any], steps: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(name, arguments, steps)


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        ("DDIMScheduler", {}, 999),
        ("DDIMScheduler", {"steps_offset": 0}, 1000),
        ("EulerAncestralDiscreteScheduler", {}, 1000),
        ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 1, "use_karras_sigmas": True}, 50),
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
            20,
        ),
    ],
)
def test_what_works_is_let_through(name: str, arguments: dict[str, Any], steps: int) -> None:
    check(name, arguments, steps)


def test_the_remedy_works() -> None:
    """Every scheduler that the remedy names, with the arguments it names."""
    assert "algorithm_type: sde-dpmsolver++, solver_order: 1" in REMEDY
    for name in ("DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"):
        assert name in REMEDY
        check(name)
    check("DPMSolverMultistepScheduler", {**SDE, "solver_order": 1})


NOISING = [
    "ddim",
    "ddpm",
    "euler_ancestral",
    "euler_churn",
    "sde_dpm_1",
    "sde_dpm_flow",
    "flow_match_sde",
    "lcm",
    "tcd",
]


@pytest.mark.parametrize("name", NOISING)
def test_noising_is_the_same_after_a_chain_that_set_its_begin_index(name: str) -> None:
    scheduler, options = sampler(name)
    scheduler.set_timesteps(6)
    expected = signal_and_noise(scheduler, scheduler.timesteps.double())
    torch.testing.assert_close(expected[1] / expected[0], (expected[1] / expected[0]).sort(descending=True)[0])
    for begin in (0, 2) if hasattr(scheduler, "set_begin_index") else (None,):
        Loop(scheduler)(6, begin=begin, **options)
        before = {k: v for k, v in vars(scheduler).items() if k in ("_begin_index", "_step_index")}
        found = signal_and_noise(scheduler, scheduler.timesteps.double())
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert before == {k: v for k, v in vars(scheduler).items() if k in before}


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_states_at_repeated_timesteps_have_the_noise_of_their_place(sigmas: str) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**LATENT, **SDE, solver_order=1, **{sigmas: True})
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps.double()
    assert len(timesteps.unique()) < len(timesteps)
    a, b = signal_and_noise(scheduler, timesteps)
    torch.testing.assert_close(b / a, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=1e-6)
    part = signal_and_noise(scheduler, timesteps[-8:])
    torch.testing.assert_close(part[1] / part[0], scheduler.sigmas[-9:-1].double(), rtol=1e-5, atol=1e-6)
    noise = torch.randn(20_000, 50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chain = noised_chain(scheduler, torch.zeros(20_000, 1, dtype=torch.float64), timesteps, noise)
    torch.testing.assert_close(chain[:, :, 0].std(0), b, rtol=0.03, atol=0)


def test_states_beside_which_the_noise_vanishes_are_not_taken_for_a_learned_variance() -> None:
    """A posterior that diverged once was told to set variance_type."""
    chain = tiny_ddim()
    chain.set_timesteps(10)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def std(states: Tensor) -> float:
        call = StepCall(chain, chain.step, torch.zeros_like(x), chain.timesteps[-1], states, eta=1.0)
        return call.std(previous_sample(call.mean()))

    assert std(1e4 * x) == pytest.approx(std(x), rel=1e-4)
    with pytest.raises(
        NotFiniteError, match=r"come to \d\.?\d*e\+\d+ at timestep .* cannot tell noise .* lower train\.lr"
    ):
        std(1e9 * x)
