"""Replay of loops of one's own: however they start, however they call `step`, the number is right or the error says why."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from diffusion_rtb.chain.noise import GivenStart
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import replay, replay_backward
from diffusion_rtb.chain.trajectory import Trajectory
from tests.oracles.loops import BATCH, DIMS, Loop, generators, sampler, squared_innovations

SHAPE = (BATCH, *DIMS)
STEPS = 5


class Own:
    """The smallest loop that can be replayed; each test starts it in its own way, without `latents`."""

    def __init__(self, start: Callable[[], Tensor], scheduler: Any | None = None, **options: Any) -> None:
        self.scheduler = scheduler or sampler("ddim")[0]
        self.start, self.options = start, options or {"eta": 1.0}
        self.weight = torch.tensor(0.7, requires_grad=True)

    def __call__(self) -> Tensor:
        self.scheduler.set_timesteps(STEPS)
        x = self.start()
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(torch.tanh(self.weight * x), t, x, **self.options).prev_sample
        return x


def recorded(loop: Any, **call: Any) -> Trajectory:
    torch.manual_seed(1)
    with torch.no_grad(), TrajectoryRecorder(loop.scheduler) as recorder:
        loop(**call)
    return recorder.trajectory


def filled() -> Tensor:
    return torch.empty(SHAPE).normal_()


STARTS: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: torch.randn(SHAPE),
    "randn of numbers": lambda: torch.randn(*SHAPE),
    "randn by name": lambda: torch.randn(size=SHAPE),
    "randn_like": lambda: torch.randn_like(torch.zeros(SHAPE)),
    "normal_": filled,
    "a generator per row": lambda: torch.cat([torch.randn(1, *DIMS, generator=g) for g in generators()]),
    "rows without a batch": lambda: torch.stack([torch.randn(DIMS, generator=g) for g in generators()]),
    "torch.normal": lambda: torch.normal(0.0, 1.0, SHAPE),
    "normal of tensors": lambda: torch.normal(torch.zeros(SHAPE), torch.ones(SHAPE)),
    "diffusers": lambda: diffusers.utils.torch_utils.randn_tensor(SHAPE, generator=generators()),
}


@pytest.mark.parametrize("start", STARTS)
def test_loops_that_draw_their_first_state_are_replayed(start: str) -> None:
    loop = Own(STARTS[start])
    trajectory = recorded(loop)
    assert torch.equal(replay(loop, trajectory), trajectory.log_prob)
    part = replay(loop, trajectory, steps=[1, 3])
    assert torch.equal(part[:, [1, 3]], trajectory.log_prob[:, [1, 3]])


def test_the_rest_of_a_loop_is_left_alone_once_its_start_is_given() -> None:
    """What answers the first draw is gone by the second step, under modes of the caller's and whether or not the loop fails."""

    class Caller(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Looking(Own):
        def __call__(self) -> Tensor:
            seen.clear()
            self.scheduler.set_timesteps(STEPS)
            x = self.start()
            for t in self.scheduler.timesteps:
                seen.append(type(_get_current_function_mode()))
                x = self.scheduler.step(torch.tanh(self.weight * x), t, x, eta=1.0).prev_sample
                if self.options["fails"]:
                    raise KeyError
            return x

    seen: list[type] = []
    loop = Looking(STARTS["randn"], fails=False)
    trajectory = recorded(loop)
    with Caller():
        assert torch.equal(replay(loop, trajectory), trajectory.log_prob)
        assert seen == [GivenStart, Caller, Caller, Caller]
        loop.options["fails"] = True
        with pytest.raises(KeyError):
            replay(loop, trajectory)
        assert type(_get_current_function_mode()) is Caller
    assert _get_current_function_mode() is None


@pytest.mark.parametrize(
    "start",
    [
        lambda: 2 * torch.randn(SHAPE),
        lambda: torch.rand(SHAPE),
        lambda: torch.randn(SHAPE) + 0.01,
        lambda: torch.ones(SHAPE),
    ],
    ids=["scaled", "uniform", "shifted", "constant"],
)
def test_another_first_state_is_refused_or_entered_by_its_step(start: Callable[[], Tensor]) -> None:
    loop = Own(start)
    trajectory = recorded(loop)
    torch.manual_seed(2)
    if not torch.equal(start(), trajectory.x[:, 0]):
        with pytest.raises(ValueError, match=r"another state than the recorded one \(step 0.*entry='step'"):
            replay(loop, trajectory)
    for steps in (None, [0], [2, 3]):
        chosen = steps or list(range(STEPS - 1))
        found = replay(loop, trajectory, steps=steps, entry="step")
        assert torch.equal(found[:, chosen], trajectory.log_prob[:, chosen])
    log_prob = replay_backward(loop, trajectory, torch.ones(BATCH, STEPS), entry="step")
    assert torch.equal(log_prob, trajectory.log_prob)
    assert loop.weight.grad is not None
    whole = replay(loop, trajectory, grad=True, entry="step").sum()
    (expected,) = torch.autograd.grad(whole, [loop.weight])
    torch.testing.assert_close(loop.weight.grad, expected)


class Packing(Loop):
    """Takes `latents` and lays them out anew, as Flux inpainting does: the same shape, other places."""

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, latents: Tensor | None = None, **options: Any) -> Tensor:  # type: ignore[override]
        x = self.first(None) if latents is None else latents
        return super().__call__(num_inference_steps, latents=x.flip(-1), **options)


