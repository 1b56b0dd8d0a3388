"""The reward's gradient through the last steps, against autograd through the whole chain and chains known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffusion_rtb.chain.noise import ProbeNoise
from diffusion_rtb.not_finite import NotFiniteError
from diffusion_rtb.objectives.reward_backprop import RewardBackprop
from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.pathwise import Pathwise
from tests.oracles.behaving import BETA, QUADRATIC, begin_at_the_posterior, known, run

pytestmark = pytest.mark.usefixtures("shapes_unchecked_in_module")


def following(out: Path, steps: int = 4, train: dict[str, Any] | None = None, **sections: Any) -> Trainer:
    objective = {"component": "reward_backprop"} | sections.pop("objective", {})
    prior = {"steps": steps, "dtype": "float64"} | sections.pop("prior", {})
    return run(out, objective=objective, prior=prior, train=train or {}, **sections)


def disturb(trainer: Trainer) -> None:
    """Some posterior that is neither the prior nor the best chain."""
    for parameter in trainer.prior.parameters().values():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in trainer.prior.parameters().items() if p.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


def whole_graph(trainer: Trainer, batch: Batch, last: int) -> Tensor:
    """The loss by a loop of its own over the stock scheduler, all steps in one graph, from x_{T-K} on, with the recorded noise."""
    pipe, chain, sampler = trainer.prior.pipe, batch.trajectory, trainer.prior.pipe.scheduler
    steps, loss = chain.steps, torch.zeros((), dtype=torch.float64)
    sampler.set_timesteps(steps)
    eta = {"eta": 1.0} if isinstance(sampler, DDIMScheduler) else {}

    def mean(x: Tensor, t: Tensor) -> Tensor:
        with ProbeNoise(0.0):
            found: Tensor = sampler.step(pipe.denoiser(x, t), t, x, **eta).prev_sample
        return found

    x = chain.x[:, steps - last]
    for i in range(steps - last, steps):
        t, std = sampler.timesteps[i], float(chain.std[i])
        mean_q = mean(x, t)
        with trainer.prior.as_prior():
            mean_p = mean(x, t)
        with torch.no_grad():
            noise = chain.x[:, i + 1] - mean(chain.x[:, i], t)
        if std > 0:
            loss = loss + (mean_q - mean_p).square().sum() / (2 * std**2)
        x = mean_q + noise
    reward = trainer.sampler.reward(pipe.denoiser.data_units(x), [""] * len(batch))
    return (loss - BETA * reward.sum()) / len(batch)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_the_gradient_is_that_of_the_whole_graph(last: int, tmp_path: Path) -> None:
    trainer = following(tmp_path, reward=QUADRATIC)
    disturb(trainer)
    batch = trainer.sampler.draw([0] * 12, list(range(12)))  # in two micro-batches of 8 and 4
    loss = whole_graph(trainer, batch, last)
    loss.backward()
    expected = gradients(trainer)
    found = Pathwise(trainer.sampler, BETA).push(batch, last)
    assert found == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, gradient in gradients(trainer).items():
        assert float(expected[name].abs().max()) > 0.1
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_steps_without_noise_are_passed_through(tmp_path: Path) -> None:
    """DDPM's last step is a map, the same for prior and posterior."""
    trainer = following(tmp_path, reward=QUADRATIC, prior={"scheduler": "DDPMScheduler"})
    disturb(trainer)
    batch = trainer.sampler.draw([0] * 8, list(range(8)))
    silent = (batch.trajectory.std == 0).nonzero().flatten().tolist()
    whole_graph(trainer, batch, 4).backward()
    expected = gradients(trainer)
    Pathwise(trainer.sampler, BETA).push(batch, 4)
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
    assert silent == [3]


@pytest.mark.parametrize("last", [2, 4])
def test_the_best_chain_is_where_nothing_pulls(last: int, tmp_path: Path) -> None:
    """With a linear reward the gradient of every single trajectory is 0 there, for the tail alone as well; the prior's is not."""
    trainer = following(tmp_path)
    batch = trainer.sampler.draw([0] * 8, list(range(8)))
    Pathwise(trainer.sampler, BETA).push(batch, last)
    moved = [name for name, gradient in gradients(trainer).items() if float(gradient.abs().max()) > 0.1]
    assert moved == ["slope", "offset"]
    assert [bool(row.any()) for row in gradients(trainer)["offset"].flip(0)] == [i >= 4 - last for i in range(4)]
    begin_at_the_posterior(trainer)
    batch = trainer.sampler.draw([0] * 8, list(range(8)))
    Pathwise(trainer.sampler, BETA).push(batch, last)
    assert all(float(gradient.abs().max()) < 1e-5 for gradient in gradients(trainer).values())


