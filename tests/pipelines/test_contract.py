"""What every family of diffusers pipelines keeps, on a tiny one in the published folder layout.

A family is a file in `pipelines/`, its tiny pipeline the file of the same name in `tests/oracles/families/`: `build()`, and where
needed `SETTINGS` (arguments of the prior), `PROMPTS` (two of different length that the model knows), `DTYPES` (in which the stock
pipeline runs at all), `seen` (what rewards see of its answer) and `ANY_FOLDER`. Nothing here knows a family by name.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_rtb.chain.recorder import TrajectoryRecorder
from diffusion_rtb.chain.rollout import (
    entry_of,
    replay,
    replay_backward,
    rollout,
    score,
    score_with_means,
    score_with_norms,
)
from diffusion_rtb.chain.trajectory import Trajectory
from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.steering import Method, rewards_of, steered
from diffusion_rtb.steering.best_of import BestOf
from diffusion_rtb.steering.smc import SMC
from diffusion_rtb.training.updates.pathwise import Pathwise
from pipelines._diffusers.prior import DiffusersPrior
from pipelines._diffusers.text_to_image import TextToImage

ROOT = Path(__file__).parents[2]
ORACLES = Path("tests", "oracles", "families")
STEPS, GUIDANCE, SEEDS = 3, 2.0, (3, 4)


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_"))


def family(name: str) -> type:
    module = importlib.import_module(f"pipelines.{name}")
    found: type = getattr(module, module.__all__[0])
    return found


FAMILIES = [name for name in names(Path("pipelines")) if issubclass(family(name), DiffusersPrior)]
CASES = [name for name in FAMILIES if name in names(ORACLES)]
DTYPES = ("float32", "float16", "bfloat16")
EVERY = [(name, dtype) for name in CASES for dtype in DTYPES]


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass
class Case:
    """A family's tiny pipeline on disk, and priors made from it."""

    name: str
    folder: Path
    module: Any
    _priors: dict[str, Any] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return list(getattr(self.module, "PROMPTS", ("a cat", "a big red dog")))[:2]

    @property
    def batch(self) -> list[str]:
        return [*self.prompts, *self.prompts][: len(SEEDS)]

    def seen(self, answered: Tensor) -> Tensor:
        """What rewards see of what the pipeline answers."""
        found: Tensor = getattr(self.module, "seen", lambda images: images)(answered)
        return found

    def config(self, **settings: Any) -> dict[str, Any]:
        own = {"component": self.name, "path": str(self.folder), "steps": STEPS, "device": "cpu"}
        return own | getattr(self.module, "SETTINGS", {}) | settings

    def prior(self, dtype: str = "float32") -> Any:
        """With guidance, where the family has any; loaded once."""
        if dtype not in self._priors:
            guided = hasattr(describe(self.config(), "prior").construct(), "guidance")
            settings = {"guidance": GUIDANCE} if guided else {}
            self._priors[dtype] = build(self.config(dtype=dtype, **settings), "prior")
        return self._priors[dtype]

    @cached_property
    def attached(self) -> tuple[Any, Trajectory]:
        """With adapters, and what the prior drew before it had them; without guidance."""
        prior = build(self.config(), "prior")
        before = rollout(prior, self.batch, SEEDS)
        prior.attach(rank=2, alpha=2.0, seed=1)
        return prior, before

    @contextmanager
    def trained(self) -> Iterator[Any]:
        """Inside the block as after training: B is no longer 0."""
        prior, _ = self.attached
        kept = {name: parameter.detach().clone() for name, parameter in prior.parameters().items()}
        with seeded(), torch.no_grad():
            for parameter in prior.parameters().values():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        try:
            yield prior
        finally:
            for name, parameter in prior.parameters().items():
                parameter.data, parameter.grad = kept[name], None


