"""The documents are true: links lead somewhere, configs load, commands exist, code runs, and every page is in the site."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import EvalConfig, load_config
from diffusion_rtb.config.yaml_text import read_yaml
from diffusion_rtb.evaluation.metric import metrics_of
from diffusion_rtb.evaluation.samples import Drawn
from diffusion_rtb.interfaces import Samples
from diffusion_rtb.objectives.reward_weighted import RewardWeighted
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.run.members import check_objective_members
from tests.oracles.behaving import run
from tests.oracles.documents import DOCUMENTS, ROOT, anchors, blocks, commands, links
from tests.oracles.states import states_of
from tests.oracles.terms import close, cotangent, random_terms
from tests.oracles.tiny import save_tiny

PAGES = sorted((ROOT / "docs").glob("*.md"))

SNIPPETS = [
    (path.name, block) for path in PAGES if path.name != "prompts.md" for block in blocks(path.read_text(), "yaml")
]
"""Parts of configs; docs/prompts.md has a test of its own."""

BASE = """
name: documented
prior: {component: gaussian, mean: [0.0]}
reward: {component: jpeg}
beta: 1.0
prompts: {list: [a cat]}
train: {prompts_per_iteration: 1, micro_batch: 8}
"""

SMALL = """
prior: {component: stable_diffusion, path: tiny, steps: 2, dtype: float16}
reward: {component: jpeg}
beta: {value: 1.0, kl_budget: {nats: 1.0}}
posterior: {rank: 1, alpha: 1.0}
prompts: {list: [a cat]}
behaviours:
  - {component: prior_buffer, share: 0.2, capacity: 2}
  - {component: replay, share: 0.2}
  - {component: back_and_forth, share: 0.2}
  - {component: steered, share: 0.2, particles: 2}
train: {iterations: 1, prompts_per_iteration: 1, group: 5, micro_batch: 5, grid_every: 0}
"""


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_anchors_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in links(text):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


def test_a_broken_anchor_would_be_found() -> None:
    assert anchors("# From the prior's spread\n\n## ELBO, KL, log Z\n") == {"from-the-priors-spread", "elbo-kl-log-z"}
    assert links("[a](b.md#c) `[x](y)`\n```\n[d](e.md)\n```\n") == ["b.md#c"]


def test_every_page_is_in_the_site() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [name for entry in nav for name in ([entry] if isinstance(entry, str) else next(iter(entry.values())))]
    assert len(listed) == len(set(listed))
    assert {path.name for path in PAGES} <= set(listed)


@pytest.mark.parametrize("document", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_every_file_it_names_exists(document: Path) -> None:
    for name in re.findall(
        r"`((?:configs|diffusion_rtb|docs|examples|pipelines|rewards|tests)/[\w./-]*\w)`", document.read_text()
    ):
        assert (ROOT / name).exists() or "NAME" in name, name


WRITTEN = [
    ("my_reward.py", "rewards.md", "class Redness"),
    ("my_metric.py", "extending.md", "class ShareAbove"),
    ("my_behaviour.py", "extending.md", "class Wider"),
]


@pytest.mark.parametrize(("name", "snippet"), SNIPPETS, ids=[name for name, _ in SNIPPETS])
def test_the_parts_of_configs_load(name: str, snippet: str, project: Path) -> None:
    config = read_yaml(BASE) | read_yaml(snippet)
    (project / "config.yaml").write_text(json.dumps(config))
    loaded = load_config(project)
    describe_components(loaded)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the modules that the documents write."""
    for name, document, word in WRITTEN:
        (block,) = [block for block in blocks(page(document), "python") if word in block]
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return tmp_path


TRAINING = [
    (path.name, words)
    for path in [ROOT / "README.md", *PAGES]
    for words in commands(path.read_text())
    if words[:2] == ["python", "train.py"] and (ROOT / words[2]).is_file()
]


