"""What other tools have made, evaluated: folders of pictures, LoRAs; several at once; what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffusion_rtb.evaluation as evaluation
from diffusion_rtb.cli.main import eval_main
from diffusion_rtb.config.load import RunConfig, load_config
from diffusion_rtb.evaluation.evaluate import evaluate_run, evaluate_subject
from diffusion_rtb.evaluation.subject import Options
from diffusion_rtb.evaluation.subjects._opening import kinds, open_subjects
from diffusion_rtb.files.image_folder import ImageFolderError
from diffusion_rtb.files.whole import write_text
from diffusion_rtb.training.assemble import assemble
from tests.oracles.tiny import save_tiny

SCHEMA = json.loads((Path(evaluation.__file__).parent / "metrics.schema.json").read_text())
BRIGHT = "tests.evaluation.test_subjects:bright"


def bright(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.flatten(1).mean(1)


def lifted(images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
    """Brightness, and what the line of each picture says."""
    return images.flatten(1).mean(1) + torch.tensor([float(row["lift"]) for row in metadata])


def pictures(folder: Path, rows: Sequence[tuple[str, str, int | None, int]], **more: Any) -> Path:
    """A picture of one level each: (file, prompt, seed, level)."""
    folder.mkdir(parents=True)
    lines = []
    for file, prompt, seed, level in rows:
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / file)
        lines.append(
            json.dumps({"file_name": file, "prompt": prompt, **({} if seed is None else {"seed": seed}), **more})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


HOSTILE = "[red]a cat[/red] <img src=x onerror=alert(1)> \x1b]0;title\x07 | `x`"


def numbers_of(path: Path, **options: Any) -> dict[str, Any]:
    (subject,) = open_subjects([path], Options(overrides=["eval.bootstrap=20"], **options))
    return evaluate_subject(subject)


def test_pictures_alone_have_their_reward_and_the_rest_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a.png", HOSTILE, None, 51), ("b.png", HOSTILE, None, 102), ("c.png", "dog", None, 204)]
    folder = pictures(tmp_path / "theirs", rows)
    found = numbers_of(folder, reward=BRIGHT, judges=[BRIGHT], out=tmp_path / "out")
    assert list(Draft202012Validator(SCHEMA).iter_errors(found)) == []
    assert found["subject"]["kind"] == "images"
    assert found["beta"] is None
    assert found["overall"]["reward"]["posterior"]["mean"] == pytest.approx(((0.2 + 0.4) / 2 + 0.8) / 2, abs=1e-6)
    assert found["overall"]["reward"]["prior"] is None
    assert [row["samples"]["posterior"] for row in found["per_prompt"]] == [2, 1]
    assert [row["prompt"] for row in found["per_prompt"]] == [HOSTILE, "dog"]
    why = {row["metric"]: row["why"] for row in found["left_out"]}
    assert {"kl", "elbo", "ess", "log_z", "norm_ratio", "posterior_check"} <= why.keys()
    assert "no log-densities" in why["elbo"]
    assert "--against" in why["log_z"]
    said = capsys.readouterr()
    assert "Left out: kl" in said.out
    assert "\x1b" not in said.out + said.err
    samples = load_file(tmp_path / "out" / "samples.safetensors")
    assert not any(name.startswith("prior") for name in samples)
    assert (tmp_path / "out" / "side_by_side.png").is_file()


def test_seeds_pair_two_folders(tmp_path: Path) -> None:
    before = pictures(tmp_path / "before", [(f"{s}.png", "cat", s, 10 * s) for s in (7, 3, 9, 1)])
    after = pictures(tmp_path / "after", [(f"x{s}.png", "cat", s, 10 * s + 5) for s in (5, 9, 7, 1, 3)])
    found = numbers_of(after, reward=BRIGHT, against=before, out=tmp_path / "out")
    samples = load_file(tmp_path / "out" / "samples.safetensors")
    change = samples["posterior.reward"][:4] - samples["prior.reward"]
    assert change.tolist() == pytest.approx([5 / 255] * 4, abs=1e-6)
    assert samples["posterior.reward"][4] == pytest.approx(55 / 255, abs=1e-6)
    assert samples["prior.index"].tolist() == [0, 1, 2, 3]
    assert samples["posterior.index"].tolist() == [0, 1, 2, 3, 4]
    assert found["subject"]["seeds"] == {"pairs": "equal seeds"}
    assert found["samples"] == {"prior": 4, "posterior": 5}


def test_what_has_no_partner_is_no_pair(tmp_path: Path) -> None:
    before = pictures(tmp_path / "before", [(f"{s}.png", "cat", s, s) for s in (1, 2, 8)])
    after = pictures(tmp_path / "after", [(f"{s}.png", "cat", s, s) for s in (9, 2, 7, 1)])
    numbers_of(after, reward=BRIGHT, against=before, out=tmp_path / "out")
    samples = load_file(tmp_path / "out" / "samples.safetensors")
    assert sorted([*samples["posterior.index"].tolist(), *samples["prior.index"].tolist()]) == [0, 0, 1, 1, 2, 3, 4]
    other = pictures(tmp_path / "other", [("a.png", "cat", 5, 5)])
    with pytest.raises(ImageFolderError, match="no seed in common"):
        numbers_of(after, reward=BRIGHT, against=other)


def test_other_columns_are_metadata_of_each_picture(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "theirs", [("a.png", "cat", None, 51), ("b.png", "cat", None, 51)])
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"lift": k} for k, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = numbers_of(folder, reward="tests.evaluation.test_subjects:lifted", out=tmp_path / "out")
    assert found["overall"]["reward"]["posterior"]["mean"] == pytest.approx(0.2 + 0.5, abs=1e-6)


def line(**row: Any) -> Callable[[Path], object]:
    def add(folder: Path) -> None:
        with (folder / "metadata.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    return add


def larger(folder: Path) -> None:
    Image.new("RGB", (9, 8)).save(folder / "b.png")


def damaged(folder: Path) -> None:
    (folder / "b.png").write_bytes(b"\x89PNG nothing")


def cut(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:120])


def see_through(folder: Path) -> None:
    Image.new("RGBA", (8, 8), (9, 9, 9, 128)).save(folder / "b.png")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "mixed sizes": (larger, r"a.png is 8 x 8 pixels and b.png 9 x 8"),
    "no picture": (damaged, r"line 2: .*b.png is no picture"),
    "cut off": (cut, r"b.png cannot be read as a picture"),
    "transparent": (see_through, r"b.png has transparent parts"),
    "missing": (lambda folder: (folder / "b.png").unlink(), r"line 2: there is no .*b.png"),
    "no lines": (lambda folder: (folder / "metadata.jsonl").write_text(""), r"metadata.jsonl is empty"),
    "no JSON": (lambda folder: (folder / "metadata.jsonl").write_text("{"), r"line 1 is no JSON"),
    "no prompt": (line(file_name="c.png", text="x"), r"line 3 has no text 'prompt', it has 'file_name', 'text'"),
    "twice": (line(file_name="a.png", prompt="x"), r"lines 1 and 3 both name 'a.png'"),
    "seed twice": (line(file_name="c.png", prompt="cat", seed=1), r"lines 1 and 3 both have seed 1 and prompt 'cat'"),
    "seed": (line(file_name="c.png", prompt="x", seed="1"), r"seed is '1'; it is a whole number"),
    "elsewhere": (line(file_name="../c.png", prompt="x"), r"it lies in the folder itself"),
    "no text": (line(file_name="a.png", prompt="\0"), r"NUL"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_by_file_and_line(tmp_path: Path, name: str) -> None:
    folder = pictures(tmp_path / "theirs", [("a.png", "cat", 1, 5), ("b.png", "cat", 2, 6)])
    spoil, message = BAD[name]
    spoil(folder)
    if name == "no text":
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "prompt": "\0"}))
    with pytest.raises(ValueError, match=message):
        numbers_of(folder, reward=BRIGHT, out=tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_both_sides_need_the_same_prompts_and_size(tmp_path: Path) -> None:
    one = pictures(tmp_path / "one", [("a.png", "cat", 1, 5)])
    other = pictures(tmp_path / "other", [("a.png", "dog", 1, 5)])
    with pytest.raises(ImageFolderError, match=r"one has pictures for the prompt 'cat', and .*other has none"):
        numbers_of(one, reward=BRIGHT, against=other)
    Image.new("RGB", (4, 4)).save(other / "a.png")
    with pytest.raises(ImageFolderError, match="different sizes"):
        numbers_of(one, reward=BRIGHT, against=other)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["theirs"], "say their reward by --reward NAME"),
        (["theirs", "theirs"], "is named twice"),
        (["theirs", "train.lr=1", "--reward", BRIGHT], "only eval.* keys can be changed"),
        (["theirs", "eval.sampels=1", "--reward", BRIGHT], "Did you mean 'eval.samples'?"),
        (["eval.samples=1"], "What is to be evaluated?"),
        (["lora.safetensors"], "is a LoRA: say by --config CONFIG which prior"),
        (["plain"], "is no run's folder"),
    ],
)
def test_what_the_command_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "theirs", [("a.png", "cat", 1, 5)])
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "plain").mkdir()
    with pytest.raises(SystemExit) as left:
        eval_main(argv)
    assert left.value.code in (1, 2)
    assert message in " ".join(capsys.readouterr().err.split())


def test_kinds_are_found_by_their_files() -> None:
    assert {kind.kind for kind in kinds()} == {"run", "lora", "images"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, its config, and a finished run with its exported LoRA."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny(folder / "tiny")
    config = {
        "name": "small", "out": str(folder / "runs"), "beta": 2.0, "posterior": {"rank": 2, "alpha": 2.0},
        "prior": {"component": "stable_diffusion", "path": str(folder / "tiny"), "steps": 3, "device": "cpu"},
        "reward": {"component": BRIGHT}, "prompts": {"list": ["a cat", "a dog"]},
        "train": {"iterations": 2, "prompts_per_iteration": 2, "group": 2, "micro_batch": 4, "grid_every": 0, "lr": 0.02},
        "eval": {"samples": 2, "prior_samples": 3, "bootstrap": 10},
    }  # fmt: skip
    write_text(folder / "small.yaml", json.dumps(config))
    assemble(RunConfig.model_validate(config)).fit()
    evaluate_run(folder / "runs/small")
    return folder


def test_an_exported_lora_has_the_numbers_of_its_run(project: Path, tmp_path: Path) -> None:
    run = json.loads((project / "runs/small/eval/metrics.json").read_text())
    (subject,) = open_subjects([project / "runs/small/lora"], Options(config=project / "small.yaml", out=tmp_path))
    found = evaluate_subject(subject)
    assert list(Draft202012Validator(SCHEMA).iter_errors(found)) == []
    assert found["subject"]["kind"] == "lora"
    assert abs(found["overall"]["kl"]["mean"]) > 1e-3
    assert found["overall"]["kl"]["mean"] == pytest.approx(run["overall"]["kl"]["mean"], rel=1e-3)
    for side in ("prior", "posterior"):
        assert found["overall"]["reward"][side]["mean"] == pytest.approx(
            run["overall"]["reward"][side]["mean"], rel=1e-5
        )


LAYER = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{LAYER}.lora_A.weight": (2, 40), f"{LAYER}.lora_B.weight": (16, 2)}, "is of another base model"),
        ({"bias": (3,)}, "holds no LoRA"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_by_name(
    project: Path, tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str
) -> None:
    file = tmp_path / "theirs.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, file)
    (subject,) = open_subjects([file], Options(config=project / "small.yaml", out=tmp_path / "out"))
    with pytest.raises(ValueError, match=rf"theirs.safetensors.* {message}"):
        evaluate_subject(subject)


def test_a_lora_of_the_text_encoder_is_no_posterior(project: Path, tmp_path: Path) -> None:
    layers = {f"{LAYER}.lora_A.weight": (2, 16), f"{LAYER}.lora_B.weight": (16, 2)}
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    layers |= {f"{encoder}.lora_A.weight": (2, 16), f"{encoder}.lora_B.weight": (16, 2)}
    file = tmp_path / "theirs.safetensors"
    save_file({name: torch.ones(shape) for name, shape in layers.items()}, file)
    (subject,) = open_subjects([file], Options(config=project / "small.yaml", out=tmp_path / "out"))
    with pytest.raises(ValueError, match="is a LoRA of text_encoder, too"):
        evaluate_subject(subject)


def test_priors_without_a_place_for_a_lora_say_so(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "gaussian.yaml"
    assert load_config(config).prior.component == "gaussian"
    save_file({"x": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"prior 'gaussian' of .* takes no LoRA"):
        open_subjects([tmp_path / "lora.safetensors"], Options(config=config))


def test_several_subjects_go_into_their_folders_and_one_table(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = pictures(tmp_path / "theirs", [("a.png", "cat", 1, 51), ("b.png", "cat", 2, 102)])
    with pytest.raises(SystemExit) as left:
        eval_main([str(project / "runs/small"), str(theirs), "--config", str(project / "small.yaml"), "--judges", BRIGHT,
                   "--out", "both", "eval.bootstrap=10"])  # fmt: skip
    assert not left.value.code
    shown = capsys.readouterr().out
    table = shown[shown.index("All subjects") :]
    assert "judge bright" in table
    row = next(text for text in table.splitlines() if "theirs" in text)
    assert "0.3" in row
    for name in ("small", "theirs"):
        assert json.loads((tmp_path / "both" / name / "metrics.json").read_text())["judges"] == [BRIGHT]
