"""A prior of other people, with nothing but the protocol: trained, evaluated, exported, compared; what is wrong in it is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion_rtb import trajectory_noise
from diffusion_rtb.chain.seeds import generators
from diffusion_rtb.cli.main import main
from diffusion_rtb.interfaces import Prior
from diffusion_rtb.objectives.rtb import RTB
from diffusion_rtb.run.members import check_attached, check_objective_members, check_prior_members
from pipelines.gmm import GMM
from tests.oracles.third_party_prior import WalkPrior

CONFIG = """
prior: {component: "tests.oracles.third_party_prior:WalkPrior"}
reward: {component: "tests.oracles.third_party_prior:first"}
objective: {component: rtb}
beta: 1.0
prompts: {list: [""]}
train: {iterations: 60, prompts_per_iteration: 1, group: 64, micro_batch: 64, lr: 0.05, grid_every: 0, checkpoint_every: 60}
eval: {samples: 200, batch: 200, bootstrap: 20}
"""


def leave(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.usefixtures("shapes_unchecked")
def test_it_is_trained_evaluated_exported_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("walk.yaml").write_text(CONFIG)
    assert isinstance(WalkPrior(), Prior)
    assert leave("train", "walk.yaml") == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in Path("runs/walk/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 60
    assert max(row["parity"] for row in rows) < 1e-5
    assert rows[-1]["kl"] == pytest.approx(0.5, abs=0.15), "N(1, 1) against N(0, 1)"
    assert leave("eval", "runs/walk") == 0, capsys.readouterr().err
    shifts = torch.tensor(json.loads(Path("runs/walk/lora/shifts.json").read_text()))
    weights = torch.tensor([0.8**k for k in range(4)])  # of the step at t = k on x_0
    assert (weights @ shifts).tolist() == pytest.approx([1.0, 0.0], abs=0.15)
    card = Path("runs/walk/lora/README.md").read_text()
    assert "load_lora_weights" not in card
    assert "It is not a LoRA" in card
    assert "diffusion-rtb sample RUN" in card
    assert (
        leave(
            "compare",
            "walk.yaml",
            "--samples",
            "400",
            "--points",
            "1",
            "--point-samples",
            "16",
            "--seeds",
            "1",
            "train.iterations=3",
        )
        == 0
    )
    table = Path("runs/walk-compare/table.md").read_text()
    assert "log Z = 0.5000 nats" in table
    assert "exact denoiser" not in table
    assert "No denoiser is the exact posterior's" in table


def broken(**members: Any) -> Any:
    """The prior with some members replaced."""
    return type("Broken", (WalkPrior,), members)()


def says(**more: Any) -> Any:
    return lambda self: {"family": "walk", **more}


COUNT = iter(range(1000))
GUIDANCE: Mapping[str, Any] = {"tilted_prior": "guided", "scale": 5.0, "negative_prompt": None}


@pytest.mark.parametrize(
    "members, message",
    [
        ({"fingerprint": says(adapter="copy")}, r"fingerprint\(\)\['adapter'\] is 'copy' \(str\); it is a mapping, None or absent"),
        ({"fingerprint": says(sampler="ddim")}, r"\['sampler'\] is 'ddim' \(str\)"),
        ({"fingerprint": says(guidance=5.0)}, r"\['guidance'\] is '5.0' \(float\)"),
        ({"fingerprint": says(guidance={"scale": 5.0})}, r"\['guidance'\] has no tilted_prior, negative_prompt"),
        ({"fingerprint": says(guidance=GUIDANCE)}, "a `sampler` beside it"),
        ({"fingerprint": says(guidance=GUIDANCE, sampler={"steps": 5})}, r"\['sampler'\] has no scheduler, eta"),
        (
            {"fingerprint": says(guidance={**GUIDANCE, "scale": "5"}, sampler={"scheduler": "x", "steps": 5, "eta": 1})},
            "needs a number as scale",
        ),
        ({"fingerprint": says(adapter={"rank": 4})}, "a LoRA has a number"),
        ({"fingerprint": says(adapter={"target_modules": "all"})}, r"target_modules'\] is 'all'; it is a list of names"),
        ({"fingerprint": says(dtype=torch.float32)}, "plain JSON values"),
        ({"fingerprint": says(scale=float("nan"))}, "plain JSON values"),
        ({"fingerprint": lambda self: "walk"}, r"fingerprint\(\) is 'walk' \(str\)"),
        ({"fingerprint": lambda self: {"number": next(COUNT)}}, "something else at every call"),
        ({"fingerprint": {"family": "walk"}}, "fingerprint is .* it is a method"),
        ({"export": lambda self, folder: None}, r"export takes \(folder\) and is called as export\(folder, card\)"),
        ({"as_prior": lambda self: iter(())}, "decorate it with @contextmanager"),
        ({"entry": "middle"}, "entry is 'middle'; it is one of"),
        ({"base_model": property(lambda self: Path("here"))}, "base_model is .*; it is the text"),
        ({"snippet": "pipe = 1"}, "snippet is 'pipe = 1'"),
        ({"snippet": lambda self: ""}, r"snippet takes \(\) and is called as snippet\(prompt=\.\.\.\)"),
        ({"dims": property(lambda self: [2], lambda self, value: None)}, r"dims is \[2\]"),
        ({"device": property(lambda self: "cpu", lambda self, value: None)}, "device is 'cpu'; it must be a torch.device"),
    ],
)  # fmt: skip
def test_what_would_fail_after_training_is_refused_before(members: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prior_members(broken(**members))


@pytest.mark.parametrize(
    "members, message",
    [
        ({"parameters": lambda self: {}}, r"parameters\(\) is .* after attach; it is a mapping"),
        ({"parameters": lambda self: {"shifts": torch.zeros(2)}}, r"parameters\(\)\['shifts'\] is a Tensor"),
        ({"snippet": lambda self, prompt: None}, r"snippet\(\.\.\.\) returned 'None'"),
        ({"elsewhere": lambda self: 3}, r"elsewhere\(\.\.\.\) returned '3'"),
        ({"fingerprint": lambda self: {"adapter": "copy" if self.pipe.shifts is not None else None}}, r"\['adapter'\] is 'copy'"),
    ],
)  # fmt: skip
def test_what_comes_with_the_posterior_is_looked_at_too(members: dict[str, Any], message: str) -> None:
    prior = broken(**members)
    check_prior_members(prior)
    prior.attach(seed=0)
    with pytest.raises(ValueError, match=message):
        check_attached(prior, "a cat")


def test_a_run_with_such_a_prior_ends_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("walk.yaml").write_text(CONFIG)
    monkeypatch.setattr(WalkPrior, "fingerprint", says(adapter="copy"))
    assert leave("train", "walk.yaml") == 1
    assert "it is a mapping, None or absent" in capsys.readouterr().err
    assert not Path("runs/walk/metrics.jsonl").exists()


def test_the_priors_here_have_the_members() -> None:
    for prior in (WalkPrior(), GMM()):
        check_prior_members(prior)
        prior.attach(seed=0)
        check_attached(prior, "a cat")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("uses_kl", 1, "uses_kl is '1' \\(int\\); it is True, False or absent"),
        ("on_policy_only", lambda: True, "on_policy_only is"),
        ("importance_weighted", "no", "importance_weighted is 'no'"),
        ("warm_up", True, "warm_up is 'True' \\(bool\\); it is a method"),
        ("check_steps", lambda: None, r"check_steps takes \(\) and is called as check_steps\(steps\)"),
    ],
)
def test_an_objective_s_optional_members_are_looked_at(name: str, value: Any, message: str) -> None:
    objective = RTB()
    check_objective_members(objective)
    object.__setattr__(objective, name, value)
    with pytest.raises(ValueError, match=message):
        check_objective_members(objective)


@pytest.mark.parametrize("dims", [(2,), (4, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_each_generator_s_own(dims: tuple[int, ...], dtype: torch.dtype) -> None:
    """What one call of `torch.randn` per trajectory gives, whatever else is in the batch; later draws go on from there."""
    rows = generators([3, 5, 8])
    noise = trajectory_noise(rows, 6, dims, dtype=dtype)
    assert noise.shape == (7, 3, *dims)
    assert noise.dtype == dtype
    for k, seed in enumerate((3, 5, 8)):
        alone = torch.Generator().manual_seed(seed)
        assert torch.equal(noise[:, k], torch.randn((7, *dims), generator=alone, dtype=dtype))
        assert torch.equal(torch.randn(4, generator=rows[k]), torch.randn(4, generator=alone))
    assert torch.equal(trajectory_noise(generators([5]), 6, dims, dtype=dtype)[:, 0], noise[:, 1])
    assert trajectory_noise([], 6, dims).shape == (7, 0, *dims)


def test_noise_is_a_plain_member_of_the_protocol() -> None:
    prior = WalkPrior()
    both = prior.pipe(2, generator=generators([1, 2]))
    assert torch.equal(prior.pipe(1, generator=generators([2])), both[1:])
    assert isinstance(nn.Parameter(both), nn.Parameter)
