"""The files of an evaluation: as their schema says, the same bytes twice, and each number beside the sample that it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import diffusion_rtb.evaluation as evaluation
from diffusion_rtb.config.load import ConfigError, RunConfig, load_config
from diffusion_rtb.config.moved import renamed
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.files.evaluations import EvaluationFileError, read_evaluation
from diffusion_rtb.run.posterior import open_trained_run
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import green

SCHEMA = json.loads((Path(evaluation.__file__).parent / "metrics.schema.json").read_text())


def opposite(images: Tensor, prompts: Any) -> Tensor:
    """A judge that falls by 2 where the reward rises by 1."""
    return -2 * green(images, prompts) + 3


def failing(images: Tensor, prompts: Any) -> Tensor:
    raise ImportError("no weights")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written")
    data = {
        "name": "small", "out": str(out), "beta": 1.5,
        "prior": {"component": "tests.oracles.pixel:PixelPrior"}, "reward": {"component": "tests.oracles.pixel:green"},
        "prompts": {"list": ["one", "two", "three"]},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 4, "micro_batch": 4, "grid_every": 0},
        "eval": {"samples": 6, "prior_samples": 9, "bootstrap": 20, "batch": 5},
    }  # fmt: skip
    assemble(RunConfig.model_validate(data)).fit()
    return out / "small"


JUDGES = ["tests.evaluation.test_written:opposite", "{component: tests.oracles.pixel:green, name: same}"]


@pytest.fixture(scope="module")
def numbers(run: Path) -> dict[str, Any]:
    return evaluate_run(run, judges=JUDGES)


def test_metrics_json_is_as_its_schema_says(run: Path, numbers: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(SCHEMA)
    check = Draft202012Validator(SCHEMA)
    written = read_evaluation(run / "eval")
    assert written == numbers
    assert list(check.iter_errors(written)) == []
    assert list(check.iter_errors({**written, "schema": 1}))
    assert list(check.iter_errors({**written, "per_prompt": [{"prompt": "one"}]}))
    assert written["subject"]["kind"] == "run"
    assert written["subject"]["recipe"] == "RTB on PixelPrior, reward green, beta 1.5, 1 iterations"
    assert {row["metric"] for row in written["left_out"]} == {"diversity"}


def test_every_sample_has_its_numbers(run: Path, numbers: dict[str, Any]) -> None:
    found = load_file(run / "eval" / "samples.safetensors")
    for side, count in (("prior", 9), ("posterior", 6)):
        assert found[f"{side}.prompt"].tolist() == [row for row in range(3) for _ in range(count)]
        assert found[f"{side}.index"].tolist() == list(range(count)) * 3
        reward = found[f"{side}.reward"].double()
        mean = numbers["overall"]["reward"][side]["mean"]
        assert mean == pytest.approx(float(reward.mean()), rel=1e-6)
        torch.testing.assert_close(found[f"{side}.judge.same"].double(), reward)
        torch.testing.assert_close(found[f"{side}.judge.{JUDGES[0]}"].double(), 3 - 2 * reward)
    per_step = found["posterior.log_ratio"].double()
    assert float(per_step.sum(1).mean()) == pytest.approx(numbers["overall"]["kl"]["mean"], rel=1e-4)
    assert "prior.log_ratio" not in found


def test_judges_are_measured_like_the_reward(numbers: dict[str, Any]) -> None:
    assert numbers["judges"] == [JUDGES[0], "same"]
    reward, judges = numbers["overall"]["reward"], numbers["overall"]["judges"]
    assert {key: value for key, value in judges["same"].items() if key in reward} == reward
    for row in (judges["same"]["correlation"], judges[JUDGES[0]]["correlation"]):
        assert abs(row["prior"]) == pytest.approx(1.0)
    assert judges[JUDGES[0]]["correlation"]["posterior"] == pytest.approx(-1.0)
    reweighted = judges[JUDGES[0]]["reweighted_prior"]["mean"]
    assert reweighted == pytest.approx(3 - 2 * reward["reweighted_prior"]["mean"], rel=1e-5)
    assert judges[JUDGES[0]]["posterior"]["low"] == pytest.approx(3 - 2 * reward["posterior"]["high"], rel=1e-5)


def test_pictures_are_pairs_and_extremes(run: Path, numbers: dict[str, Any]) -> None:
    rows = json.loads((run / "eval" / "pictures.json").read_text())
    samples = load_file(run / "eval" / "samples.safetensors")
    pairs = {(row["side"], row["prompt"], row["index"]) for row in rows if row["why"] == "pair"}
    assert pairs == {(side, p, k) for side in ("prior", "posterior") for p in range(3) for k in range(4)}
    ranked = samples["posterior.reward"].sort(descending=True).values.tolist()
    assert [row["reward"] for row in rows if row["why"] == "best"] == ranked[:8]
    assert [row["reward"] for row in rows if row["why"] == "worst"] == ranked[::-1][:8]
    for row in rows:
        side, place = row["side"], row["prompt"] * (9 if row["side"] == "prior" else 6) + row["index"]
        assert row["reward"] == float(samples[f"{side}.reward"][place])
        assert row["judges"]["same"] == row["reward"]
        with Image.open(run / "eval" / row["file"]) as picture:
            assert picture.size == (4, 4)
    assert {f"pictures/{path.name}" for path in (run / "eval/pictures").iterdir()} == {row["file"] for row in rows}


def test_the_same_command_writes_the_same_bytes(run: Path, numbers: dict[str, Any]) -> None:
    names = ("metrics.json", "samples.safetensors", "pictures.json", "side_by_side.png")
    before = [(run / "eval" / name).read_bytes() for name in names]
    evaluate_run(run, judges=JUDGES)
    assert [(run / "eval" / name).read_bytes() for name in names] == before


def test_pictures_of_the_evaluation_before_are_gone(run: Path) -> None:
    evaluate_run(run, ["eval.prompts=1", "eval.samples=2", "eval.prior_samples=2"])
    rows = json.loads((run / "eval" / "pictures.json").read_text())
    assert {f"pictures/{path.name}" for path in (run / "eval/pictures").iterdir()} == {row["file"] for row in rows}
    assert {row["prompt"] for row in rows} == {0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"There is no .*metrics.json. Write it anew: python eval.py "),
        (
            '{"beta": 1}',
            r"metrics.json is of schema 1, and this version reads schema 2. Write it anew: python eval.py ",
        ),
        ('{"schema": 3}', r"schema 3, .* newer version: install that, or evaluate again: python eval.py "),
        ('{"schema"', r"is damaged \(.*\). Write it anew: python eval.py "),
        ("[]", r"holds a list and no evaluation"),
    ],
)
def test_another_schema_is_refused_with_the_command(tmp_path: Path, content: str | None, message: str) -> None:
    folder = tmp_path / "run" / "eval"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "metrics.json").write_text(content)
    with pytest.raises(EvaluationFileError, match=message) as error:
        read_evaluation(folder)
    assert f"eval.py {folder.parent}" in str(error.value)


@pytest.mark.parametrize(
    ("judges", "message"),
    [
        (["nothing_of_the_kind"], "no reward named 'nothing_of_the_kind'"),
        (["jpeg", "jpeg"], r"called 'jpeg': add `name: ...`"),
        (["{component: jpeg, quality: high}"], "quality"),
    ],
)
def test_a_judge_that_is_wrong_is_refused_before_anything_loads(run: Path, judges: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        evaluate_run(run, judges=judges)
    if len(judges) == 1:
        assert "of the evaluation (eval.judges, --judges): mend it, or leave it out" in error.value.__notes__[0]


def test_a_judge_that_fails_is_named(run: Path) -> None:
    with pytest.raises(RuntimeError, match=r"failing \(a judge\)' on images 0 to 4 .* raised ImportError: no weights"):
        evaluate_run(run, judges=["tests.evaluation.test_written:failing"])


def test_the_old_name_of_the_labeller(run: Path, tmp_path: Path) -> None:
    text = (run / "config.yaml").read_text()
    old = tmp_path / "old.yaml"
    old.write_text(text.replace("  labeller: null\n", "  judge: null\n"))
    assert "judge: null" in old.read_text()
    assert load_config(old).eval.labeller is None  # as every run of version 0.1 has it
    with pytest.raises(
        ConfigError, match=r"eval.judge: it is called eval.labeller now. Write `labeller: \{component: x\}`"
    ):
        load_config(old, ["eval.judge={component: x}"])


def test_a_checkpoint_with_the_old_name_is_read(run: Path) -> None:
    (state,) = (run / "checkpoints").glob("*/state.json")
    held = json.loads(state.read_text())["config"]
    section = {key: value for key, value in held["eval"].items() if key != "labeller"}
    old = held | {"eval": section | {"judge": {"component": "jpeg"}}}
    found = RunConfig.model_validate(renamed(old)).eval.labeller
    assert found is not None
    assert found.component == "jpeg"
    assert open_trained_run(run).config.eval.labeller is None
