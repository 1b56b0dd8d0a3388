"""A metric is one file: dropped beside the others it is found by its name, and its number goes wherever theirs go."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import diffusion_rtb.evaluation.metrics as shelf
from diffusion_rtb.config import components
from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import ConfigError, EvalConfig, RunConfig, load_config
from diffusion_rtb.config.prompts import Metadata
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.evaluation.metric import Metric, metrics_of
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.training.assemble import assemble
from tests.oracles.pixel import green

FILE = '''
from typing import Any

from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.metric import Metric
from diffusion_rtb.evaluation.samples import Drawn

__all__ = ["Quantile"]


class Quantile(Metric):
    """A quantile of the reward, of prior and posterior.

    Args:
        share: Of the samples that are below it.
    """

    name, columns = "quantile", ("quantile",)

    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> dict[str, float]:
        sides = {"prior": prior, "posterior": posterior}
        return {name: float(drawn.reward.double().quantile(self.share)) for name, drawn in sides.items()}

    def row(self, value: Any) -> tuple[str, ...]:
        return (f"q {value['posterior']:.3f}",)

    def card(self, value: Any) -> dict[str, dict[str, Any]]:
        return {"reward quantile": value}
'''


class Seen(Metric):
    """The reward once more, from the images; and the prompt it was asked about."""

    name = "seen"

    def prepare(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        self.table = list(prompts)

    def scores(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Mapping[str, Tensor]:
        rows = images.new_tensor([self.table.index(prompt) for prompt in prompts])
        return {"green": green(images, prompts), "row": rows}

    def of(self, prior: Drawn, posterior: Drawn, beta: float, config: EvalConfig) -> Any:
        sides = {"prior": prior, "posterior": posterior}
        return {
            name: [
                self.kept(side, "green").tolist() == side.reward.tolist(),  # type: ignore[union-attr]
                self.kept(side, "row").tolist(),  # type: ignore[union-attr]
            ]
            for name, side in sides.items()
        }


@pytest.fixture
def dropped(tmp_path: Path) -> Iterator[None]:
    """The file, in a folder of the shelf's package."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "quantile.py").write_text(FILE)
    shelf.__path__.append(str(tmp_path / "more"))
    components._files.cache_clear()
    yield
    shelf.__path__.remove(str(tmp_path / "more"))
    components._files.cache_clear()


def run(folder: Path, metrics: Any) -> RunConfig:
    path = folder / "run.yaml"
    text = {
        "out": str(folder),
        "prior": {"component": "tests.oracles.pixel:PixelPrior"},
        "reward": {"component": "tests.oracles.pixel:green"},
        "beta": 1.0,
        "prompts": {"list": ["a", "b"]},
        "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 4, "micro_batch": 4, "grid_every": 0},
        "eval": {"samples": 4, "prior_samples": 5, "bootstrap": 5, "metrics": metrics},
    }
    path.write_text(json.dumps(text))
    return load_config(path)


@pytest.mark.usefixtures("dropped")
def test_a_dropped_file_is_used_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run(tmp_path, ["reward", {"component": "quantile", "share": 0.0}])
    assemble(config).fit()
    capsys.readouterr()
    evaluate_run(tmp_path / "run")
    shown = capsys.readouterr().out
    numbers = json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())
    assert list(numbers["overall"]) == ["reward", "quantile"]
    smallest = numbers["overall"]["quantile"]
    for side in ("prior", "posterior"):
        assert smallest[side] == min(row["quantile"][side] for row in numbers["per_prompt"])
        assert smallest[side] < numbers["overall"]["reward"][side]["mean"]
    assert f"q {smallest['posterior']:.3f}" in shown
    assert "ELBO" not in shown
    assert "| reward quantile |" in (tmp_path / "run" / "lora" / "card.md").read_text()


def test_a_metric_sees_the_image_of_each_sample(tmp_path: Path) -> None:
    """Batches of 3 of 8 and 10 samples; `eval.prompts` leaves the second prompt, whose samples are the same in any batch."""
    assemble(run(tmp_path, [{"component": f"{__name__}:Seen"}])).fit()
    found = evaluate_run(tmp_path / "run", ["eval.batch=3"])
    both = {"prior": [True, [0] * 5 + [1] * 5], "posterior": [True, [0] * 4 + [1] * 4]}
    assert found["overall"]["seen"] == both
    assert found["per_prompt"][1]["seen"] == {"prior": [True, [1] * 5], "posterior": [True, [1] * 4]}
    one = evaluate_run(tmp_path / "run", ["eval.prompts=[b]"])
    assert one["overall"]["seen"] == {"prior": [True, [0] * 5], "posterior": [True, [0] * 4]}


@pytest.mark.usefixtures("dropped")
@pytest.mark.parametrize(
    "metric, message",
    [
        ("quantiles", "no metric named 'quantiles'. Did you mean 'quantile'"),
        ({"component": "quantile", "shares": 0.1}, "has no argument 'shares'. Did you mean 'share'"),
        ({"component": "quantile", "share": "half"}, "argument 'share': got 'half'"),
        ("rewards.jpeg:Jpeg", "without of, row, card"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(tmp_path: Path, metric: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_components(run(tmp_path, [metric]))


def test_names_are_used_once() -> None:
    with pytest.raises(ValueError, match="'kl' is called 'kl', which metrics"):
        metrics_of([describe({"component": "kl"}, "metric")] * 2)
    with pytest.raises(ConfigError, match="metrics"):
        load_config("configs/gaussian.yaml", ["eval.metrics=3"])
