"""The trainer on a real, tiny Stable Diffusion pipeline: deterministic, resumable, killable, and it learns."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.chain.rollout import replay
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.checkpoint import latest_checkpoint, load_checkpoint
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.scoring.call import RewardError
from diffusion_rtb.training.assemble import assemble
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.updates.gradient import loss_of, push_back
from tests.oracles.behaving import differing, gradient_of, rows, run, state
from tests.oracles.several import importing_server
from tests.oracles.tiny import save_tiny

ITERATIONS = 6


@pytest.fixture(scope="session")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "prior")


def run_config(prior: Path, out: Path, **sections: Any) -> RunConfig:
    """A run of a few seconds that uses every kind of state: buffer, learned log Z, exploration, step subsets."""
    data: dict[str, Any] = {
        "name": "tiny",
        "out": str(out),
        "prior": {"component": "stable_diffusion", "path": str(prior), "steps": 4, "device": "cpu"},
        "reward": {"component": "jpeg"},
        "beta": 0.5,
        "objective": {"component": "rtb", "log_z": "per_prompt"},
        "prompts": {"list": ["a cat", "a dog", "a red bus"]},
        "behaviours": [
            {"component": "on_policy", "exploration": 0.1, "until": 5},
            {"component": "prior_buffer", "share": 0.5, "capacity": 4, "refresh": 1},
        ],
        "train": {
            "iterations": ITERATIONS,
            "prompts_per_iteration": 2,
            "group": 4,
            "micro_batch": 4,
            "gradient_steps": 3,
            "checkpoint_every": 2,
            "keep_checkpoints": 3,
            "grid_every": 0,
        },
    }
    for key, value in sections.items():
        data[key] = data[key] | value if isinstance(data.get(key), dict) and isinstance(value, dict) else value
    return RunConfig.model_validate(data)


def lines(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    latest = latest_checkpoint(folder / "checkpoints")
    assert latest is not None
    return load_checkpoint(latest)[0]["posterior"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def uninterrupted(prior_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("straight")
    assemble(run_config(prior_folder, out)).fit()
    return out / "tiny"


def test_a_run_logs_what_it_promises(uninterrupted: Path) -> None:
    rows = lines(uninterrupted)
    assert len(rows) == ITERATIONS
    promised = {
        "parity",
        "reward",
        "elbo",
        "log_z",
        "kl",
        "ess",
        "residual_mean",
        "residual_std",
        "gradient_norm",
        "beta",
    }
    for row in rows:
        assert promised <= row.keys()
        assert all(v == v and abs(v) < 1e9 for v in row.values())
        assert row["parity"] == 0.0, "recorded and replayed log-densities differ"
        assert 0 < row["ess"] <= 1
        assert row["elbo"] == pytest.approx(row["beta"] * row["reward"] - row["kl"], abs=1e-4)


def test_the_first_iteration_is_at_the_prior(uninterrupted: Path) -> None:
    first = lines(uninterrupted)[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-9)
    assert first["elbo"] == pytest.approx(first["beta"] * first["reward"], abs=1e-6)


def test_another_seed_is_another_run(prior_folder: Path, tmp_path: Path, uninterrupted: Path) -> None:
    assemble(run_config(prior_folder, tmp_path, seed=1, train={"iterations": 1})).fit()
    assert lines(tmp_path / "tiny")[0]["reward"] != lines(uninterrupted)[0]["reward"]


def _made(out: Path) -> Trainer:
    """The same kinds of state on vectors, where an iteration takes a few hundredths of a second."""
    sizes = {"iterations": 10, "checkpoint_every": 2, "keep_checkpoints": 3, "prompts_per_iteration": 2}
    behaviours = [
        {"component": "on_policy", "exploration": 0.1, "until": 8},
        {"component": "prior_buffer", "share": 0.5, "capacity": 4, "refresh": 1},
    ]
    objective = {"component": "rtb", "log_z": "per_prompt"}
    return run(out, objective=objective, behaviours=behaviours, prompts={"list": ["a", "b", "c"]}, train=sizes)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = _made(tmp_path_factory.mktemp("known"))
    trainer.fit()
    return trainer


def _signalled(trainer: Trainer, stop: int, number: signal.Signals) -> None:
    """Train, and get what Ctrl-C or a scheduler sends in the middle of an iteration."""
    reward = trainer.sampler.reward

    def called(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        if trainer.iteration == stop and not trainer.interrupted:
            os.kill(os.getpid(), number)
        values: torch.Tensor = reward(images, prompts)
        return values

    trainer.sampler.reward = called
    trainer.fit()
    assert trainer.interrupted


@pytest.mark.usefixtures("shapes_unchecked")
def test_resumed_equals_uninterrupted(prior_folder: Path, tmp_path: Path, uninterrupted: Path) -> None:
    _signalled(assemble(run_config(prior_folder, tmp_path)), 3, signal.SIGINT)
    assert len(lines(tmp_path / "tiny")) == 4, "the iteration was finished"
    assemble(run_config(prior_folder, tmp_path)).fit()
    assert lines(tmp_path / "tiny") == lines(uninterrupted)
    assert same(parameters(tmp_path / "tiny"), parameters(uninterrupted))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_buffer_that_is_being_filled_is_not_waited_for(known: Trainer, tmp_path: Path) -> None:
    """Iteration 1 fills that of a prompt which is new to it."""
    _signalled(_made(tmp_path), 1, signal.SIGTERM)
    again = _made(tmp_path)
    assert len(rows(again)) == 1
    again.fit()
    assert rows(again) == rows(known)
    assert differing(state(again), state(known)) == []


def _train(out: Path) -> None:
    torch.set_num_threads(1)
    _made(out).fit()


@pytest.mark.usefixtures("shapes_unchecked")
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(known: Trainer, tmp_path: Path) -> None:
    context, moments = importing_server(), random.Random(7)
    kills = 0
    for _ in range(12):
        worker = context.Process(target=_train, args=(tmp_path,))
        worker.start()
        started = time.monotonic()
        metrics = tmp_path / "known" / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while worker.is_alive() and kills < 3:  # wait until it trains, then strike somewhere in the next moments
            if metrics.exists() and metrics.stat().st_size != before:
                time.sleep(moments.uniform(0, 0.2))
                break
            time.sleep(0.01)
            assert time.monotonic() - started < 120
        if kills < 3 and worker.is_alive():
            os.kill(worker.pid or 0, signal.SIGKILL)
            kills += 1
        worker.join(120)
        if worker.exitcode == 0:
            break
    assert kills >= 1
    assert worker.exitcode == 0
    again = _made(tmp_path)
    assert rows(again) == rows(known)
    assert differing(state(again), state(known)) == []


def test_the_exact_gradient_of_a_batch_equals_autograd_through_the_objective(
    prior_folder: Path, tmp_path: Path
) -> None:
    """RTB's loss as one graph, log_q of all steps at once, against the trainer's cotangents and micro-batches."""
    config = run_config(prior_folder, tmp_path, objective={"component": "rtb", "log_z": "vargrad"})
    config = config.model_copy(update={"train": config.train.model_copy(update={"gradient_steps": None})})
    trainer = assemble(config)
    perturb(trainer)
    parts = [source.draw(trainer.sampler, [0, 1], count, 0, 0.5) for source, count in trainer.sources.values()]
    parts = [trainer.sampler.completed(part) for part in parts]
    trainer.optimizer.zero_grad()
    terms, _ = loss_of(trainer.sampler, trainer.objective, parts, 0.5)
    assert terms.log_q.grad is not None
    push_back(trainer.sampler, parts, terms.log_q.grad)
    ours = [p.grad.clone() for p in trainer.prior.parameters().values() if p.grad is not None]

    trainer.optimizer.zero_grad()
    live = [
        replay(
            trainer.prior.pipe,
            part.trajectory,
            grad=True,
            dtype=torch.float64,
            **trainer.prior.arguments(trainer.sampler.texts(part.prompt)),
        )
        for part in parts
    ]
    graph = type(terms)(**(vars(terms) | {"log_q": torch.cat(live)}))
    trainer.objective(graph, 0.5).loss.backward()
    expected = [p.grad for p in trainer.prior.parameters().values() if p.grad is not None]
    a, b = (torch.cat([g.flatten() for g in side]) for side in (ours, expected))
    assert float((a - b).norm() / b.norm()) < 1e-5


def perturb(trainer: Trainer, size: float = 0.05) -> None:
    """Move the posterior off the prior."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.prior.parameters().values():
            p.add_(size * torch.randn(p.shape, generator=generator))