@pytest.mark.parametrize("name", ["ddim", "flow_match", "euler_ancestral"])
@pytest.mark.parametrize("steps", [None, [1]])
def test_latents_that_are_packed_again_are_never_scored_in_silence(name: str, steps: list[int] | None) -> None:
    scheduler, options = sampler(name)
    loop = Packing(scheduler)
    trajectory = recorded(loop, num_inference_steps=STEPS, **options)
    chosen = steps or trajectory.stochastic.nonzero().flatten().tolist()
    call: dict[str, Any] = {"num_inference_steps": STEPS, **options}
    if name == "flow_match":  # the others take the state that scale_model_input hands over
        with pytest.raises(ValueError, match="another state than the recorded one"):
            replay(loop, trajectory, steps=steps, call=call)
    else:
        found = replay(loop, trajectory, steps=steps, call=call)
        assert torch.equal(found[:, chosen], trajectory.log_prob[:, chosen])
    found = replay(loop, trajectory, steps=steps, entry="step", call=call)
    assert torch.equal(found[:, chosen], trajectory.log_prob[:, chosen])


def test_functions_are_replayed_with_a_scheduler_and_refused_without() -> None:
    scheduler, _ = sampler("ddim")

    @torch.no_grad()
    def loop(n: int, latents: Tensor | None = None) -> Tensor:
        scheduler.set_timesteps(n)
        x = torch.randn(SHAPE) if latents is None else latents
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, eta=1.0).prev_sample
        return x

    with TrajectoryRecorder(scheduler) as recorder:
        loop(STEPS)
    trajectory = recorder.trajectory
    for wrong in (loop, lambda: None, scheduler):
        with pytest.raises(TypeError, match=r"`\.scheduler` whose class has a `__call__`"):
            replay(wrong, trajectory, n=STEPS)
    loop.scheduler = scheduler  # type: ignore[attr-defined]
    assert torch.equal(replay(loop, trajectory, n=STEPS), trajectory.log_prob)


def test_arguments_called_like_those_of_replay_go_into_call() -> None:
    whole = inspect.unwrap(Loop.__call__)

    class Colliding(Loop):
        def __call__(self, steps: int, grad: str, dtype: str, entry: int, call: int, latents: Any = None) -> Tensor:  # type: ignore[override]
            assert (grad, dtype, entry, call) == ("a", "b", 1, 2)
            return whole(self, steps, latents=latents, eta=1.0)

    loop = Colliding(sampler("ddim")[0], torch.float64)
    own: dict[str, Any] = {"steps": STEPS, "grad": "a", "dtype": "b", "entry": 1, "call": 2}
    trajectory = recorded(loop, **own)
    assert torch.equal(
        replay(loop, trajectory, dtype=torch.float32, steps=[1], call=own)[:, 1], trajectory.log_prob[:, 1]
    )
    replay_backward(loop, trajectory, torch.ones(BATCH, STEPS), call=own)
    assert loop.net.weight.grad is not None


POSITIONAL: list[Callable[..., Any]] = [
    lambda s, e, t, x: s.step(e, t, x, 1.0)[0],
    lambda s, e, t, x: s.step(e, t, x, 1.0, False, generators(first=9 + int(t)))[0],
    lambda s, e, t, x: s.step(e, t, x, 1.0, False, None, torch.randn(SHAPE, generator=generators(first=int(t))[0]))[0],
    lambda s, e, t, x: s.step(model_output=e, timestep=t, sample=x, eta=1.0).prev_sample,
    lambda s, e, t, x: s.step(sample=x, eta=1.0, timestep=int(t), model_output=e, return_dict=False)[0],
    lambda s, e, t, x: s.step(e, t, x.transpose(0, 1).contiguous().transpose(0, 1), eta=0.5)[0],
    lambda s, e, t, x: s.step(e.contiguous(memory_format=torch.channels_last), t, x, eta=1.0)[0],
]


