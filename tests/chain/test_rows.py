"""A sample depends on its own seed, not on its batch: also where a pipeline passes no generator to its scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from diffusion_rtb.chain.continuation import continued
from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import rollout, score
from diffusion_rtb.interfaces import Prior
from tests.oracles.loops import Loop, generators, sampler
from tests.oracles.tiny import tiny_3_arguments, tiny_stable_diffusion_3

PROMPTS = ["a", "b", "c"]


class Flow(Prior):
    """The members of `Prior` that sampling needs, around a flow pipeline; the posterior is a shifted output layer."""

    def __init__(self) -> None:
        self._pipe: Any = tiny_stable_diffusion_3()
        self.bias = self._pipe.transformer.proj_out.bias

    @property
    def pipe(self) -> Any:
        return self._pipe

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dims(self) -> tuple[int, ...]:
        return (4, 8, 8)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        call = tiny_3_arguments(3)
        rows = [PROMPTS.index(prompt) for prompt in prompts]
        return {name: value[rows] if isinstance(value, torch.Tensor) else value for name, value in call.items()}

    @contextmanager
    def shifted(self) -> Iterator[None]:
        with torch.no_grad():
            self.bias += 0.1
            yield
            self.bias -= 0.1


@pytest.fixture(scope="module")
def flow() -> Any:
    return Flow()  # type: ignore[abstract]


@pytest.mark.parametrize("scale", [None, lambda std: 1 + std])
def test_flow_samples_do_not_depend_on_their_batch(flow: Any, scale: Any) -> None:
    whole = rollout(flow, PROMPTS, [7, 8, 9], noise_scale=scale)
    for rows in ([0], [1, 2], [2, 0]):
        part = rollout(flow, [PROMPTS[i] for i in rows], [7 + i for i in rows], noise_scale=scale)
        torch.testing.assert_close(part.x, whole.x[rows], rtol=1e-4, atol=1e-4)
    other = rollout(flow, PROMPTS, [7, 8, 10], noise_scale=scale)
    torch.testing.assert_close(other.x[:2], whole.x[:2], rtol=1e-4, atol=1e-4)
    assert float((other.x[2] - whole.x[2]).abs().max()) > 0.1
    assert torch.equal(score(flow, PROMPTS, whole), whole.log_prob)


def test_continued_flow_samples_do_not_depend_on_their_batch(flow: Any) -> None:
    whole = rollout(flow, PROMPTS, [7, 8, 9])
    for known in (1, 2, 4):
        again = continued(flow, PROMPTS, [17, 18, 19], whole.x[:, :known])
        assert torch.equal(again.x[:, :known], whole.x[:, :known])
        assert torch.equal(score(flow, PROMPTS, again), again.log_prob)
        part = continued(flow, PROMPTS[1:2], [18], whole.x[1:2, :known])
        torch.testing.assert_close(part.x, again.x[1:2], rtol=1e-4, atol=1e-4)


def test_prior_and_posterior_share_their_noise_at_equal_seeds(flow: Any) -> None:
    """z of each step read back from states and deviations: x_s = (1 - s)·x̂ + s·z for this scheduler."""
    prior = rollout(flow, PROMPTS, [7, 8, 9])
    with flow.shifted():
        posterior = rollout(flow, PROMPTS, [7, 8, 9])
    assert float((prior.x - posterior.x)[:, 1:].abs().amax()) > 1e-3
    assert torch.equal(prior.x[:, 0], posterior.x[:, 0])
    torch.manual_seed(0)
    rows = [torch.Generator().manual_seed(seed) for seed in (7, 8, 9)]
    drawn = [torch.cat([torch.randn(1, 4, 8, 8, generator=g) for g in rows]) for _ in range(prior.steps)]
    assert torch.equal(prior.x[:, 0], drawn[0])
    for chain in (prior, posterior):
        for i in range(prior.steps - 1):
            squared = (chain.log_prob[:, i] + 256 * (chain.std[i].double().log() + 0.9189385332046727)) * -2
            expected = drawn[i + 1].double().square().flatten(1).sum(1)
            # fp32 states: a rounding of 1e-7 over a deviation down to 1e-3.
            torch.testing.assert_close(squared, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "flow_match", "lcm"])
def test_noise_from_generators_that_are_passed_is_left_as_it_is(name: str) -> None:
    scheduler, options = sampler(name)
    loop = Loop(scheduler)
    plain = loop(5, generators(), **options)
    rows = generators()
    with TrajectoryRecorder(scheduler, generators=rows):
        assert torch.equal(loop(5, rows, **options), plain)


def test_a_step_that_ignores_its_generator_draws_by_row_all_the_same() -> None:
    scheduler, options = sampler("ddim")

    class Ignoring(type(scheduler)):  # type: ignore[misc]
        def step(self, *args: Any, generator: Any = None, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    samples = []
    for count in (3, 1):
        loop = Loop(Ignoring.from_config(scheduler.config))
        rows = generators(count)
        with TrajectoryRecorder(loop.scheduler, generators=rows):
            samples.append(loop(5, rows, **options))
    torch.testing.assert_close(samples[0][:1], samples[1], rtol=1e-5, atol=1e-5)
