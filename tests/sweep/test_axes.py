"""What a sweep is over: axes, points in order, their names and starts; and what is refused before anything is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.load import ConfigError
from diffusion_rtb.run.metrics_file import curve
from diffusion_rtb.sweep.axes import points, read_axes
from diffusion_rtb.sweep.plan import plan
from diffusion_rtb.sweep.results import undominated

GAUSSIAN = Path("configs/gaussian.yaml")


def test_points_come_in_increasing_order_and_start_from_the_next_smaller_one() -> None:
    axes, overrides = read_axes(["train.lr=0.3,0.1", "train.iterations=3", "beta=4,1e-1,2"])
    assert overrides == ["train.iterations=3"]
    found = points(axes)
    assert [point.label for point in found] == [
        "lr-0.1-beta-1e-1", "lr-0.1-beta-2", "lr-0.1-beta-4", "lr-0.3-beta-1e-1", "lr-0.3-beta-2", "lr-0.3-beta-4",
    ]  # fmt: skip
    assert [point.before for point in found] == [None, 0, 1, None, 3, 4]
    assert found[4].values == (("train.lr", 0.3), ("beta", 2))


def test_only_commas_outside_brackets_and_quotes_part_values() -> None:
    axes, overrides = read_axes(["prior.mean=[1, 2],[3, 4]", "reward.target='a, b'", "prompts.list=[a, b]"])
    assert [(axis.key, axis.values) for axis in axes] == [("prior.mean", ([1, 2], [3, 4]))]
    assert overrides == ["reward.target='a, b'", "prompts.list=[a, b]"]
    assert [point.label for point in points(axes)] == ["mean-1_2", "mean-3_4"]
    assert points(axes)[1].before is None
    assert not axes[0].comparable  # a KL to another prior
    both, _ = read_axes(["a.x=1,2", "b.x=1,2"])
    assert points(both)[0].label == "a.x-1-b.x-1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["beta=1"], "needs a key with several values, e.g. beta=0.5,1,2,4; got beta=1"),
        ([], "needs a key with several values"),
        (["beta=1,"], "beta=1,: a value is missing"),
        (["beta=1,2,1.0"], "beta=1,2,1.0: 1 and 1.0 are the same value"),
        (["beta=1,2", "beta=3,4"], "'beta' is given twice"),
        (["beta=1,2", "beta=3"], "'beta' is given twice"),
        (["beta=1,0"], "beta: got 0 .*greater than 0"),
        (["beta=-1,1"], "beta: got -1 .*greater than 0"),
        (["betta=1,2"], "betta: there is no such key. Did you mean 'beta'"),
        (["train.lr=1e-3,high"], "train.lr: got 'high'"),
        (["reward.scale=1,2"], "reward 'density' has no argument 'scale'"),
    ],
)
def test_bad_axes_are_refused_by_name(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan(GAUSSIAN, [*arguments, f"out={json.dumps(str(tmp_path))}"])
    assert list(tmp_path.iterdir()) == []


def test_warm_starts_and_baselines_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    out = f"out={json.dumps(str(tmp_path))}"
    with pytest.raises(ConfigError, match=r"goes along numbers of beta or reward.*over train.lr"):
        plan(GAUSSIAN, ["train.lr=0.1,0.2", out], warm_start=True)
    with pytest.raises(ConfigError, match="--warm-iterations 0: at least 1"):
        plan(GAUSSIAN, ["beta=1,2", out], warm_start=True, warm_iterations=0)
    with pytest.raises(ValueError, match=r"baseline 'ddpo': train.group is 1(.|\n)*--baseline none leaves it out"):
        plan(GAUSSIAN, ["beta=1,2", out, "objective.log_z=learned", "train.group=1", "train.micro_batch=1"])
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", str(GAUSSIAN), "beta=1", out])


def test_a_point_takes_the_nearest_neighbour_that_is_trained(tmp_path: Path) -> None:
    arguments = ["beta=1,2,4", f"out={json.dumps(str(tmp_path))}", "train.iterations=7"]
    warm = plan(GAUSSIAN, arguments, warm_start=True)
    starts = {(2, (0, 1)): "gaussian-beta-2", (2, (0,)): "gaussian-beta-1", (1, (0,)): "gaussian-beta-1"}
    for (place, done), name in starts.items():
        settled = warm.settled(place, done)
        assert (settled.start, settled.train.iterations) == (str(tmp_path / name), 4)
    for place, done in ((0, ()), (2, ())):
        assert warm.settled(place, done) == warm.configs[place]
    cold = plan(GAUSSIAN, arguments)
    assert cold.settled(2, [0, 1]) == cold.configs[2]


class Points:
    def embed(self, images: Tensor) -> Tensor:
        return images


def test_the_baseline_is_looked_at_where_diversity_is_evaluated(tmp_path: Path) -> None:
    """On as many samples as the points: a Vendi score grows with their number. An alarm does not end it."""
    arguments = ["beta=1,2", f"out={json.dumps(str(tmp_path))}", f"eval.embedder.component={__name__}:Points"]
    baseline = plan(GAUSSIAN, [*arguments, "eval.samples=20", "eval.prior_samples=10"]).baseline
    assert baseline is not None
    assert baseline.watch is not None
    assert (baseline.watch.every, baseline.watch.samples, baseline.watch.stop) == (12, 10, False)
    assert baseline.watch.embedder is not None
    own = plan(GAUSSIAN, [*arguments, "watch={every: 5, stop: true}"])
    assert own.baseline is not None
    assert own.baseline.watch is not None
    assert (own.baseline.watch.every, own.baseline.watch.stop) == (5, False)
    assert own.configs[0].watch is not None
    assert own.configs[0].watch.stop


def test_the_frontier_is_what_no_other_point_beats() -> None:
    gains_and_costs = [(1.0, 1.0), (2.0, 1.0), (3.0, 4.0), (2.5, 5.0), (2.0, 1.0), (0.0, 0.5)]
    assert undominated(gains_and_costs) == [False, True, True, False, True, True]
    assert undominated([]) == []


def test_a_training_is_means_of_equal_stretches_or_what_was_watched() -> None:
    rows = [{"iteration": i, "reward": float(i), "kl": i / 10} for i in range(10)]
    found = curve(rows)
    assert [point["iterations"] for point in found] == [1, 2, 3, 5, 6, 7, 8, 10]
    assert [point["reward"] for point in found] == [0.0, 1.0, 2.0, 3.5, 5.0, 6.0, 7.0, 8.5]
    assert found[-1]["kl"] == pytest.approx(0.85)
    assert curve(rows[:2])[1]["iterations"] == 2
    assert curve([]) == []
    rows[4] |= {"watch/reward": 9.0, "watch/kl": 2.0, "watch/vendi": 3.0, "watch/samples": 8.0}
    assert curve(rows) == [{"iterations": 4, "reward": 9.0, "kl": 2.0, "vendi": 3.0, "samples": 8.0}]