def drawn(prior: Any, call: dict[str, Any], seeds: tuple[int, ...] = SEEDS) -> Tensor:
    """What the stock pipeline answers; flows take the noise of their steps from the global generator."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = call | {"output_type": prior.output_type, "generator": generators, "return_dict": False}
    with seeded(), torch.no_grad():
        images = prior.pipe(**given)[0]
    return images if isinstance(images, Tensor) else torch.as_tensor(images).movedim(-1, -3)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def of(name: str) -> Case:
        if name not in made:
            module = importlib.import_module(f"tests.oracles.families.{name}")
            folder = tmp_path_factory.mktemp("families") / name
            with seeded():
                module.build().save_pretrained(folder)
            made[name] = Case(name, folder, module)
        return made[name]

    return of


def in_dtype(case: Case, dtype: str) -> Any:
    if dtype not in getattr(case.module, "DTYPES", DTYPES):
        pytest.skip(f"the stock pipeline does not run in {dtype}")
    return case.prior(dtype)


def test_every_family_has_a_tiny_pipeline() -> None:
    assert FAMILIES
    assert not set(FAMILIES) - set(names(ORACLES)), "pipelines/NAME.py needs tests/oracles/families/NAME.py"


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_recording_changes_no_bit(cases: Callable[[str], Case], name: str, dtype: str) -> None:
    case = cases(name)
    prior = in_dtype(case, dtype)
    assert isinstance(prior, Prior)
    call = prior.arguments(case.batch)
    plain = drawn(prior, call)
    with TrajectoryRecorder(prior.pipe.scheduler) as recorder:
        recorded = drawn(prior, call)
    assert torch.equal(plain, recorded)
    x = recorder.trajectory.x
    assert x.shape == (len(SEEDS), STEPS + 1, *prior.dims)
    images = prior.decode(x[:, -1])
    assert images.dtype == torch.float32
    assert torch.equal(images, case.seen(plain.float())), "decode is the pipeline's own picture"
    assert images.std() > 0.01


@pytest.mark.parametrize(("name", "dtype"), EVERY)
def test_replay_finds_the_recorded_densities(cases: Callable[[str], Case], name: str, dtype: str) -> None:
    case = cases(name)
    prior = in_dtype(case, dtype)
    trajectory = rollout(prior, case.batch, SEEDS)
    assert trajectory.stochastic[:-1].all()
    log_q, norms = score_with_norms(prior, case.batch, trajectory)
    assert torch.equal(log_q, trajectory.log_prob)
    assert trajectory.output_norm is not None
    assert torch.equal(norms, trajectory.output_norm)
    assert bool((norms > 0).eq(trajectory.stochastic).all())


@pytest.mark.parametrize("name", [name for name in CASES if issubclass(family(name), TextToImage)])
def test_pictures_need_not_be_square(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    side = getattr(case.module, "SETTINGS", {}).get("height", 64)
    prior = build(case.config(height=side, width=2 * side), "prior")
    with TrajectoryRecorder(prior.pipe.scheduler, dtype=torch.float64) as recorder:
        answered = drawn(prior, prior.arguments(case.batch[:1]), SEEDS[:1])
    images = prior.decode(recorder.trajectory.x[:, -1])
    assert images.shape[-1] == 2 * side
    assert torch.equal(images, case.seen(answered.float()))
    assert torch.equal(score(prior, case.batch[:1], recorder.trajectory), recorder.trajectory.log_prob)


@pytest.mark.parametrize("name", CASES)
def test_the_call_is_the_one_for_the_prompt(cases: Callable[[str], Case], name: str) -> None:
    """The embeddings stand for what the stock pipeline makes of the prompt's text, and they matter."""
    case = cases(name)
    prior = case.prior()
    first, second = ([case.batch[i]] for i in (0, 1))
    found = drawn(prior, prior.arguments(first), SEEDS[:1])
    if "prompt" in signature(type(prior.pipe).__call__).parameters:
        assert torch.equal(found, drawn(prior, {"prompt": first[0], **prior.settings()}, SEEDS[:1]))
    assert torch.equal(found, drawn(prior, prior.arguments(second), SEEDS[:1])) is (first == second)
    features = prior.features(case.batch)
    assert features.shape[0] == len(SEEDS)
    assert features.dtype == torch.float32