def test_the_loss_is_the_reverse_kl_less_log_z(tmp_path: Path, shapes_unchecked: None) -> None:
    """At the best chain of a quadratic reward its mean is -ELBO, in closed form, and nothing pulls on average."""
    trainer = following(tmp_path, reward=QUADRATIC)
    trainer.sampler.micro_batch = 512
    found: dict[str, list[Any]] = {"prior": [], "best": []}
    for name in found:
        for first in range(0, 2048, 512):
            batch = trainer.sampler.draw([0] * 512, list(range(first, first + 512)))
            found[name].append((Pathwise(trainer.sampler, BETA).push(batch, 4), gradients(trainer)))
        begin_at_the_posterior(trainer)
    losses = torch.tensor([loss for loss, _ in found["best"]])
    error = float(losses.std()) / 2
    assert error < 0.05
    assert float(losses.mean()) == pytest.approx(-known(trainer).best_elbo, abs=4 * error)
    for name in ("slope", "offset"):
        mean = {where: torch.stack([grads[name] for _, grads in pushed]).mean(0) for where, pushed in found.items()}
        assert float(mean["best"].norm()) < 0.03 * float(mean["prior"].norm())


class Live:
    """Bytes that graphs hold for their backward passes: the most there ever were."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> Live:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Any:
        self.now += tensor.nbytes
        self.most = max(self.most, self.now)
        return Held(self, tensor)


class Held:
    def __init__(self, live: Live, tensor: Tensor) -> None:
        self.live, self.tensor = live, tensor

    def __del__(self) -> None:
        self.live.now -= self.tensor.nbytes


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Batch]:
    trainer = following(tmp_path_factory.mktemp("long"), steps=16, reward=QUADRATIC)
    return trainer, trainer.sampler.draw([0] * 8, list(range(8)))


def test_memory_does_not_grow_with_the_steps(long: tuple[Trainer, Batch]) -> None:
    trainer, batch = long
    most = {}
    for last in (2, 16):
        with Live() as live:
            Pathwise(trainer.sampler, BETA).push(batch, last)
        most[last] = live.most
        assert live.now == 0
    assert most[2] == most[16] > 0
    with Live() as live:
        whole_graph(trainer, batch, 16).backward()
    assert live.most > 8 * most[16]


def test_random_windows_are_drawn_evenly() -> None:
    objective, generator = RewardBackprop(5, random=True), torch.Generator().manual_seed(0)
    drawn = torch.tensor([objective.last(9, generator) for _ in range(4000)])
    assert drawn.unique().tolist() == [1, 2, 3, 4, 5]
    assert float((torch.bincount(drawn)[1:] / 4000 - 0.2).abs().max()) < 0.03
    assert [RewardBackprop().last(9, generator), RewardBackprop(3).last(9, generator)] == [9, 3]


JPEG: dict[str, Any] = {"component": "jpeg"}
SUM: dict[str, Any] = {"component": "weighted_sum", "rewards": [{"component": "brightness"}, JPEG]}
CACHED: dict[str, Any] = {"component": "cached", "reward": {"component": "density", "density": QUADRATIC}}
CLASSIFIER: dict[str, Any] = {"component": "classifier", "target": 0, "classes": ["a", "b"]}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (JPEG, "reward 'jpeg' has none: the size of a file is a whole number"),
        (SUM, "reward 'weighted_sum' has none: 'jpeg' in it has none: the size of a file"),
        (CACHED, "reward 'cached' has none: it remembers numbers"),
        ({"component": "ocr", "text": "open"}, "reward 'ocr' has none: what it recognises"),
        (CLASSIFIER, "reward 'classifier' has none: its argument grad is false: set grad: true"),
        (
            {"component": "remote", "servers": "http://127.0.0.1:9"},
            "reward 'remote' has none: its servers answer numbers",
        ),
        ({"component": "constraint", "classifier": CLASSIFIER | {"grad": True}}, "has none: a step has no slope"),
    ],
    ids=["jpeg", "sum", "cached", "ocr", "classifier", "remote", "constraint"],
)
def test_rewards_without_a_gradient_are_refused_by_name(reward: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        following(tmp_path, reward=reward)
    assert not list(tmp_path.iterdir())


def test_a_function_without_a_gradient_is_refused_when_it_answers(tmp_path: Path) -> None:
    trainer = following(tmp_path, reward={"component": "tests.oracles.planted_rewards:detached"})
    with pytest.raises(RuntimeError, match="Reward 'detached' has no gradient: what it answers does not depend"):
        trainer.step()
    assert not any(bool(parameter.any()) for parameter in trainer.prior.parameters().values())


def test_a_gradient_that_is_not_finite_is_no_number(tmp_path: Path) -> None:
    """A comparison leaves such a run out and goes on, as it does where a training diverges."""
    trainer = following(tmp_path, reward={"component": "tests.oracles.planted_rewards:root"})
    with pytest.raises(NotFiniteError, match="'root': the gradient at sample 0 is NaN or infinite"):
        trainer.step()
    assert not any(bool(parameter.any()) for parameter in trainer.prior.parameters().values())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"last_steps": 0}}, "last_steps must be at least 1, or null for all steps; got 0"),
        ({"objective": {"last_steps": 5}}, "last_steps is 5 and the chain has 4 steps: give 4 or fewer"),
        ({"train": {"gradient_steps": 2}}, "train.gradient_steps is for gradients of single steps: set it to null"),
        ({"train": {"updates_per_iteration": 2}}, "is on-policy and has no ratios"),
        ({"behaviours": [{"component": "prior_buffer", "share": 0.5}]}, "is on-policy: its gradient is an average"),
        ({"behaviours": [{"component": "on_policy", "exploration": 0.5}]}, "is on-policy: its gradient is an average"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        following(tmp_path, **sections)
