"""Each way to steer against what is known of it on a Gaussian."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from diffusion_rtb.chain.rollout import rollout
from diffusion_rtb.chain.seeds import generators, seed_of
from diffusion_rtb.config.components import describe
from diffusion_rtb.steering import Aim, Method, Particles, State, steered
from diffusion_rtb.steering._learned import value_of
from diffusion_rtb.steering._opening import open_steerable
from diffusion_rtb.steering.rlg import RLG
from diffusion_rtb.steering.smc import SMC
from diffusion_rtb.steering.svdd import SVDD
from diffusion_rtb.steering.value_guidance import ValueGuidance
from pipelines._analytic.linear_gaussian import Tilt
from pipelines.gaussian import Gaussian
from rewards.density import Density
from tests.oracles.behaving import run
from tests.oracles.tiny import tiny_stable_diffusion

LINEAR: dict[str, Any] = {"linear": [0.8, -0.5]}
QUADRATIC: dict[str, Any] = {"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]}
BETA, STEPS = 1.3, 8


def prior() -> Gaussian:
    made = Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]], steps=STEPS, dtype="float64")
    made.load_weights()
    made.attach()
    return made


def exact_value(tilt: Tilt, state: State) -> Tensor:
    """V of a state, in closed form."""
    return tilt.log_f[state.step](state.x_t) / BETA


def around(method: Method, reward: dict[str, Any], groups: int) -> tuple[Particles, Tilt]:
    """Samples of a method that is told the exact value."""
    made = prior()
    tilt, rows = made.solve(BETA, **reward), groups * method.particles
    judge = Density(reward)
    aim = Aim(lambda x: judge(made.decode(x), []), BETA, partial(exact_value, tilt))
    drawn = generators([seed_of(k) for k in range(rows)])
    with made.as_prior(), method.around(made.pipe, aim, generators=drawn) as chain:
        made.pipe(**made.arguments([""] * rows), generator=drawn)
    return chain, tilt


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_of_a_linear_reward_the_mixture_is_the_posterior_of_another_strength(weight: float) -> None:
    made, other = prior(), prior()
    made.set_posterior(made.solve(BETA, **LINEAR).best)
    other.set_posterior(other.solve(weight * BETA, **LINEAR).best)
    mixed = steered(made, Density(LINEAR), RLG(weight), [""] * 4, range(4), BETA)
    expected = rollout(other, [""] * 4, [seed_of(seed, "particle", 0) for seed in range(4)])
    torch.testing.assert_close(mixed.trajectory.x, expected.x, rtol=0, atol=1e-10)
    assert mixed.log_z is None
    torch.testing.assert_close(made.chain().b, made.solve(BETA, **LINEAR).best.b)  # put back


def test_a_stock_pipeline_mixes_what_its_lora_does() -> None:
    pipe, aim = tiny_stable_diffusion(), Aim(lambda x: x.flatten(1)[:, 0], 1.0)

    def drawn() -> Tensor:
        call = {"num_inference_steps": 1, "eta": 1.0, "output_type": "latent", "guidance_scale": 3.0}
        found: Tensor = pipe("a cat", generator=torch.Generator().manual_seed(0), **call).images
        return found

    with pytest.raises(ValueError, match="no active LoRA"), RLG(1.5).around(pipe, aim):
        drawn()
    before = drawn()
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_v"], init_lora_weights=False))
    after = drawn()
    assert float((after - before).abs().max()) > 1e-3
    for weight in (0.0, 1.0, 1.5):
        with RLG(weight).around(pipe, aim):
            mixed = drawn()
        torch.testing.assert_close(mixed, before + weight * (after - before), rtol=1e-4, atol=1e-4)  # a step is linear
    torch.testing.assert_close(drawn(), after)


def test_guidance_by_an_exact_linear_value_is_the_posterior() -> None:
    chain, tilt = around(ValueGuidance(), LINEAR, 6)
    made = prior()
    made.set_posterior(tilt.best)
    drawn = generators([seed_of(k) for k in range(6)])
    with SMC(6, threshold=0.0).around(made.pipe, Aim(lambda x: x[:, 0], 1.0), generators=drawn) as posterior:
        made.pipe(**made.arguments([""] * 6), generator=drawn)
    x, steps = chain.trajectory.x, posterior.steps
    expected = torch.stack([step.x_s for step in steps[:-1]], dim=1)
    torch.testing.assert_close(x[:, 1:-1], expected, rtol=0, atol=1e-9)  # the step to x_0 is the prior's
    assert chain.trajectory.log_behaviour is not None
    torch.testing.assert_close(
        chain.trajectory.log_behaviour[:, :-1], tilt.best.log_prob(x)[:, :-1], rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(chain.trajectory.log_prob, tilt.p.log_prob(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [ValueGuidance(), ValueGuidance(particles=6, threshold=0.9), SVDD(4), SMC(6, threshold=0.9)],
    ids=["1", "6", "svdd", "smc"],
)
@pytest.mark.usefixtures("shapes_unchecked")
def test_log_z_has_no_bias_whatever_draws(method: Method) -> None:
    chain, tilt = around(method, QUADRATIC, 300)
    z, exact = chain.log_z.exp(), math.exp(tilt.log_z)
    error = float(z.std()) / math.sqrt(300)
    assert error < 0.06 * exact
    assert abs(float(z.mean()) - exact) < 3.5 * error


@pytest.mark.usefixtures("shapes_unchecked")
def test_proposals_that_are_drawn_by_the_exact_value_lead_to_the_posterior_and_the_best_do_not() -> None:
    _, tilt = around(SVDD(2), QUADRATIC, 1)
    exact = float(tilt.beta_r.expectation(*tilt.end)) / BETA
    missed = []
    for method in (SVDD(2), SVDD(24), SVDD(24, "best")):
        reward = around(method, QUADRATIC, 200)[0].reward[:: method.particles]
        missed.append((float(reward.mean()) - exact) / (float(reward.std()) / math.sqrt(200)))
    assert missed[0] < -4  # in standard errors
    assert abs(missed[1]) < 3
    assert missed[2] > 8


def test_the_best_say_nothing_of_log_z() -> None:
    chain, _ = around(SVDD(2, "best"), LINEAR, 1)
    with pytest.raises(RuntimeError, match="says nothing of log Z"):
        _ = chain.log_z


def test_both_values_are_mixed_by_the_signal() -> None:
    x = torch.randn(3, 2)

    def network(x_t: Tensor, t: Tensor, features: Tensor) -> Tensor:
        return x_t.sum(1) + t + features[:, 0]

    def reward(x_0: Tensor) -> Tensor:
        return x_0.prod(1)

    state, features = State(x, 7.0, 0, 0.25, lambda: 3 * x), torch.arange(3.0)[:, None]
    learned = x.sum(1) + 7 + torch.arange(3.0)
    found = {kind: value_of(kind, network, features, reward) for kind in ("reward", "learned", "both")}
    assert found["reward"] is None
    assert found["learned"] is not None
    assert found["both"] is not None
    torch.testing.assert_close(found["learned"](state), learned)
    torch.testing.assert_close(found["both"](state), 0.25 * (3 * x).prod(1) + 0.75 * learned)
    with pytest.raises(ValueError, match="needs a V that was learned"):
        value_of("both", None, features, reward)


def test_a_run_hands_over_the_value_that_it_learned(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        reward=QUADRATIC,
        objective={"component": "trust_pcl", "length": 1, "warm_up_updates": 5},
        train={"iterations": 1},
        posterior={},
    )
    trainer.fit()
    method = SMC(4, value="learned")
    opened = open_steerable(tmp_path / "known", "latest", method)
    made = opened.prior()
    learned = opened.learned(made)
    assert learned is not None
    x, t, none = torch.randn(5, 2), torch.full((5,), 3.0), torch.zeros(5, 0)
    torch.testing.assert_close(learned(x, t, none), trainer.objective.value(x, t, none))  # type: ignore[attr-defined]
    found = steered(made, opened.reward(), method, [""], [0], opened.beta, learned=learned)
    assert found.trajectory.batch == 4
    guided = steered(made, opened.reward(), ValueGuidance(), [""] * 2, [0, 1], opened.beta, learned=learned)
    assert not torch.equal(guided.trajectory.log_prob, guided.trajectory.drawn_with)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"component": "rlg"}, "mixes a posterior with its prior, and here is a prior alone"),
        ({"component": "value_guidance"}, "needs a V, and this is no trained run.*steering: smc"),
        ({"component": "smc", "value": "both"}, "value 'both' needs a V.*or use value: reward"),
    ],
)
def test_what_a_config_alone_lacks_is_refused_before_anything_loads(component: dict[str, Any], message: str) -> None:
    method = describe(component, "steering").build()
    with pytest.raises(ValueError, match=message):
        open_steerable(Path("configs/quickstart.yaml"), "latest", method)


@pytest.mark.parametrize(
    "component",
    [
        {"component": "svdd", "choice": "argmax"},
        {"component": "rlg", "weight": -1},
        {"component": "value_guidance", "scale": 0},
        {"component": "smc", "value": "v"},
        {"component": "smc", "threshold": 1.5},
    ],
)
def test_settings_out_of_range_are_refused(component: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(key for key in component if key != "component")):
        describe(component, "steering").build()


def test_a_value_of_x_t_is_asked_for_its_gradient() -> None:
    with pytest.raises(ValueError, match="gradient of a value of x_t itself"):
        ValueGuidance().around(tiny_stable_diffusion(), Aim(lambda x: x.flatten(1)[:, 0], 1.0))
