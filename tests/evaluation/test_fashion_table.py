"""The parts of the command behind docs/fashion.md that compute or write: weighted diversity, and the table between its marks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from diffusion_rtb.comparison.variants import load_variants
from diffusion_rtb.config.load import RunConfig
from tests.measurements.fashion.judging import diversity
from tests.measurements.fashion.rows import CONFIG, TRAINED, Table
from tests.measurements.fashion.table import END, START, write_table, written


def test_diversity_is_the_mean_over_weighted_pairs() -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.arange(1.0, 8.0).double() / 28
    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    weights = torch.stack([share[i] * share[j] for i, j in pairs])
    distances = torch.stack([1 - cosine_similarity(x[i], x[j], dim=0) for i, j in pairs])
    assert diversity(x, share) == pytest.approx(float(weights @ distances / weights.sum()))
    # A picture with twice the weight is two pictures, but for the pair that the two make.
    assert diversity(torch.ones(3, 2), torch.full((3,), 1 / 3, dtype=torch.float64)) == pytest.approx(0)


def test_the_table_has_mean_and_deviation_over_classes_and_replaces_the_old_one(tmp_path: Path) -> None:
    row = {"n": 256.0, "log_r": -1.0, "frechet": 5.0, "diversity": 0.2, "strength": 0.5, "r2": 0.5, "kl": 2.0}
    results = {
        "bag": {"rtb": row},
        "dress": {"rtb": row | {"log_r": -2.0}, "real": {"log_r": -0.5, "frechet": 1.0}},
        "tops": {"rtb": row},
        "hardware": "2 cores",
    }
    text = written(results)
    assert "| RTB | 2 | 256 | -1.50 ± 0.71 | 5.0 ± 0.0 | 0.200 ± 0.000 | 0.50 ± 0.00 | 2.00 ± 0.00 |" in text
    assert "| *real test pictures* | 1 | - | -0.50 | 1.0 | - | - | - |" in text
    # Nothing to fit a slope to: its standard error is 10 sqrt((1/0.001 - 1)/254) = 20, or unknown.
    for r2 in (0.001, 0.0):
        vague = written({"bag": {"rtb": row | {"strength": 10.0, "r2": r2}}})
        assert "| RTB | 1 | 256 | -1.00 | 5.0 | 0.200 | - | 2.00 |" in vague
    page = tmp_path / "page.md"
    page.write_text(f"before {START} old {END} after")
    write_table(results, page)
    write_table(results, page)
    assert page.read_text() == f"before {START}\n\n{text}\n\n{END} after"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the marks"):
        write_table(results, page)


def network_calls(config: RunConfig) -> int:
    """Calls per sample of a training, a gradient counted as two more."""
    t, steps = config.train, (config.prior.model_extra or {})["steps"]
    assert t.gradient_steps is not None
    if config.objective.component == "value_gradient":
        shares = [(source.model_extra or {})["share"] for source in config.behaviours]
        states, own = t.updates_per_iteration * t.gradient_steps * t.group, t.group - round(t.group * sum(shares))
        return t.iterations * (4 * states + 2 * steps * own)
    return t.iterations * t.group * (2 * steps + 3 * t.gradient_steps)


def test_every_method_is_a_run_of_the_same_budget() -> None:
    work = Table(Path("out"), Path("data"), load_variants(CONFIG))
    configs = {method: work.config("tops", method) for method in TRAINED}
    assert len({(network_calls(config), str(config.posterior)) for config in configs.values()}) == 1
    from_prior = ["rtb", "vargrad", "trust_pcl_v", "value_gradient", "rtb_after"]
    assert [method for method, config in configs.items() if config.behaviours] == from_prior
