"""Sets of samples against each other: loops over all pairs, closed forms of Gaussians, and sets that are equal or far apart."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.features import Reference
from diffusion_rtb.evaluation.metrics._clouds import Cloud, clouds_of
from diffusion_rtb.evaluation.metrics._pairs import pair_means, resampled
from diffusion_rtb.evaluation.metrics.diversity import lgmd
from diffusion_rtb.evaluation.metrics.frechet import Frechet, frechet_distance
from diffusion_rtb.evaluation.metrics.kid import KID
from diffusion_rtb.evaluation.metrics.mmd import MMD
from diffusion_rtb.evaluation.metrics.prdc import PRDC, prdc
from diffusion_rtb.evaluation.samples import Drawn

CONFIG = EvalConfig.model_validate({"bootstrap": 20})
BETA = 1.5


def side(points: Tensor, prompt: Tensor | None = None, reward: Tensor | None = None) -> Drawn:
    n = len(points)
    prompt = torch.zeros(n, dtype=torch.long) if prompt is None else prompt
    reward = torch.zeros(n) if reward is None else reward
    return Drawn(prompt, reward, embedding=points)


def two_sides(count: int = 5, dim: int = 3) -> tuple[Drawn, Drawn]:
    """Two prompts with uneven numbers of prior samples, random rewards."""
    prompt = torch.tensor([0] * count + [4] * (count + 2))
    prior = side(torch.randn(len(prompt), dim), prompt, torch.randn(len(prompt)))
    posterior = side(0.5 + torch.randn(2 * count, dim), torch.tensor([0] * count + [4] * count))
    return prior, posterior


def plain_weights(drawn: Drawn, beta: float) -> list[float]:
    w = [math.exp(beta * r) for r in drawn.reward.tolist()]
    rows = drawn.prompt.tolist()
    totals = {row: sum(v for v, p in zip(w, rows, strict=True) if p == row) for row in set(rows)}
    return [v / totals[p] / len(totals) for v, p in zip(w, rows, strict=True)]


def plain_numbers(drawn: Drawn) -> list[tuple[int, int]]:
    """(prompt, k) of each sample."""
    seen: dict[int, int] = {}
    found = []
    for row in drawn.prompt.tolist():
        found.append((row, seen.get(row, 0)))
        seen[row] = seen.get(row, 0) + 1
    return found


def plain_mean(values: Any, one: Drawn, w: list[float], other: Drawn, v: list[float]) -> float:
    """The definition: each block of two prompts by itself, without pairs of the same (prompt, k)."""
    x, y = one.embedding, other.embedding
    assert x is not None
    assert y is not None
    rows, columns = plain_numbers(one), plain_numbers(other)
    blocks = []
    for p, q in itertools.product({r for r, _ in rows}, {c for c, _ in columns}):
        pairs = [
            (w[i] * v[j], values(x[i].double(), y[j].double()))
            for i, j in itertools.product(range(len(x)), range(len(y)))
            if rows[i][0] == p and columns[j][0] == q and rows[i] != columns[j]
        ]
        blocks.append(sum(a * f for a, f in pairs) / sum(a for a, _ in pairs))
    return sum(blocks) / len(blocks)


def rbf(x: Tensor, y: Tensor) -> float:
    x, y = x / x.norm(), y / y.norm()
    return math.exp(-float((x - y).square().sum()) / 200.0)


def cubic(x: Tensor, y: Tensor) -> float:
    return float(x @ y / len(x) + 1) ** 3


@pytest.mark.parametrize(("metric", "kernel", "scale"), [(MMD(), rbf, 1000.0), (KID(), cubic, 1.0)])
def test_kernel_distances_are_loops_over_pairs(metric: Any, kernel: Any, scale: float) -> None:
    prior, posterior = two_sides()
    found = metric.of(prior, posterior, BETA, CONFIG)
    sides = {
        "prior": (prior, plain_weights(prior, 0.0)),
        "reweighted_prior": (prior, plain_weights(prior, BETA)),
        "posterior": (posterior, plain_weights(posterior, 0.0)),
    }
    for target, name in (("reweighted_prior", "prior"), ("reweighted_prior", "posterior"), ("prior", "posterior")):
        (x, w), (y, v) = sides[name], sides[target]
        parts = plain_mean(kernel, x, w, x, w), plain_mean(kernel, y, v, y, v), plain_mean(kernel, x, w, y, v)
        value = found[f"to_{target}"][name]
        assert value["mean"] == pytest.approx(scale * (parts[0] + parts[1] - 2 * parts[2]), rel=1e-6, abs=1e-6 * scale)
        assert value["low"] < value["high"]
    w = sides["reweighted_prior"][1]
    assert found["samples"]["reweighted_prior"] == pytest.approx(1 / sum(v * v for v in w))


def test_mmd_is_unbiased_on_gaussians_few_as_they_are() -> None:
    """Two prompts of four samples each: E k of two Gaussians is a Gaussian integral."""
    metric, width, draws = MMD(sigma=1.0, scale=1.0, normalise=False), 2, 60
    centres = {"prior": (-1.0, 1.0), "posterior": (0.0, 1.5)}

    def mean(one: str, other: str) -> float:
        blocks = itertools.product(centres[one], centres[other])
        return sum(3 ** (-width / 2) * math.exp(-width * (a - b) ** 2 / 6) for a, b in blocks) / 4

    truth = mean("prior", "prior") + mean("posterior", "posterior") - 2 * mean("prior", "posterior")
    prompt = torch.tensor([0] * 4 + [1] * 4)
    config = EvalConfig.model_validate({"bootstrap": 1})
    found = []
    for _ in range(draws):
        before, after = (
            side(torch.tensor(at).repeat_interleave(4)[:, None] + torch.randn(8, width), prompt)
            for at in centres.values()
        )
        found.append(metric.of(before, after, math.nan, config)["to_prior"]["posterior"]["mean"])
    error = float(np.std(found)) / math.sqrt(draws)
    assert abs(float(np.mean(found)) - truth) < 4 * error
    assert 4 * error < 2 * (1 - mean("prior", "prior")) / 8  # what pairs of a sample with itself would add


def test_kid_is_the_mean_over_all_subsets() -> None:
    """What is published is the mean over some subsets, here all pairs of three out of five: each its own unbiased estimate."""
    x, y = torch.randn(5, 4), torch.randn(5, 4) + 0.3
    prior, posterior = side(x), side(torch.cat([torch.zeros(5, 4), y]))  # numbered on, so that no noise is shared
    clouds = clouds_of(prior, posterior, math.nan)
    clouds["posterior"] = clouds["posterior"][torch.arange(5, 10)]
    whole = KID().between(clouds, [("posterior", "prior")], CONFIG)[0]["mean"]

    def estimate(rows: tuple[int, ...], columns: tuple[int, ...]) -> float:
        def within(z: Tensor, keep: tuple[int, ...]) -> float:
            return sum(cubic(z[i], z[j]) for i, j in itertools.permutations(keep, 2)) / 6

        across = sum(cubic(x[i], y[j]) for i, j in itertools.product(rows, columns)) / 9
        return within(x, rows) + within(y, columns) - 2 * across

    subsets = list(itertools.combinations(range(5), 3))
    found = [estimate(a, b) for a, b in itertools.product(subsets, subsets)]
    assert whole == pytest.approx(sum(found) / len(found), rel=1e-6)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    metric, shift, held = MMD(sigma=1.0, scale=1.0, normalise=False), 1.0, 0
    truth = 2 * 3**-0.5 * (1 - math.exp(-(shift**2) / 6))
    config = EvalConfig.model_validate({"bootstrap": 200})
    for _ in range(60):
        prior, posterior = side(torch.randn(40, 1)), side(shift + torch.randn(40, 1))
        found = metric.of(prior, posterior, math.nan, config)["to_prior"]["posterior"]
        held += found["low"] <= truth <= found["high"]
    assert held >= 50  # of 57 expected


def plain_prdc(x: Tensor, y: Tensor, k: int) -> dict[str, float]:
    """As published, in numpy: x generated, y real."""
    a, b = x.double().numpy(), y.double().numpy()

    def apart(p: Any, q: Any) -> Any:
        return np.sqrt(((p[:, None] - q[None]) ** 2).sum(-1))

    reach_a, reach_b = (np.sort(apart(z, z), 1)[:, k] for z in (a, b))
    d = apart(a, b)
    return {
        "precision": float((d <= reach_b[None]).any(1).mean()),
        "recall": float((d <= reach_a[:, None]).any(0).mean()),
        "density": float((d <= reach_b[None]).sum(1).mean() / k),
        "coverage": float((d <= reach_b[None]).any(0).mean()),
    }


@pytest.mark.parametrize(("n", "m", "k", "dim"), [(20, 20, 3, 2), (13, 40, 5, 6), (40, 9, 1, 3)])
def test_prdc_is_what_was_published(n: int, m: int, k: int, dim: int) -> None:
    x, y = torch.randn(n, dim), torch.randn(m, dim) * 1.5 + 0.5
    assert prdc(Cloud.of(x), Cloud.of(y), k) == pytest.approx(plain_prdc(x, y, k))


def test_prdc_of_equal_and_of_distant_sets() -> None:
    x = torch.randn(30, 4)
    same = prdc(Cloud.of(x), Cloud.of(x.clone()), 5)
    assert [same[key] for key in ("precision", "recall", "coverage")] == pytest.approx([1.0] * 3)
    assert set(prdc(Cloud.of(x), Cloud.of(x + 100), 5).values()) == {0.0}
    half = torch.cat([x, x + 100])
    lost = prdc(Cloud.of(x), Cloud.of(half), 5)
    assert lost["precision"] == pytest.approx(1.0)
    assert (lost["recall"], lost["coverage"]) == pytest.approx((0.5, 0.5))


def test_weights_stand_for_samples_of_what_they_weigh() -> None:
    """N(0, I) weighted by exp(x) is N(1, I) in x: it scores as samples of that, as many as are effective, do."""
    weighted, drawn = [], []
    for _ in range(10):
        x = torch.randn(600, 2, dtype=torch.float64)
        real = Cloud.of(x, x[:, 0].exp())
        shift, shifted = torch.tensor([1.0, 0.0]), torch.tensor([1.5, 0.0])
        generated = Cloud.of(torch.randn(200, 2, dtype=torch.float64) * 0.8 + shifted)
        weighted.append(list(prdc(generated, real, 5).values()))
        exact = torch.randn(round(real.effective), 2, dtype=torch.float64) + shift
        drawn.append(list(prdc(generated, Cloud.of(exact), 5).values()))
    gap = np.array(weighted) - np.array(drawn)
    assert (abs(gap.mean(0)) < [0.05, 0.03, 0.25, 0.04]).all()
    raw = prdc(generated, Cloud.of(x), 5)
    assert raw["recall"] < np.mean(weighted, 0)[1] - 0.08  # without weights it is another question


@pytest.mark.parametrize("n", [3, 40])
def test_frechet_distance_of_commuting_covariances_has_a_closed_form(n: int) -> None:
    """Points that have their moments exactly: for n <= dim, too, where the covariances are singular."""
    axes = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    rank = min(n - 1, 6)
    plain = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, rank)], 1).double()).Q[:, 1:] * math.sqrt(n - 1)
    s, t = torch.rand(rank).double() + 0.2, torch.rand(rank).double() + 0.5
    a, b = torch.randn(6).double(), torch.randn(6).double()
    one, other = a + plain * s @ axes[:rank], b + plain * t @ axes[:rank]
    expected = float((a - b).square().sum() + (s - t).square().sum())
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_any_covariances_with_weights() -> None:
    x, y, w, v = torch.randn(30, 4), torch.randn(20, 4) @ torch.randn(4, 4) + 1, torch.rand(30), torch.rand(20)
    a, b = (np.average(z.double().numpy(), axis=0, weights=u.double().numpy()) for z, u in ((x, w), (y, v)))
    A, B = (np.cov(z.double().numpy().T, aweights=u.double().numpy()) for z, u in ((x, w), (y, v)))
    root = np.sqrt(np.linalg.eigvals(A @ B).astype(complex)).real.sum()  # of no symmetric matrix
    expected = ((a - b) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * root
    assert frechet_distance(x, y, (w, v)) == pytest.approx(expected, rel=1e-9)
    assert math.isnan(frechet_distance(x[:1], y))


def test_lgmd_is_a_mean_of_logarithms() -> None:
    e, w = torch.randn(6, 4), torch.rand(6)
    pairs = list(itertools.permutations(range(6), 2))
    logs = {(i, j): math.log(float((e[i].double() - e[j].double()).norm()) / 2.0) for i, j in pairs}
    assert lgmd(e) == pytest.approx(sum(logs.values()) / 30, abs=1e-9)
    share = {(i, j): float(w[i] * w[j]) for i, j in pairs}
    weighted = sum(share[p] * logs[p] for p in pairs) / sum(share.values())
    assert lgmd(e, w) == pytest.approx(weighted, abs=1e-6)
    assert lgmd(3 * e) == pytest.approx(lgmd(e) + math.log(3), abs=1e-6)
    assert lgmd(torch.ones(3, 5)) == pytest.approx(math.log(1e-8))
    with pytest.raises(ValueError, match="at least 2 embeddings, got 1"):
        lgmd(torch.ones(1, 2))


def test_means_within_prompts_are_those_of_each_prompt() -> None:
    prior, _ = two_sides()
    cloud = clouds_of(prior, prior, BETA)["reweighted_prior"]
    values = resampled(cloud, 3, seed=1)
    found = pair_means(lambda x, y: x @ y.T, cloud, cloud, (values, values), within=True)
    parts = [cloud[(cloud.prompt == row).nonzero().flatten()] for row in (0, 4)]
    alone = [float(pair_means(lambda x, y: x @ y.T, part, part)) for part in parts]
    assert float(found[0]) == pytest.approx(sum(alone) / 2)
    torch.testing.assert_close(values[:, cloud.prompt == 0].sum(1), torch.full((4,), 0.5, dtype=torch.float64))


def test_across_prompts_is_another_number_than_within() -> None:
    """Prompts far apart, no difference within each: all of the diversity is between them."""
    metric = describe({"component": "diversity"}, "metric").construct()
    points = torch.eye(4)[[0, 0, 0, 1, 1, 1]]
    drawn = side(points, torch.tensor([0, 0, 0, 1, 1, 1]))
    found = metric.of(drawn, drawn, 1.0, CONFIG)
    assert found["posterior"]["pairwise_cosine_distance"] == pytest.approx(0.0, abs=1e-12)
    assert found["posterior"]["lgmd"] == pytest.approx(math.log(1e-8))
    across = found["across_prompts"]
    assert across["posterior"]["pairwise_cosine_distance"] == pytest.approx(
        0.5
    )  # two samples are of one prompt half of the time
    assert across["posterior"]["vendi"] == pytest.approx(2.0)
    assert across["posterior"]["lgmd"] == pytest.approx((math.log(1e-8) + math.log(math.sqrt(2) / 2)) / 2)
    assert across["samples"] == 6
    assert metric.of(drawn.of(0), drawn.of(0), 1.0, CONFIG)["across_prompts"] is None


METRICS = [MMD(), KID(), PRDC(k=3), Frechet()]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_an_untrained_posterior_is_no_distance_away(metric: Any) -> None:
    """It is the prior sample by sample: pairs of the same noise must not make it look better than new samples."""
    prior, _ = two_sides(count=12)
    found = metric.of(prior, prior, 0.0, CONFIG)["to_prior"]["posterior"]
    if metric.name == "prdc":
        fresh = prdc(Cloud.of(torch.randn(26, 3)), Cloud.of(torch.randn(26, 3)), 3)
        assert found["density"] == pytest.approx(fresh["density"], abs=0.35)
        assert found["precision"] < 1.0
    else:
        assert (found if isinstance(found, float) else found["mean"]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_what_is_not_there_is_none(metric: Any) -> None:
    prior, posterior = two_sides()
    nobody = Drawn(torch.zeros(0, dtype=torch.long), torch.zeros(0))
    alone = metric.of(nobody, posterior, math.nan, CONFIG)
    assert [alone[f"to_{name}"] for name in ("reweighted_prior", "prior", "reference")] == [None] * 3
    assert metric.row(alone) == ("-",) * len(metric.columns) or alone["too_few"]
    assert metric.card(alone) == {}
    unknown = metric.of(prior, posterior, math.nan, CONFIG)
    assert unknown["to_reweighted_prior"] is None
    assert set(unknown["to_prior"]) == {"posterior"}
    whole = metric.of(prior, posterior, BETA, CONFIG)
    assert whole["dim"] == 3
    assert len(metric.row(whole)) == len(metric.columns)
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_real_images_are_held_against_all_prompts_together() -> None:
    prior, posterior = two_sides(count=20)
    metric = Frechet()
    real = torch.randn(50, 3)
    metric.reference = Reference(real, prompts=2)
    found = metric.of(prior, posterior, BETA, CONFIG)
    assert posterior.embedding is not None
    assert found["to_reference"]["posterior"] == pytest.approx(frechet_distance(posterior.embedding, real))
    assert set(found["to_reference"]) == {"prior", "reweighted_prior", "posterior"}
    assert found["samples"]["reference"] == 50
    assert metric.of(prior.of(0), posterior.of(0), BETA, CONFIG)["to_reference"] is None


def test_too_few_samples_are_said() -> None:
    few = side(torch.randn(4, 3))
    assert PRDC().of(few, few, 1.0, CONFIG)["to_prior"] == {"posterior": None, "reweighted_prior": None}
    assert PRDC().row(PRDC().of(few, few, 1.0, CONFIG)) == ("-",) * 3
    with pytest.raises(ValueError, match="5 neighbours need more than 5 samples, here are 4 effective ones of 4"):
        prdc(Cloud.of(torch.randn(4, 3)), Cloud.of(torch.randn(9, 3)), 5)
    found = Frechet().of(few, replace(few, embedding=torch.randn(4, 3)), 0.0, CONFIG)
    assert found["too_few"] == []
    wide = replace(few, embedding=torch.randn(4, 9))
    found = Frechet().of(wide, wide, 0.0, CONFIG)
    assert set(found["too_few"]) == {"prior", "posterior", "reweighted_prior"}
    assert Frechet().row(found)[0].endswith(" (few)")
    single = side(torch.randn(1, 3))
    assert math.isnan(MMD().of(single, single, 0.0, CONFIG)["to_prior"]["posterior"]["mean"])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ({"component": "prdc", "k": 0}, "k is 0: at least 1 neighbour"),
        ({"component": "mmd", "sigma": -1.0}, "sigma is -1.0: it must be positive"),
        ({"component": "kid", "degree": 0}, "degree is 0: it must be at least 1"),
        ({"component": "mmd", "k": 3}, "has no argument 'k'"),
    ],
)
def test_settings_out_of_range_are_refused(metric: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe(metric, "metric")


def test_vectors_without_a_direction_are_named() -> None:
    points = torch.randn(4, 3)
    points[2] = 0
    with pytest.raises(ValueError, match=r"finite and non-zero.*wrong are rows \[2\]"):
        MMD().of(side(points), side(points), 0.0, CONFIG)
    assert Frechet().of(side(points), side(points), 0.0, CONFIG)["to_prior"]["posterior"] == pytest.approx(0, abs=1e-9)
