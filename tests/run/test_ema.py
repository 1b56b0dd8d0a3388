"""The moving average of the adapters: what it is, who uses it, who says so, and that training is as it would be without."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_rtb.comparison.cell import timed
from diffusion_rtb.comparison.plan import truth_of
from diffusion_rtb.comparison.truths.truth import Looks
from diffusion_rtb.config.load import ConfigError, RunConfig, load_config
from diffusion_rtb.evaluation.subject import Options
from diffusion_rtb.evaluation.subjects.run import RunSubject
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.run.checkpoint_reading import read_latest
from diffusion_rtb.run.export import export_posterior
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.run.process_state import load_parameters
from diffusion_rtb.sampling.sampler import Sampler
from diffusion_rtb.training.assemble import assemble, training
from diffusion_rtb.training.copies import Copy
from diffusion_rtb.training.observers import Sheets
from diffusion_rtb.training.trainer import Trainer
from diffusion_rtb.training.watch.look import numbers as look_numbers
from diffusion_rtb.training.watch.look import plan, take
from diffusion_rtb.training.watch.tools import Tools

SMALL = ["prior.steps=4", "train.group=8", "train.micro_batch=8", "train.checkpoint_every=4", "train.grid_every=0"]
SMALL += ["train.lr_decay=constant"]


def config(out: Path, name: str, *overrides: str) -> RunConfig:
    own = [f"out={json.dumps(str(out))}", f"name={name}", "train.iterations=4"]
    return load_config("configs/gaussian.yaml", [*SMALL, *own, *overrides])


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    found = read_latest(folder / "checkpoints")
    assert found is not None
    return {name: dict(held) for name, held in found.tensors.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def numbers(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.prior.parameters().items()}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run with an average, and its posterior before and after each iteration."""
    out = tmp_path_factory.mktemp("ema")
    trainer = assemble(config(out, "averaged", "train.ema=0.3"))
    seen = [numbers(trainer)]
    step = trainer.step

    def watched() -> dict[str, float]:
        metrics = step()
        seen.append(numbers(trainer))
        return metrics

    trainer.step = watched  # type: ignore[method-assign]
    trainer.fit()
    return out / "averaged", seen


def test_it_is_the_weighted_mean_of_what_was_trained(averaged: tuple[Path, list[dict[str, Tensor]]]) -> None:
    """Kept are 1/10, 2/11, 3/12 and then 0.3 of it: the weights of all five are products of these."""
    folder, seen = averaged
    kept = [1 / 10, 2 / 11, 3 / 12, 0.3]
    weights = [1.0]
    for share in kept:
        weights = [share * weight for weight in weights] + [1 - share]
    assert sum(weights) == pytest.approx(1)
    held = tensors(folder)
    for name, found in held["ema"].items():
        torch.testing.assert_close(found, sum(w * each[name] for w, each in zip(weights, seen, strict=True)))
        assert not torch.equal(found, held["posterior"][name])


