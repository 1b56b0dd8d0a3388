"""What a prompt file says besides the prompt reaches every reward that asks for it, with the right image, wherever it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from diffusion_rtb.cli.main import app
from diffusion_rtb.config.components import build, describe
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.evaluation.evaluate import evaluate_run
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from diffusion_rtb.scoring.metadata import call_reward, takes_metadata
from diffusion_rtb.scoring.prompts import check_component_prompts, check_reward_prompts
from diffusion_rtb.training.assemble import assemble
from tests.oracles.tiny import save_tiny

Rows = Sequence[Mapping[str, Any]]
IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
PROMPTS = list("abcde")
ROWS: list[dict[str, Any]] = [{"value": float(i), "tag": f"tag {i}"} for i in (3, 1, 4, 1, 5)]
VALUES = torch.tensor([3.0, 1.0, 4.0, 1.0, 5.0])


def by_row(images: Tensor, prompts: Sequence[str], metadata: Rows, scale: float = 1.0) -> Tensor:
    return torch.tensor([scale * row["value"] for row in metadata], device=images.device)


def by_keyword(images: Tensor, prompts: Sequence[str], *, metadata: Rows = ()) -> Tensor:
    return by_row(images, prompts, metadata)


def by_position(images: Tensor, prompts: Sequence[str], metadata: Rows, /) -> Tensor:
    return by_row(images, prompts, metadata)


def without(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean((1, 2, 3))


def counted(images: Tensor, prompts: Sequence[str], metadata: Rows) -> Tensor:
    return torch.tensor([float(len(row)) for row in metadata])


def changes(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
    values = by_row(images, prompts, metadata)
    for row in metadata:
        row["value"] = row.pop("tag")
    return values


class Called:
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Rows) -> Tensor:
        return by_row(images, prompts, metadata)


class Network(torch.nn.Module):
    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Rows) -> Tensor:
        return by_row(images, prompts, metadata)


def named(function: Any, **arguments: Any) -> dict[str, Any]:
    return {"component": f"{__name__}:{function.__name__}", **arguments}


@pytest.mark.parametrize("reward", [by_row, by_keyword, by_position, Called(), Network()])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_each_image_gets_its_prompts_row(reward: Any, chunk: int | None) -> None:
    assert takes_metadata(reward)
    assert torch.equal(evaluate_reward(reward, IMAGES, PROMPTS, "mine", chunk, metadata=ROWS), VALUES)


def test_rewards_without_the_parameter_are_called_as_before() -> None:
    assert not takes_metadata(without)
    torch.testing.assert_close(evaluate_reward(without, IMAGES, PROMPTS, "mine", metadata=ROWS), IMAGES.mean((1, 2, 3)))


def test_no_metadata_are_empty_rows() -> None:
    assert torch.equal(evaluate_reward(counted, IMAGES, PROMPTS, "mine"), torch.zeros(5))  # type: ignore[arg-type]


def test_a_function_of_a_config_takes_metadata_besides_its_arguments() -> None:
    reward = build(named(by_row, scale=2.0), "reward")
    assert torch.equal(call_reward(reward, IMAGES, PROMPTS, ROWS), 2 * VALUES)
    with pytest.raises(ValueError, match=r"has no argument 'metadata'.* It has: scale"):
        describe(named(by_row, metadata=[]), "reward")


def test_a_reward_cannot_change_what_the_next_call_is_told() -> None:
    for _ in range(2):
        assert torch.equal(evaluate_reward(changes, IMAGES, PROMPTS, "mine", metadata=ROWS), VALUES)  # type: ignore[arg-type]


def test_what_was_missing_is_said() -> None:
    with pytest.raises(RewardError, match=r"metadata \{\}, \{\}, \{\} and 2 more, raised KeyError: 'value'"):
        evaluate_reward(Called(), IMAGES, PROMPTS, "mine")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="5 images and 2 rows of metadata"):
        evaluate_reward(without, IMAGES, PROMPTS, "mine", metadata=ROWS[:2])


COMBINED = [
    ({"component": "clamp", "reward": named(by_row), "low": 2.0}, VALUES.clamp(2.0)),
    ({"component": "weighted_sum", "rewards": [named(by_row, weight=3.0), named(without, weight=0.0)]}, 3 * VALUES),
    ({"component": "ensemble", "rewards": [named(by_row), named(by_keyword)]}, VALUES),
    ({"component": "standardise", "reward": named(by_row), "mean": 1.0, "std": 2.0}, (VALUES - 1) / 2),
    ({"component": "constraint", "classifier": named(by_row, scale=-0.5)},
     -10.0 * (torch.exp(-0.5 * VALUES) > 0.5).float()),
    ({"component": "cached", "reward": named(by_row)}, VALUES),
    ({"component": "cached", "reward": {"component": "clamp", "reward": named(by_row), "high": 4.0}}, VALUES.clamp(max=4)),
]  # fmt: skip


@pytest.mark.parametrize("component, expected", COMBINED, ids=lambda v: v["component"] if isinstance(v, dict) else "")
def test_rewards_made_of_others_pass_it_on(component: dict[str, Any], expected: Tensor) -> None:
    reward = build(component, "reward")
    assert takes_metadata(reward)
    torch.testing.assert_close(evaluate_reward(reward, IMAGES, PROMPTS, "outer", 2, metadata=ROWS), expected)
    pixels = IMAGES.clone().requires_grad_()
    if component["component"] != "cached":
        torch.testing.assert_close(call_reward(reward, pixels, PROMPTS, ROWS), expected)


def test_the_cache_knows_metadata_where_they_matter(tmp_path: Path) -> None:
    file = str(tmp_path / "cache.sqlite")
    reward = build({"component": "cached", "reward": named(by_row), "file": file}, "reward")
    for _ in range(2):
        assert torch.equal(call_reward(reward, IMAGES[:1].expand(5, -1, -1, -1), ["a"] * 5, ROWS), VALUES)
    assert len(reward._memory) == 4  # the second and the fourth row are the same
    other = build({"component": "cached", "reward": named(without)}, "reward")
    call_reward(other, IMAGES[:1].expand(5, -1, -1, -1), ["a"] * 5, ROWS)
    assert len(other._memory) == 1
    assert not takes_metadata(other)


@pytest.fixture(scope="module")
def prior_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "prior")


def run_config(prior: Path, folder: Path, **more: Any) -> RunConfig:
    rows = [{"prompt": f"a {i}", "value": float(i)} for i in range(3)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "out": str(folder / "runs"),
        "prior": {"component": "stable_diffusion", "path": str(prior), "steps": 4, "device": "cpu"},
        "reward": named(by_row),
        "beta": 0.1,
        "objective": {"component": "rtb", "log_z": "vargrad"},
        "prompts": {"file": "p.jsonl"},
        "train": {"iterations": 2, "prompts_per_iteration": 3, "group": 4, "micro_batch": 6, "grid_every": 0},
        "eval": {"samples": 2, "prior_samples": 2},
    } | more
    (folder / "run.yaml").write_text(json.dumps(data))
    return load_config(folder / "run.yaml")


def test_every_behaviour_scores_each_trajectory_with_its_prompts_row(prior_folder: Path, tmp_path: Path) -> None:
    behaviour = [
        {"component": "prior_buffer", "share": 0.25, "capacity": 3},
        {"component": "replay", "share": 0.25, "capacity": 4},
        {"component": "back_and_forth", "share": 0.25},
    ]
    trainer = assemble(run_config(prior_folder, tmp_path, behaviours=behaviour))
    trainer.fit()
    for name in ("prior", "replay", "back_and_forth"):
        source: Any = trainer.sources[name][0]
        assert sorted(source.memory) == [0, 1, 2]
        for row, held in source.memory.items():
            rewards = held[1] if name == "back_and_forth" else held.reward
            assert (rewards == float(row)).all(), name
    numbers = evaluate_run(tmp_path / "runs/run")
    assert [row["reward"]["posterior"]["mean"] for row in numbers["per_prompt"]] == [0.0, 1.0, 2.0]


def test_a_warm_up_is_scored_with_metadata(prior_folder: Path, tmp_path: Path) -> None:
    objective = {"component": "trust_pcl", "length": 2}
    behaviour = [{"component": "prior_buffer", "share": 0.5, "capacity": 2}]
    trainer = assemble(run_config(prior_folder, tmp_path, behaviours=behaviour, objective=objective))
    held = trainer.sources["prior"][0].everything(trainer.sampler)  # type: ignore[attr-defined]
    assert sum(len(part) for part in held) == 2 * len(trainer.sampler.prompts)
    for part in held:
        assert torch.equal(part.reward, part.prompt.float())


def checked(folder: Path, *more: str) -> Any:
    words = ["check-reward", f"{__name__}:by_row", "--prompt-file", str(folder / "p.jsonl"), "-n", "4", "--size", "16"]
    return CliRunner().invoke(app, [*words, *more])


def test_check_reward_takes_a_prompt_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"a {i}", "value": float(i)} for i in range(6)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-16")
    found = checked(tmp_path, "--json", str(tmp_path / "report.json"))
    (report,) = json.loads((tmp_path / "report.json").read_text())["rewards"]
    assert report["values"] == [0.0, 1.0, 2.0, 3.0], found.output
    assert "give one of them" in checked(tmp_path, "--prompt", "a").stderr
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "says \\"open\\""}\n')
    words = ["check-reward", "ocr", "--prompt-file", str(tmp_path / "p.jsonl")]
    assert "1 quote no text, the first is 'a cat'" in CliRunner().invoke(app, words).stderr.replace("\n", " ")


class Picky:
    """Wants a tag in every row."""

    built = 0

    def __init__(self, wanted: str = "tag") -> None:
        Picky.built += 1
        self.wanted = wanted

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Rows) -> Tensor:
        return counted(images, prompts, metadata)

    @staticmethod
    def check_prompts(prompts: Sequence[str], metadata: Rows, wanted: str = "tag") -> None:
        missing = [prompt for prompt, row in zip(prompts, metadata, strict=True) if wanted not in row]
        if missing:
            raise ValueError(f"{len(missing)} have no {wanted!r}, the first is {missing[0]!r}")


class Built:
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return without(images, prompts)

    def check_prompts(self, prompts: Sequence[str], metadata: Rows) -> None:
        raise KeyError("a lookup of mine")


OCR = {"component": "ocr"}
UNFIT = [
    (OCR, r"'ocr' does not take the 3 prompts: 3 quote no text, the first is 'a 0'"),
    ({"component": "weighted_sum", "rewards": [{"component": "jpeg"}, OCR]}, "'ocr' does not take"),
    ({"component": "cached", "reward": {"component": "clamp", "low": 0.0, "reward": OCR}}, "'ocr' does not take"),
    (named(Picky), "3 have no 'tag', the first is 'a 0'"),
    (named(Picky, wanted="other"), "no 'other'"),
    ({"component": "clamp", "low": 0.0, "reward": named(Picky, name="mine")}, "'mine' does not take the 3 prompts"),
]


@pytest.mark.parametrize("reward, expected", UNFIT)
def test_unfit_prompts_are_refused_before_anything_loads(tmp_path: Path, reward: dict[str, Any], expected: str) -> None:
    config = run_config(tmp_path / "nowhere", tmp_path, reward=reward)
    built = Picky.built
    with pytest.raises(ValueError, match=expected):
        check_component_prompts(config.reward, config.prompts.texts(), config.prompts.table().metadata)
    assert Picky.built == built


def test_a_command_refuses_them_too(prior_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quote no text"):
        describe_components(run_config(prior_folder, tmp_path, reward=OCR))
    describe_components(run_config(prior_folder, tmp_path, reward={**OCR, "text": "open"}))
    describe_components(run_config(prior_folder, tmp_path, reward=named(Picky, wanted="value")))


@pytest.mark.parametrize("reward", [named(Built), {"component": "clamp", "low": 0.0, "reward": named(Built)}])
def test_a_built_reward_is_asked_before_the_prior_loads(tmp_path: Path, reward: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"does not take the 2 prompts: KeyError: 'a lookup of mine'"):
        check_reward_prompts(build(reward, "reward"), ["a", "b"], [{}, {}])


def test_a_run_with_unfit_prompts_leaves_no_folder(prior_folder: Path, tmp_path: Path) -> None:
    from diffusion_rtb.run.folder import name_free_again

    config = run_config(prior_folder, tmp_path, reward=named(Built))
    with pytest.raises(ValueError, match="a lookup of mine"), name_free_again(config):
        assemble(config)
    assert not (tmp_path / "runs/run").exists()
