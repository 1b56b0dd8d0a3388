"""Prompt alignment and OCR accuracy: planted scorers whose answers are known, and the pixel prior's closed form."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusion_rtb.cli.main import eval_main
from diffusion_rtb.config.components import describe
from diffusion_rtb.config.load import EvalConfig
from diffusion_rtb.evaluation.metric import metrics_of, missing, scorer_of
from diffusion_rtb.evaluation.metrics.alignment import Alignment, retrieved
from diffusion_rtb.evaluation.metrics.ocr import OcrAccuracy
from diffusion_rtb.evaluation.samples import Drawn, draw
from diffusion_rtb.evaluation.summary import summarise
from diffusion_rtb.sampling.sampler import Sampler
from tests.oracles.pixel import PixelPrior, end_variance, green, set_known_posterior

BETA = 1.2
PROMPTS = ["negative", "positive"]
CONFIG = EvalConfig(bootstrap=50)


class Only:
    """Tells classes apart, and has no score of a picture and a prompt."""

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        return torch.zeros(len(images), len(classes))


class Red:
    """The red of a picture is the row of the prompt that it shows; a grey picture is of none."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images[:, 0, 0, 0].float()

    def classify(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        rows = torch.arange(len(classes))
        shown = images[:, 0, 0, 0, None] == rows
        return torch.where(shown, 0.0, torch.where(shown.any(1, keepdim=True), -9.0, -math.log(len(classes))))


def pictures(*shown: float) -> Tensor:
    return torch.tensor(shown, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 2, 2)


def scored(metric: Any, prompts: Sequence[str], images: Tensor, rows: Sequence[int], reward: Sequence[float]) -> Drawn:
    ask = scorer_of([metric])
    assert ask is not None
    found = ask(images, [prompts[row] for row in rows], [{} for _ in rows])
    return Drawn(torch.tensor(rows), torch.tensor(reward), scores=found)


def test_shares_scores_and_weights_of_planted_pictures() -> None:
    prompts = ["a", "b", "c"]
    metric = Alignment({"component": f"{__name__}:Red"})
    metric.prepare(prompts, [{}] * 3)
    heavy = math.log(3) / BETA  # weight 3/4 of its prompt
    prior = scored(metric, prompts, pictures(0, 1, 1, 0.5), [0, 0, 1, 2], [0.0, heavy, 0.0, 0.0])
    posterior = scored(metric, prompts, pictures(0, 1, 2), [0, 1, 2], [0.0] * 3)
    value = metric.of(prior, posterior, BETA, CONFIG)
    assert value is not None
    own = value["own_prompt"]
    # Prompt a: one picture of two; b: its one; c: a picture that shows none fits all three alike.
    assert own["prior"]["mean"] == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)
    assert own["reweighted_prior"]["mean"] == pytest.approx((1 / 4 + 1 + 1 / 3) / 3)
    assert own["reweighted_prior"]["low"] < own["reweighted_prior"]["mean"] < own["reweighted_prior"]["high"]
    assert own["posterior"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert own["prior"]["low"] < own["prior"]["mean"] < own["prior"]["high"]
    assert value["chance"] == pytest.approx(1 / 3)
    assert value["score"]["prior"]["mean"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert value["score"]["reweighted_prior"]["mean"] == pytest.approx((0.75 + 1 + 0.5) / 3)
    assert metric.row(value) == ("0.67 → 1.00", "0.61 → 1.00")
    assert metric.card(value)["own prompt fits best, share"]["posterior"]["mean"] == 1
    assert metric.of(prior, Drawn(prior.prompt, prior.reward), BETA, CONFIG) is None
    alone = metric.of(Drawn.none(), posterior, math.nan, CONFIG)  # pictures made elsewhere
    assert alone is not None
    assert (alone["own_prompt"]["prior"], alone["own_prompt"]["reweighted_prior"]) == (None, None)
    assert metric.row(alone) == ("1.00", "1.00")
    assert missing(metric, Drawn.none(), posterior, math.nan) is None


def test_a_scorer_that_sees_nothing_has_chance() -> None:
    assert retrieved(torch.zeros(5, 4), torch.tensor([0, 1, 2, 3, 0])).tolist() == [0.25] * 5


def test_the_share_has_its_closed_form_on_the_pixel_prior() -> None:
    """P(the green sum is positive) is Phi(beta·sqrt v) at the posterior and 1/2 at the prior, whatever the prompt says."""
    prior = PixelPrior()
    set_known_posterior(prior, BETA)
    sampler = Sampler(prior, green, PROMPTS, 150)
    metrics = metrics_of(
        [describe({"component": "alignment", "scorer": {"component": "tests.oracles.pixel:Signs"}}, "metric")]
    )
    metrics[0].prepare(PROMPTS, [{}] * 2)
    scorer = scorer_of(metrics)
    before, after = (draw(sampler, CONFIG, 300, 0, posterior=side, scorer=scorer)[0] for side in (False, True))
    rows = [row["alignment"] for row in summarise(before, after, PROMPTS, BETA, CONFIG, metrics)["per_prompt"]]
    positive = 0.5 * (1 + math.erf(BETA * math.sqrt(end_variance(prior)) / math.sqrt(2)))
    for row, share in zip(rows, (1 - positive, positive), strict=True):
        # 300 samples: one standard error is at most 0.03.
        assert row["own_prompt"]["prior"]["mean"] == pytest.approx(0.5, abs=0.1)
        assert row["own_prompt"]["posterior"]["mean"] == pytest.approx(share, abs=0.07)
        assert row["own_prompt"]["reweighted_prior"]["mean"] == pytest.approx(share, abs=0.07)
        assert row["score"]["posterior"]["mean"] == pytest.approx(float(after.reward.mean()), abs=0.2)


def test_one_prompt_has_a_score_and_no_share() -> None:
    metric = Alignment({"component": f"{__name__}:Red"})
    metric.prepare(["a"], [{}])
    one = scored(metric, ["a"], pictures(0, 1), [0, 0], [0.0, 0.0])
    value = metric.of(one, one, BETA, CONFIG)
    assert value is not None
    assert (value["own_prompt"], value["chance"]) == (None, None)
    assert metric.row(value) == ("0.50 → 0.50", "-")
    assert list(metric.card(value)) == [f"alignment ({__name__}:Red)"]


def test_what_cannot_be_scored_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="alignment needs a scorer that is a reward"):
        Alignment({"component": f"{__name__}:Only"}).prepare(["a"], [{}])
    with pytest.raises(ValueError, match="no argument 'modell'"):
        Alignment({"component": "clip_score", "modell": "x"})
    for metric in (Alignment({"component": f"{__name__}:Red"}), OcrAccuracy({"component": f"{__name__}:Red"})):
        with pytest.raises(ValueError, match=r"pictures.*vectors \(2,\); leave it out"):
            metric.scores(torch.zeros(3, 2), ["a"] * 3, [{}] * 3)


def test_exact_texts_are_those_without_an_error() -> None:
    metric = OcrAccuracy({"component": f"{__name__}:Red"})
    metric.prepare(["a"], [{}])
    heavy = math.log(3) / BETA
    prior = scored(metric, ["a"], pictures(0.5, 1), [0, 0], [0.0, heavy])
    posterior = scored(metric, ["a"], pictures(1, 1, 0.999999), [0, 0, 0], [0.0] * 3)
    value = metric.of(prior, posterior, BETA, CONFIG)
    assert value is not None
    assert value["text"]["reweighted_prior"]["mean"] == pytest.approx(0.25 * 0.5 + 0.75)
    assert value["exact"]["prior"]["mean"] == 0.5
    assert value["exact"]["posterior"]["mean"] == pytest.approx(2 / 3)
    assert metric.row(value) == ("0.75 → 1.00", "0.50 → 0.67")


def test_prompts_without_quotations_are_refused_before_the_recogniser_is_loaded() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    with pytest.raises(ValueError, match=r"metrics: ocr: .*1 quote no text, the first is 'a cat'.*eval.prompts"):
        OcrAccuracy().prepare(['a sign that says "open"', "a cat"], [{}] * 2)


def test_signs_of_another_tool_are_read_without_a_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Really drawn and really read, by the command: each value is 1 less the errors per wanted character, as one counts them."""
    pytest.importorskip("rapidocr_onnxruntime")
    monkeypatch.chdir(tmp_path)
    signs = [("open", "OPEN", 1.0), ("open", "opec", 3 / 4), ("exit 7", "Exit 7", 1.0), ("exit 7", "exit 8", 4 / 5)]
    signs += [("coffee", "coffee", 1.0), ("coffee", "COFFEE NOW", 3 / 6), ("coffee", "tea", 1 / 6)]
    folder, lines = tmp_path / "signs", []
    folder.mkdir()
    for number, (wanted, drawn, _) in enumerate(signs):
        picture = Image.new("RGB", (128, 128), "white")
        font = ImageFont.load_default(size=min(190 / len(drawn), 76))
        ImageDraw.Draw(picture).text((64, 64), drawn, "black", font, anchor="mm")
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "prompt": f'a sign that says "{wanted}"'}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(SystemExit) as left:
        eval_main([str(folder), "--reward", "jpeg", "--out", "out", "eval.metrics=[ocr]", "eval.bootstrap=10"])
    assert not left.value.code
    found = json.loads(Path("out/metrics.json").read_text())
    assert found["left_out"] == []
    values = {wanted: [value for other, _, value in signs if other == wanted] for wanted, _, _ in signs}
    for row, expected in zip(found["per_prompt"], values.values(), strict=True):
        assert row["ocr"]["text"]["prior"] is None
        assert row["ocr"]["text"]["posterior"]["mean"] == pytest.approx(sum(expected) / len(expected))
        assert row["ocr"]["exact"]["posterior"]["mean"] == pytest.approx(expected.count(1.0) / len(expected))
    assert "Reading 7 posterior pictures of 3 prompts" in capsys.readouterr().err


def test_ocr_without_its_extra_is_refused_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name.startswith("rapidocr") else found(name, *rest)
    )
    with pytest.raises(ValueError, match=r"diffusion-rtb\[ocr\]"):
        describe({"component": "ocr"}, "metric")
