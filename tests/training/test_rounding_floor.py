"""The rounding floor: what it is, that measuring it leaves no trace, when it is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.sampling.batch import Batch
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.rounding_floor import asked_tilt, check_floor, moved, reduced_precision, rounding_floor
from diffusion_rtb.training.trainer import Trainer
from tests.oracles.behaving import run
from tests.oracles.tiny import save_tiny
from tests.training.test_trainer import lines, run_config

ON_POLICY: list[dict[str, Any]] = []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("floor") / "prior")


def trainer(folder: Path, out: Path, dtype: str, **sections: Any) -> Trainer:
    """With guidance 5, which multiplies rounding, too."""
    config = run_config(folder, out, **({"behaviours": ON_POLICY} | sections))
    chosen = {"dtype": dtype, "guidance": 5.0, "tilted_prior": "guided"}
    return assemble(config.model_copy(update={"prior": config.prior.model_copy(update=chosen)}))


def of_prior(made: Trainer, count: int) -> Batch:
    return made.sampler.draw([k % 3 for k in range(count)], list(range(count)), of_prior=True)


def test_it_is_the_kl_that_the_log_densities_show(folder: Path, tmp_path: Path) -> None:
    """E_p[log_p - log_q] = KL(p || q) of Normals, which of equal variances is KL(q || p); log_p - log_q has variance 2·KL.

    And the network is the prior: float32 shows next to nothing of the change.
    """
    floors = {}
    for dtype in ("float32", "float16", "bfloat16"):
        made = trainer(folder, tmp_path / dtype, dtype)
        made.sampler.micro_batch = 48
        own = of_prior(made, 48)
        floors[dtype] = rounding_floor(made.sampler, own)
        with moved(made.prior.parameters()):
            scored = made.sampler.completed(own)
        assert scored.log_q is not None
        assert scored.log_p is not None
        log_ratio = (scored.log_p - scored.log_q).sum(1)
        assert abs(float(log_ratio.mean()) - floors[dtype]) < 5 * (2 * floors[dtype] / 48) ** 0.5
        assert float(log_ratio.var()) == pytest.approx(
            2 * floors[dtype], rel=1.0
        )  # 48 squares: a fifth, and not all floors alike
    assert floors["float32"] < 1e-4
    assert 0.1 < floors["float16"] / floors["bfloat16"] * 64 < 10  # 3 bits more: 2^-6 of the squares


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_logged_where_there_is_one_and_leaves_no_trace(
    dtype: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"iterations": 2, "rounding_share": None, "parity_tolerance": 100.0}
    measuring = trainer(folder, tmp_path / "with", dtype, train=train)
    measuring.fit()
    monkeypatch.setattr("diffusion_rtb.training.trainer.first_floor", lambda *_: {})
    trainer(folder, tmp_path / "without", dtype, train=train).fit()
    rows, expected = lines(tmp_path / "with" / "tiny"), lines(tmp_path / "without" / "tiny")
    floor = rows[0].pop("rounding_floor", None)
    assert rows == expected
    assert (floor is None) == (dtype == "float32")
    assert floor is None or floor > 0


def test_parameters_and_random_states_are_as_they_were(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, "bfloat16")
    own = of_prior(made, 4)
    before = {name: parameter.detach().clone() for name, parameter in made.prior.parameters().items()}
    state = torch.get_rng_state()
    first = rounding_floor(made.sampler, own)
    assert rounding_floor(made.sampler, own) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.prior.parameters().items())


def test_a_run_that_would_be_rounding_is_refused_before_its_first_update(folder: Path, tmp_path: Path) -> None:
    made = trainer(folder, tmp_path, "bfloat16", beta=1e-6)
    before = {name: parameter.detach().clone() for name, parameter in made.prior.parameters().items()}
    with pytest.raises(
        ValueError, match=r"bfloat16 network has a rounding floor of .* nats.*rounding_share=1.*float32.*float16"
    ):
        made.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in made.prior.parameters().items())
    budget = {"value": 1.0, "kl_budget": {"nats": 1e-6}}
    with pytest.raises(ValueError, match=r"tilt asked for .* is 1e-06 nats"):
        trainer(folder, tmp_path / "budget", "bfloat16", beta=budget).step()


def test_what_is_refused_and_what_is_warned_of() -> None:
    with pytest.raises(ValueError, match=r"floor of 3\.1 nats.* is 3 nats.*more than train\.rounding_share=1"):
        check_floor(3.1, 3.0, 1.0, "bfloat16")
    with pytest.warns(UserWarning, match=r"The TF32 network has a rounding floor of 2\.9 nats"):
        check_floor(2.9, 3.0, 1.0, "TF32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_floor(0.29, 3.0, 1.0, "bfloat16")
        check_floor(100.0, 3.0, None, "bfloat16")  # not judged
        check_floor(100.0, 0.0, 1.0, "bfloat16")  # rewards all alike: nothing is asked for


def test_the_tilt_is_beta_times_the_deviation_within_prompts(tmp_path: Path) -> None:
    made = run(tmp_path, beta=1.5)
    own = of_prior_vectors(made, [1.0, 3.0, 10.0, 16.0], [0, 0, 1, 1])
    assert asked_tilt(made.config, own) == pytest.approx(1.5 * ((1.0 + 9.0) / 2) ** 0.5)
    budgeted = run(tmp_path / "b", beta={"value": 1.0, "kl_budget": {"nats": 2.5}})
    assert asked_tilt(budgeted.config, own) == 2.5


def of_prior_vectors(made: Trainer, reward: list[float], prompt: list[int]) -> Batch:
    own = made.sampler.draw([0] * len(reward), list(range(len(reward))), of_prior=True)
    return replace(own, reward=torch.tensor(reward), prompt=torch.tensor(prompt))


def test_what_counts_as_reduced_precision(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {d: reduced_precision(trainer(folder, tmp_path / d, d).prior) for d in ("float32", "float16", "bfloat16")}
    assert found == {"float32": None, "float16": "float16", "bfloat16": "bfloat16"}
    assert reduced_precision(run(tmp_path / "vectors").prior) is None
    prior = trainer(folder, tmp_path / "exact", "float32").prior
    monkeypatch.setattr(type(prior), "device", torch.device("cuda"))
    for allowed, expected in ((False, None), (True, "TF32")):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert reduced_precision(prior) == expected