def test_training_is_as_it_would_be_without(averaged: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder, _ = averaged
    assemble(config(tmp_path, "plain")).fit()
    plain, held = tensors(tmp_path / "plain"), tensors(folder)
    assert "ema" not in plain
    for name in ("posterior", "optimizer"):
        assert same(plain[name], held[name])
    assert open_trained_run(tmp_path / "plain").weights == "posterior"


def test_a_run_goes_on_with_it(averaged: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder, _ = averaged
    assemble(config(tmp_path, "part", "train.ema=0.3", "train.iterations=2")).fit()
    assemble(config(tmp_path, "part", "train.ema=0.3")).fit()
    whole, part = tensors(folder), tensors(tmp_path / "part")
    assert whole.keys() == part.keys()
    assert all(same(whole[name], part[name]) for name in whole if name != "rng")


def test_it_is_what_is_evaluated_and_handed_out(averaged: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path) -> None:
    folder, _ = averaged
    average = tensors(folder)["ema"]
    opened = open_trained_run(folder)
    prior = opened.prior()
    assert same({name: p.detach() for name, p in prior.parameters().items()}, average)
    assert "moving average (train.ema 0.3) of the posterior" in opened.progress.sentence
    assert RunSubject(folder, Options()).recipe.endswith(", moving average 0.3 of the posterior")
    assert RunSubject(folder, Options()).facts["run"]["ema"] == 0.3
    again = assemble(config(folder.parent, "averaged", "train.ema=0.3"))
    again.fit()
    with again.final():
        lora = export_posterior(again.config, again.prior, tmp_path, again.progress)
    (written,) = (load_file(path) for path in (lora / "denoiser").glob("*.safetensors"))
    assert all(torch.equal(written[f"correction.{name}"], tensor) for name, tensor in average.items())
    assert "| posterior | moving average (train.ema 0.3) |" in (lora / "README.md").read_text()
    assert same(numbers(again), tensors(folder)["posterior"])  # it goes on from there


@pytest.mark.usefixtures("shapes_unchecked")
def test_looks_are_at_what_is_handed_out(tmp_path: Path) -> None:
    """Of sheets, `watch` and comparisons: the same pictures and numbers as of the run's checkpoints, opened as any command does."""
    keep = ["train.checkpoint_every=1", "train.keep_checkpoints=3", "train.grid_every=3", "train.grid_samples=16"]
    keep += ["watch={every: 2, samples: 4, policy: elbo}", "train.ema=0.9", "train.lr=0.5", "train.iterations=3"]
    wanted = config(tmp_path, "seen", *keep)
    truth, looks = truth_of(wanted), Looks(1, 3, 40)
    trainer, _ = timed(wanted, truth, looks)
    trainer.fit()
    folder, last = trainer.folder, numbers(trainer)
    seen = {name: value for name, value in lines(folder / "metrics.jsonl")[-1].items() if name.startswith("watch/")}
    point = lines(folder / "curve.jsonl")[-1]
    assert (seen.pop("watch/alarm"), point["iteration"]) == (0, 2)

    def looked(prior: Prior, place: Path) -> tuple[dict[str, float], bytes]:
        sampler = Sampler(prior, trainer.sampler.reward, wanted.prompts.texts(), 8)
        sheets = Sheets(sampler, nullcontext, wanted.seed, count=16, every=3, folder=place, show=lambda *_: None)
        place.mkdir()
        sheets.after(2, {})
        assert wanted.watch is not None
        look = take(sampler, Tools({}), *plan(wanted, wanted.watch), of_prior=False)
        found = {f"watch/{name}": value for name, value in look_numbers(look, wanted.beta.value).items()}
        return found, (place / "000003.png").read_bytes()

    handed_out = open_trained_run(folder).prior()
    sheet = (folder / "samples" / "000003.png").read_bytes()
    assert looked(handed_out, tmp_path / "average") == (seen, sheet)
    load_parameters(handed_out, last)
    numbers_of_last, sheet_of_last = looked(handed_out, tmp_path / "last")
    assert numbers_of_last["watch/kl"] != seen["watch/kl"]
    assert sheet_of_last != sheet
    before = open_trained_run(folder, checkpoint="2").prior()
    again = truth.look(Sampler(before, trainer.sampler.reward, wanted.prompts.texts(), 8), wanted, looks.point_samples)
    assert {name: point[name] for name in again} == again


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_that_starts_from_it_starts_from_the_average(
    averaged: tuple[Path, list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    folder, _ = averaged
    with training(config(tmp_path, "second", f"start={json.dumps(str(folder))}")) as trainer:
        assert same(numbers(trainer), tensors(folder)["ema"])
    told = json.loads((tmp_path / "second" / "manifest.json").read_text())["starts"][0]["start"]
    sums = json.loads((folder / "checkpoints" / "00000004" / "manifest.json").read_text())["files"]
    assert (told["weights"], told["posterior_sha256"]) == ("ema", sums["ema.safetensors"]["sha256"])


def test_what_is_worn_is_taken_off_after_an_error(tmp_path: Path) -> None:
    trainer = assemble(config(tmp_path, "worn"))
    copy, before = Copy(trainer.prior), numbers(trainer)
    for tensor in copy.held.values():
        tensor.add_(1)

    def failing() -> None:
        assert same(numbers(trainer), copy.held)
        raise KeyError

    with pytest.raises(KeyError), copy.worn():
        failing()
    assert same(numbers(trainer), before)


@pytest.mark.parametrize("ema", ["0", "1", "-0.5"])
def test_a_share_that_is_none_is_refused(ema: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.ema"):
        config(tmp_path, "wrong", f"train.ema={ema}")