@pytest.mark.parametrize("way", range(len(POSITIONAL)))
def test_every_way_of_calling_step(way: int) -> None:
    class Ways(Loop):
        @torch.no_grad()
        def __call__(self, latents: Tensor | None = None) -> Tensor:  # type: ignore[override]
            self.scheduler.set_timesteps(STEPS)
            x = self.first(None) if latents is None else latents
            for t in self.scheduler.timesteps:
                x = POSITIONAL[way](self.scheduler, self.net(x), t, x)
            return x

    loop = Ways(sampler("ddim")[0])
    torch.manual_seed(1)
    plain = loop()
    trajectory = recorded(loop)
    assert torch.equal(plain, trajectory.x_0)
    # Noise given as one draw for all rows is that of three rows all the same.
    assert squared_innovations(trajectory) == pytest.approx([1.0] * len(squared_innovations(trajectory)), abs=0.15)
    assert torch.equal(replay(loop, trajectory), trajectory.log_prob)


def test_the_deviation_follows_whatever_step_depends_on() -> None:
    """Recorded one after the other on one scheduler: eta by position and by name, an attribute outside the config."""

    class Level(diffusers.DDIMScheduler):  # type: ignore[misc]
        level = 1.0

        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **(kwargs | {"eta": self.level}))

    scheduler = Level.from_config(sampler("ddim")[0].config)
    loop = Loop(scheduler)
    for level in (1.0, 0.3, 0.7, 1.0):
        scheduler.level = level
        trajectory = recorded(loop, num_inference_steps=STEPS)
        assert squared_innovations(trajectory) == pytest.approx([1.0] * (STEPS - 1), abs=0.15)
        assert torch.equal(replay(loop, trajectory, num_inference_steps=STEPS), trajectory.log_prob)
    scheduler.level = 0.9
    with pytest.raises(ValueError, match=r"Step 0 was recorded with standard deviation .* another eta, scheduler"):
        replay(loop, trajectory, num_inference_steps=STEPS)


def test_another_eta_or_scheduler_is_refused_in_replay() -> None:
    scheduler, _ = sampler("ddim", clip_sample=False)
    loop = Loop(scheduler)
    trajectory = recorded(loop, num_inference_steps=STEPS, eta=1.0)
    for eta in (0.0, 0.5, 0.999):
        with pytest.raises(ValueError, match=r"Step 0 was recorded with standard deviation"):
            replay(loop, trajectory, num_inference_steps=STEPS, eta=eta)
        with pytest.raises(ValueError, match=r"Step 2 was recorded with standard deviation"):
            replay(loop, trajectory, steps=[2], num_inference_steps=STEPS, eta=eta)
    other = Loop(
        diffusers.DDPMScheduler(
            **{k: v for k, v in scheduler.config.items() if k.startswith("beta")}, variance_type="fixed_large"
        )
    )
    with pytest.raises(ValueError, match="was recorded with standard deviation"):
        replay(other, trajectory, num_inference_steps=STEPS)


class Momentum(diffusers.DDIMScheduler):  # type: ignore[misc]
    """A scheduler of somebody's own that remembers the last network output."""

    last: Tensor | None = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.last = None
        super().set_timesteps(*args, **kwargs)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        mixed = model_output if self.last is None else 0.5 * (model_output + self.last)
        self.last = model_output
        return super().step(mixed, timestep, sample, **(kwargs | {"eta": 1.0}))


def test_what_a_scheduler_remembers_is_replayed_or_refused() -> None:
    loop = Loop(Momentum(clip_sample=False))
    trajectory = recorded(loop, num_inference_steps=STEPS)
    assert torch.equal(replay(loop, trajectory, num_inference_steps=STEPS), trajectory.log_prob)
    with pytest.raises(ValueError, match="keeps last from step to step"):
        replay(loop, trajectory, steps=[1, 3], num_inference_steps=STEPS)
    with pytest.raises(ValueError, match="keeps last from step to step"):
        replay_backward(loop, trajectory, torch.ones(BATCH, STEPS), num_inference_steps=STEPS)
    assert loop.net.weight.grad is None