@pytest.mark.parametrize("name", CASES)
def test_the_posterior_starts_as_the_prior(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    prior, before = case.attached
    log_q, _, mean_q = score_with_means(prior, case.batch, before)
    with prior.as_prior():
        log_p, _, mean_p = score_with_means(prior, case.batch, before)
    assert torch.equal(log_q, before.log_prob)
    assert torch.equal(log_p, before.log_prob)
    assert torch.equal(mean_q, mean_p)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_autograd(cases: Callable[[str], Case], name: str) -> None:
    """Step by step against the graph of the whole chain; in the adapters, all of them, and nowhere else."""
    case = cases(name)
    with seeded(7):
        cotangent = torch.randn(len(SEEDS), STEPS)
    with case.trained() as prior:
        trajectory = rollout(prior, case.batch, SEEDS)
        asked: dict[str, Any] = {"call": prior.arguments(case.batch), "entry": entry_of(prior)}
        (cotangent * replay(prior.pipe, trajectory, grad=True, **asked)).sum().backward()
        expected = taken(prior)
        replay_backward(prior.pipe, trajectory, cotangent, **asked)
        found = taken(prior)
        assert found.keys() == expected.keys() == prior.parameters().keys()
        for key, gradient in expected.items():
            largest = float(gradient.abs().max())
            assert largest > 0, key
            torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-5 * largest, msg=key)


@pytest.mark.parametrize(
    ("name", "settings"), [("stable_diffusion", {}), ("flux", {"scheduler_arguments": {"window": [0, 2]}})]
)
def test_the_reward_s_gradient_goes_through_the_chain(
    cases: Callable[[str], Case], name: str, settings: dict[str, Any], shapes_unchecked: None
) -> None:
    """Along a direction, against differences of the loss itself: the noise of a seed is the same for each posterior.

    The flow leaves its last step to the ODE, which is the prior's map.
    """
    prior = build(cases(name).config(**settings), "prior")
    prior.attach(rank=2, alpha=2.0, seed=1)
    sampler, rows = Sampler(prior, bright, cases(name).batch, len(SEEDS)), list(range(len(SEEDS)))
    parameters = list(prior.parameters().values())
    along = [torch.randn_like(parameter) for parameter in parameters]

    def loss(h: float) -> float:
        for parameter, d in zip(parameters, along, strict=True):
            parameter.data.add_(d, alpha=h)
        batch = sampler.with_kl(sampler.draw(rows, list(SEEDS)))
        assert batch.kl is not None
        return float((batch.kl.sum(1) - 3.0 * batch.reward).mean())

    for parameter in parameters:
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    batch = sampler.draw(rows, list(SEEDS))
    found = Pathwise(sampler, 3.0).push(batch, STEPS)
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, along, strict=True) if p.grad is not None)
    assert found == pytest.approx(loss(0.0), rel=1e-3)
    assert slope == pytest.approx((loss(1e-2) - loss(-2e-2)) / 2e-2, rel=0.02)


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward with a slope of its own at each pixel."""
    pixels = images.flatten(1)
    return (pixels * torch.linspace(-1, 1, pixels.shape[1])).sum(1)


@pytest.mark.parametrize("method", [SMC(particles=2), BestOf(particles=2)])
@pytest.mark.parametrize("name", CASES)
def test_looking_at_pictures_is_no_part_of_the_chain_that_is_steered(
    cases: Callable[[str], Case], name: str, method: Method
) -> None:
    """Decoding may run the pipeline itself once more, in the middle of its own loop."""
    case = cases(name)
    prior = case.prior()
    found = steered(prior, bright, method, case.prompts, SEEDS[: len(case.prompts)], beta=2.0)
    texts = [prompt for prompt in case.prompts for _ in range(method.particles)]
    assert found.trajectory.x.shape == (len(texts), STEPS + 1, *prior.dims)
    assert found.trajectory.log_prob[:, :-1].isfinite().all()
    left = dict(vars(prior.pipe))
    seen = rewards_of(prior, bright, texts)(found.trajectory.x[:, -1])
    torch.testing.assert_close(found.reward, seen.to(found.reward))
    assert "step" not in vars(prior.pipe.scheduler)
    assert all(vars(prior.pipe)[name] is value for name, value in left.items())


def taken(prior: Any) -> dict[str, Tensor]:
    """The gradients of all parts of the pipeline, which are gone from it then."""
    parts = [part for part in prior.pipe.components.values() if isinstance(part, torch.nn.Module)]
    found = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                assert part is prior.network, name
                found[name], parameter.grad = parameter.grad, None
    return found


CLEAN = """
import json, sys, traceback
import numpy as np
for file, text in json.load(sys.stdin).items():
    made = {}
    try:
        exec(text, made)
        np.save(file, np.asarray(made["image"]))
    except Exception:
        print(file, traceback.format_exc(), file=sys.stderr)
