"""Evaluations whose truth is known: the prior's rewards are N(0, 1), so beta = 1 has log Z = 1/2, KL = 1/2 and rewards N(1, 1)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.config.sections import Component, Factor
from diffusion_rtb.evaluation.metric import metrics_of
from diffusion_rtb.evaluation.samples import Drawn, Pictured
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.evaluation.written import write_evaluation
from diffusion_rtb.files.evaluations import SCHEMA

__all__ = ["LOG_Z", "evaluated"]

LOG_Z, STEPS = 0.5, 5


def evaluated(
    folder: Path,
    prompts: Sequence[str] = ("a cat", "a dog"),
    *,
    shift: float = 1.0,
    tilt: float = 1.0,
    judged: float | None = None,
    count: int = 200,
    kind: str = "run",
    prior: bool = True,
    pictures: bool = True,
    name: str = "made",
) -> Path:
    """Write an evaluation by the code that writes real ones, and return its folder.

    Args:
        folder: To be made.
        prompts: Each with `count` samples on both sides.
        shift: Mean reward of the model; 1 at the exact posterior.
        tilt: log q - log p is tilt·r - tilt/2; 1 at the exact posterior.
        judged: Mean score of a judge called `<i>held</i>`; the prior's is 0.
        count: Samples per prompt and side.
        kind: `images` have no log-densities and no beta.
        prior: Whether there are prior samples.
        pictures: Whether the samples are pictures, 4 by 4 pixels each.
        name: Of the subject.
    """
    made = torch.Generator().manual_seed(1)
    known = kind == "run"
    before, left = _side(len(prompts), count, 0.0, None, None if judged is None else 0.0, made, pictures)
    after, right = _side(len(prompts), count, shift, tilt if known else None, judged, made, pictures)
    if not known:  # without beta there is no re-weighted prior whose variety could be measured
        before, after = replace(before, embedding=None), replace(after, embedding=None)
    if not prior:
        before = Drawn.none()
    beta = 1.0 if known else float("nan")
    config = EvalConfig(
        bootstrap=100,
        embedder=Component(component="clip_score"),
        factors=(Factor(name="sort", classes=("a", "b"), labels=("first", "second")),),
    )
    numbers = summarise(
        before, after, prompts, beta, config, metrics_of([describe(metric, "metric") for metric in config.metrics])
    )
    about: dict[str, Any] = {"kind": kind, "name": name, "path": str(folder), "recipe": f"{name} made for a test"}
    about |= {"sampling": {"steps": STEPS}, "seeds": {"seed": 0}, "versions": {"torch": torch.__version__}}
    sides = {"prior": (before, left)} if prior else {}
    write_evaluation(folder, {"schema": SCHEMA, "subject": about} | numbers, sides | {"posterior": (after, right)})
    return folder


def training(folder: Path, rows: int = 6) -> Path:
    """A run's metrics.jsonl beside the evaluation, with rows of the look that training takes at itself."""
    lines: list[dict[str, Any]] = [
        {"iteration": i, "reward": i / rows, "elbo": -1 + i / rows, "kl": i / 10, "loss": 1.0 / (i + 1)}
        for i in range(rows)
    ]
    for i in range(0, rows, 2):
        lines[i] |= {
            "watch/reward": i / rows,
            "watch/kl": i / 10,
            "watch/vendi": 5.0 - i / 5,
            "watch/samples": 8.0,
            "watch/judge/held": 0.5 + i,
            "watch/alarm": float(i == 4),
        }
    (folder.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _side(
    prompts: int,
    count: int,
    shift: float,
    tilt: float | None,
    judged: float | None,
    made: torch.Generator,
    pictures: bool,
) -> tuple[Drawn, Pictured]:
    n = prompts * count
    prompt, index = torch.arange(prompts).repeat_interleave(count), torch.arange(count).repeat(prompts)
    reward = shift + torch.randn(n, generator=made)
    log_p = torch.randn(n, STEPS, generator=made)
    ratio = None if tilt is None else (tilt * reward - tilt / 2)[:, None].expand(n, STEPS) / STEPS
    drawn = Drawn(
        prompt,
        reward,
        None if ratio is None else log_p + ratio,
        None if ratio is None else log_p,
        embedding=torch.randn(n, 8, generator=made),
        labels=(reward > 0).long()[:, None],
        judges=None if judged is None else {"<i>held</i>": judged + torch.randn(n, generator=made)},
        index=index,
    )
    image = torch.randint(256, (n, 3, 4, 4), generator=made, dtype=torch.uint8) if pictures else torch.randn(n, 2)
    return drawn, Pictured(image, reward, prompt, index)