def test_noise_that_is_not_independent_is_refused() -> None:
    class Offset(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
            x = super().step(model_output, timestep, sample, eta=0.0, return_dict=False)[0]
            return (x + torch.randn(x.shape) + 0.1 * torch.randn(*x.shape[:2], 1, 1),)

    with pytest.raises(ValueError, match="not independent in each dimension"), TrajectoryRecorder(Offset()) as recorder:
        Loop(recorder.scheduler)(STEPS)


def test_what_the_loop_writes_over_is_kept_or_refused() -> None:
    scheduler, _ = sampler("ddim")

    def chain(between: Callable[[Tensor], Tensor], after: Callable[[Tensor], Any]) -> Trajectory:
        scheduler.set_timesteps(STEPS)
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), TrajectoryRecorder(scheduler) as recorder:
            for t in scheduler.timesteps:
                g = torch.Generator().manual_seed(int(t))
                x = between(scheduler.step(torch.tanh(x), t, x, eta=1.0, generator=g).prev_sample)
            after(x)
        return recorder.trajectory

    plain = chain(lambda x: x, lambda x: None)
    buffer = torch.empty(SHAPE)
    for between in (lambda x: buffer.copy_(x), lambda x: x.clone(), lambda x: x.view(SHAPE)):
        for after in (lambda x: x.mul_(0), lambda x: None):
            found = chain(between, after)
            assert torch.equal(found.x, plain.x)
            assert torch.equal(found.log_prob, plain.log_prob)
    for changed in (lambda x: x.mul_(1.01), lambda x: x * 1.01, lambda x: x.clamp_(-0.5, 0.5)):
        with pytest.raises(ValueError, match="changed between steps"):
            chain(changed, lambda x: None)


def test_different_timesteps_in_one_batch_are_refused() -> None:
    scheduler, _ = sampler("wuerstchen")
    scheduler.set_timesteps(STEPS)
    x = torch.randn(SHAPE)
    with TrajectoryRecorder(scheduler), pytest.raises(ValueError, match="different timesteps in one batch"):
        scheduler.step(x, scheduler.timesteps[:BATCH], x)


@pytest.mark.parametrize("broken", ["network", "state", "inside"])
def test_nan_is_called_nan_where_it_arises(broken: str) -> None:
    class Broken(Loop):
        bad = False

        @torch.no_grad()
        def __call__(self, latents: Tensor | None = None) -> Tensor:  # type: ignore[override]
            self.scheduler.set_timesteps(STEPS)
            x = self.first(None) if latents is None else latents
            for i, t in enumerate(self.scheduler.timesteps):
                e = self.net(x)
                if self.bad and i == 2:
                    e = e * (torch.nan if broken == "network" else 1)
                    if broken == "inside":
                        e[0, 0, 0, 0] = torch.inf
                    x = x * torch.nan if broken == "state" else x
                x = self.scheduler.step(e, t, x, eta=1.0).prev_sample
            return x

    loop = Broken(sampler("ddim", clip_sample=False)[0])
    trajectory = recorded(loop)
    loop.bad = True
    what = "The network answered NaN or infinity at timestep 400"
    if broken == "state":
        with pytest.raises(ValueError, match=r"changed between steps.*hold NaN"):
            recorded(loop)
        return
    with pytest.raises(ValueError, match=what):
        recorded(loop)
    with pytest.raises(ValueError, match=what):
        replay(loop, trajectory)
    with pytest.raises(ValueError, match=what):
        replay_backward(loop, trajectory, torch.ones(BATCH, STEPS))


def test_a_step_that_overflows_in_half_precision_is_named() -> None:
    loop = Loop(sampler("ddim", clip_sample=False)[0], torch.float16)
    latents = torch.full(SHAPE, 3e4, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"NaN or infinity"):
        recorded(loop, num_inference_steps=STEPS, latents=latents, eta=1.0)


def test_a_network_without_gradients_is_named() -> None:
    class Inner(Loop):
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                return super().__call__(*args, **kwargs)

    loop = Inner(sampler("ddim")[0])
    trajectory = recorded(loop, num_inference_steps=STEPS, eta=1.0)
    with pytest.raises(ValueError, match="does not require gradients"):
        replay_backward(loop, trajectory, torch.ones(BATCH, STEPS), num_inference_steps=STEPS, eta=1.0)


@pytest.mark.parametrize("name", ["sde_dpm_1", "euler_ancestral", "ddim", "lcm"])
def test_chains_that_are_the_end_of_a_schedule(name: str) -> None:
    """As image-to-image pipelines make them: the whole, a part, and a last step without noise."""
    scheduler, options = sampler(name)

    class Late(Loop):
        @torch.no_grad()
        def __call__(self, begin: int, latents: Tensor | None = None) -> Tensor:  # type: ignore[override]
            scheduler.set_timesteps(10)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            x = self.first(None) if latents is None else latents
            for t in scheduler.timesteps[begin:]:
                x = scheduler.step(self.net(scheduler.scale_model_input(x, t)), t, x, **options)[0]
            return x

    loop = Late(scheduler)
    for begin in (0, 4, 8):
        trajectory = recorded(loop, begin=begin)
        assert trajectory.steps == 10 - begin
        assert torch.equal(replay(loop, trajectory, begin=begin), trajectory.log_prob)
        chosen = trajectory.stochastic.nonzero().flatten().tolist()[-2:]
        part = replay(loop, trajectory, steps=chosen, begin=begin)
        assert torch.equal(part[:, chosen], trajectory.log_prob[:, chosen])