@pytest.mark.parametrize(("name", "words"), TRAINING, ids=[" ".join(words) for _, words in TRAINING])
def test_training_commands_are_valid(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    describe_components(load_config(words[2], [word for word in words[3:] if not word.startswith("-")]))


OURS = [
    words
    for path in [ROOT / "README.md", *PAGES]
    for words in commands(path.read_text())
    if words[0] == "diffusion-rtb"
]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_options_of_commands_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([words[1], "--help"])
    told = capsys.readouterr().out
    for option in words[2:]:
        if option.startswith("-"):
            assert re.search(rf"(?<!\S){re.escape(option)}\b", told), option


def test_the_reward_is_a_reward(project: Path) -> None:
    written = re.search(r"`reward: (\{component: \"?my_reward:.*?\})`", page("rewards.md"))
    assert written is not None
    reward = build(read_yaml(written.group(1)), "reward")
    images = torch.zeros(2, 3, 4, 4)
    images[0, 0] = 1
    assert reward(images, ["a", "b"]).tolist() == [2.0, 0.0]


def test_the_objective_is_vargrad_in_reward_units() -> None:
    (block,) = [block for block in blocks(page("extending.md"), "python") if "class KlReinforce" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    terms = replace(random_terms(0), prompt=torch.zeros_like(random_terms(0).prompt))
    close(cotangent(RTB(), terms, 3.0), 3.0 * cotangent(names["KlReinforce"](), terms, 3.0))


def test_the_objective_of_states_denoises_weighted_samples() -> None:
    (block,) = [block for block in blocks(page("extending.md"), "python") if "class Denoise" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    objective, samples = names["Denoise"](), Samples(torch.zeros(5, dtype=torch.long), torch.randn(5))
    weight = RewardWeighted().weights(samples, 1.3)
    close(objective.weights(samples, 1.3), weight)
    q, p, mean_0 = torch.randn(3, 5, 2, dtype=torch.float64)
    at = states_of(q, p, mean_0=mean_0, weight=weight)
    close(objective.aim(at, 1.3), RewardWeighted().aim(at, 1.3))
    check_objective_members(objective)


def test_the_behaviour_draws_wider_steps(project: Path) -> None:
    """By the mean square of (x_s - mean) / std, which is in the log-density: factor², and 1 without it."""
    listed = [{"component": "my_behaviour:Wider", "share": 0.5, "factor": 1.5}]
    trainer = run(project, behaviours=listed, train={"group": 400, "micro_batch": 400})
    parts = trainer.sources.draw(trainer.sampler, [0], 0, 1.0)
    for name, expected in {"posterior": 1.0, "wider": 1.5**2}.items():
        trajectory = parts[name].trajectory
        dense = trajectory.stochastic
        constant = torch.log(2 * torch.pi * trajectory.std[dense].double() ** 2)  # of two dimensions
        squares = -2 * (trajectory.log_prob[:, dense] + constant)
        assert float(squares.mean() / 2) == pytest.approx(expected, rel=0.1)


def test_the_metric_measures(project: Path) -> None:
    (metric,) = metrics_of([describe({"component": "my_metric:ShareAbove", "threshold": 0.5}, "metric")])
    drawn = Drawn(torch.zeros(4, dtype=torch.long), torch.tensor([0.0, 0.5, 0.6, 1.0]))
    assert metric.of(drawn, drawn, 1.0, EvalConfig()) == 0.5
    assert metric.row(0.5) == ("0.50",)


def test_every_logged_metric_is_explained_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "small.yaml"])
    (line,) = (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()
    logged = {re.sub(r"/.*", "/…", name) for name in json.loads(line)} - {"iteration"}
    rows = [row.split("|")[1] for row in page("metrics.md").splitlines() if row.startswith("| `")]
    explained = {name for row in rows for name in re.findall(r"`(.+?)`", row)}
    absent = {
        "achieved_strength",
        "strength_r2",
        "strength_error",
        "reward_std",
    }  # of an untrained posterior with a single trajectory
    assert {name for name in explained - absent if not name.startswith("watch/")} == logged  # `watch` is off