"""


def pixels(images: Any) -> Tensor:
    """As in a file, channels first."""
    found = torch.as_tensor(images)
    return (found.float() * 255).round().byte() if found.is_floating_point() else found


def test_the_exported_adapters_draw_the_posterior(cases: Callable[[str], Case], tmp_path: Path) -> None:
    """What the code of each model card draws, for all in one clean process, which knows nothing but what was exported."""
    codes, expected = {}, {}
    for name in CASES:
        case = cases(name)
        (tmp_path / name).mkdir()
        with case.trained() as prior:
            prior.export(tmp_path / name, "card")
            codes[str(tmp_path / f"{name}.npy")] = prior.snippet(folder=str(tmp_path / name), prompt=case.prompts[0])
            call = prior.arguments(case.prompts[:1])
            expected[name] = drawn(prior, call, (0,))[0]
            with prior.as_prior():
                assert not torch.allclose(drawn(prior, call, (0,))[0], expected[name], atol=1e-2), name
    subprocess.run([sys.executable, "-c", CLEAN], input=json.dumps(codes), text=True, cwd=ROOT, check=True)
    for name, posterior in expected.items():
        found = torch.as_tensor(np.load(tmp_path / f"{name}.npy")).movedim(-1, -3)
        assert torch.equal(pixels(found), pixels(posterior)), name


def command(*words: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code in (0, None), words


def trained_run(case: Case, where: Path) -> Path:
    """Two iterations by the command line."""
    config = {
        "prior": case.config(),
        "posterior": {"rank": 2},
        "reward": {"component": "brightness"},
        "beta": 1.0,
        "prompts": {"list": case.prompts},
        "train": {
            "iterations": 2, "prompts_per_iteration": 1, "group": 2, "micro_batch": 2, "lr": 0.01, "grid_every": 0,
            "checkpoint_every": 1,
        },
        "out": str(where),
    }  # fmt: skip
    (where / "run.yaml").write_text(json.dumps(config))
    command("train", str(where / "run.yaml"))
    return where / "run"


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_with_the_same_numbers(cases: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    whole = trained_run(cases(name), tmp_path)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["parity"] == 0 for row in rows)
    last = sorted((whole / "checkpoints").iterdir())[-1]
    resumed = Path(shutil.copytree(whole, tmp_path / "resumed"))
    shutil.rmtree(resumed / "checkpoints" / last.name)
    command("train", str(resumed))
    compare(whole, resumed, last.name)


def compare(whole: Path, resumed: Path, checkpoint: str) -> None:
    """Every tensor of both checkpoints."""
    files = sorted(path.relative_to(whole) for path in (whole / "checkpoints" / checkpoint).rglob("*.safetensors"))
    assert files
    for file in files:
        expected, found = load_file(whole / file), load_file(resumed / file)
        assert expected.keys() == found.keys()
        drawn_from = expected.keys() - {
            "python",
            "python_gauss",
        }  # libraries shuffle with Python's, no number depends on it
        assert all(torch.equal(expected[key], found[key]) for key in drawn_from), file


@pytest.mark.parametrize("name", CASES)
def test_folders_of_other_families_are_refused_by_name(
    cases: Callable[[str], Case], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loads)
    case = cases(name)
    if getattr(case.module, "ANY_FOLDER", False):
        pytest.skip("it takes the folders of all of them")
    other = cases(next(known for known in CASES if known != name))
    theirs = json.loads((other.folder / "model_index.json").read_text())["_class_name"]
    with pytest.raises(ValueError, match=f"holds a {theirs}; this prior needs"):
        describe(case.config(path=str(other.folder)), "prior").construct()