def test_random_step_subsets_are_unbiased(prior_folder: Path, tmp_path: Path) -> None:
    """The mean over all subsets of the rescaled gradient is the full gradient."""
    trainer = assemble(run_config(prior_folder, tmp_path))
    perturb(trainer)
    part = trainer.sampler.completed(trainer.sources["prior"][0].draw(trainer.sampler, [0], 4, 0, 0.5))
    cotangent = torch.randn(4, 4, dtype=torch.float64)
    gradients = {}
    for steps in [None, [0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]]:
        trainer.optimizer.zero_grad()
        push_back(trainer.sampler, [part], cotangent, steps=steps)
        key = tuple(steps or ())
        gradients[key] = gradient_of(trainer.prior)
    full = gradients.pop(())
    mean = torch.stack(list(gradients.values())).mean(0)
    torch.testing.assert_close(mean, full, rtol=1e-3, atol=1e-3 * float(full.abs().max()))


def test_the_posterior_loads_back(uninterrupted: Path) -> None:
    trained = open_trained_run(uninterrupted)
    config, prior = trained.config, trained.prior()
    saved = parameters(uninterrupted)
    assert config.name == "tiny"
    assert all(torch.equal(p.detach(), saved[name]) for name, p in prior.parameters().items())


def failing(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    """A reward that answers NaN."""
    return torch.full((len(images),), float("nan"))


@pytest.mark.usefixtures("shapes_unchecked")
def test_a_failing_reward_stops_with_a_checkpoint(known: Trainer, tmp_path: Path) -> None:
    trainer = _made(tmp_path)
    real = trainer.sampler.reward
    trainer.sampler.reward = lambda images, prompts: (real if trainer.iteration < 3 else failing)(images, prompts)
    with pytest.raises(RewardError, match="nan"):
        trainer.fit()
    assert len(rows(trainer)) == 3
    again = _made(tmp_path)
    again.fit()  # nothing was lost: the rest is as if nothing had happened
    assert rows(again) == rows(known)


def test_a_checkpoint_of_another_adapter_is_refused(prior_folder: Path, tmp_path: Path) -> None:
    small = run_config(prior_folder, tmp_path, train={"iterations": 1})
    assemble(small).fit()
    other = assemble(run_config(prior_folder, tmp_path / "other", posterior={"rank": 2}))
    other.folder = tmp_path / "tiny"
    with pytest.raises(Exception, match="rank"):
        other.resume()


def test_disagreement_between_rollout_and_replay_stops_training(prior_folder: Path, tmp_path: Path) -> None:
    trainer = assemble(run_config(prior_folder, tmp_path))
    trainer.prior.pipe.unet.train()
    for module in trainer.prior.pipe.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = {name: p.detach().clone() for name, p in trainer.prior.parameters().items()}
    with pytest.raises(ValueError, match="parity"):
        trainer.fit()
    after = {name: p.detach() for name, p in trainer.prior.parameters().items()}
    assert same(before, after), "an update by a wrong gradient"
    assert latest_checkpoint(tmp_path / "tiny" / "checkpoints") is None, "nothing was learned that could be kept"


def test_it_is_not_far_from_the_command_to_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of this package that are entered between `python train.py` and the pipeline's call in a rollout."""
    from diffusion_rtb.cli.main import train_main
    from pipelines._analytic.pipeline import VectorPipeline

    found: list[list[str]] = []
    call = VectorPipeline.__call__

    def called(*args: Any, **arguments: Any) -> Any:
        frames = [frame for frame in traceback.extract_stack() if f"{os.sep}diffusion_rtb{os.sep}" in frame.filename]
        found.append([frame.name for frame in frames])
        return call(*args, **arguments)

    monkeypatch.setattr(VectorPipeline, "__call__", functools.wraps(call)(called))
    gaussian = Path(__file__).parents[2] / "configs" / "gaussian.yaml"
    with pytest.raises(SystemExit):
        train_main([str(gaussian), f"out={tmp_path}", "train.iterations=1"])
    (first, *_) = (names for names in found if "rollout" in names)
    assert first[0] == "train_main"
    assert len(first) <= 9, " > ".join(first)
