"""Class-conditional transformers: guidance inside the network is the stock pipeline's, classes by number and by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiTPipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusion_rtb.chain.rollout import rollout, score
from diffusion_rtb.chain.seeds import generators
from pipelines.dit import DiT
from tests.oracles.families import dit

CLASSES = {"207": 207, "white shark": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "model"
    dit.build().save_pretrained(path)
    return path


def made(folder: Path, **settings: Any) -> DiT:
    return DiT(str(folder), steps=4, device="cpu", **settings)


class EachHalf(TorchFunctionMode):
    """Both halves of a doubled batch get the same noise, row by row from its generator."""

    def __init__(self, rows: list[torch.Generator]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is not torch.randn or given.get("generator") is not None:
            return func(*args, **given)
        size = (1, *args[0][1:])
        return torch.cat([torch.randn(size, generator=row) for row in self.rows] * 2)


def stock_images(folder: Path, guidance: float, seeds: list[int]) -> Tensor:
    """By the plain pipeline, which steps on the batch twice."""
    pipe = DiTPipeline.from_pretrained(folder)
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    rows = generators(seeds)
    with EachHalf(rows):
        found: Tensor = pipe(
            list(CLASSES.values()), guidance, rows, num_inference_steps=4, output_type="pt", return_dict=False
        )[0]
    return found


def test_guidance_inside_the_network_is_the_stock_pipelines(folder: Path) -> None:
    prior = made(folder, guidance=3.0)
    drawn = rollout(prior, list(CLASSES), [1, 2])
    assert drawn.dims == (4, 8, 8)
    # Weights that are loaded twice lie differently in memory, and kernels round accordingly.
    torch.testing.assert_close(prior.decode(drawn.x_0), stock_images(folder, 3.0, [1, 2]), rtol=0, atol=1e-5)
    assert torch.equal(score(prior, list(CLASSES), drawn), drawn.log_prob)
    unguided = rollout(made(folder), list(CLASSES), [1, 2])
    assert torch.equal(unguided.x[:, 0], drawn.x[:, 0])
    assert (unguided.x_0 - drawn.x_0).abs().amax() > 0.1, "guidance matters"


def test_guidance_has_gradients_through_both_branches(folder: Path) -> None:
    guided, plain = made(folder, guidance=3.0), made(folder)
    x, t = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([500])
    for prior in (guided, plain):
        prior.attach(rank=1)
        prior.network.double()
        with torch.no_grad():
            for value in prior.parameters().values():
                value.add_(0.3)

    def e(prior: DiT, label: int) -> Tensor:
        answer: Tensor = prior.network(x, timestep=t, class_labels=torch.tensor([label])).sample[:, :4]
        return answer

    found, wanted = e(guided, 2), e(plain, 1000) + 3.0 * (e(plain, 2) - e(plain, 1000))
    torch.testing.assert_close(found, wanted)
    gradients = (
        torch.autograd.grad(answer.sum(), list(prior.parameters().values()))
        for answer, prior in ((found, guided), (wanted, plain))
    )
    torch.testing.assert_close(*gradients)


def test_the_snippet_draws_what_it_says(folder: Path, tmp_path: Path) -> None:
    prior = made(folder, guidance=3.0)
    prior.attach(rank=1)
    prior.export(tmp_path, "card")
    code = prior.snippet(folder=str(tmp_path), prompt="white shark")
    first, second = {}, {}  # type: ignore[var-annotated]
    for found in (first, second):
        exec(code, found)
    assert first["image"].size == (64, 64)
    assert first["image"].tobytes() == second["image"].tobytes()


def test_a_prompt_is_a_class(folder: Path) -> None:
    prior = made(folder)
    prior.read_prompts(["0", "999", "golden retriever", "great white shark"], [{}] * 4, folder)
    for prompt, hint in (
        ("1000", "0 to 999"),
        ("-1", "0 to 999"),
        ("golden retreiver", "Did you mean 'golden retriever'"),
    ):
        with pytest.raises(ValueError, match=hint):
            prior.read_prompts([prompt], [{}], folder)
    assert prior._pipe is None, "nothing was loaded for that"
    assert prior.arguments(["207", " white shark"])["class_labels"] == [207, 2]
    assert "class_labels=[2]" in prior.snippet(prompt="white shark")
    assert torch.equal(prior.features(["2"]), prior.features(["white shark"]))
    assert not torch.equal(prior.features(["2"]), prior.features(["207"]))


def test_what_its_pipeline_cannot_do_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its steps take eta"):
        made(folder, scheduler="DDIMScheduler")
    with pytest.raises(ValueError, match="scales its states"):
        made(folder, scheduler="EulerAncestralDiscreteScheduler")
    with pytest.raises(ValueError, match="variance_type: fixed_small"):
        made(folder, scheduler_arguments={"variance_type": "learned_range"})
    few = tmp_path / "few"
    few.mkdir()
    for part in folder.iterdir():
        (few / part.name).symlink_to(part)
    (few / "transformer").unlink()
    (few / "transformer").mkdir()
    for file in (folder / "transformer").iterdir():
        (few / "transformer" / file.name).symlink_to(file)
    config = json.loads((folder / "transformer/config.json").read_text()) | {"num_embeds_ada_norm": 10}
    (few / "transformer/config.json").unlink()
    (few / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"10 classes.*Set guidance: 1\.0"):
        made(few, guidance=2.0)


def test_the_published_layout_names_an_older_class(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    for part in folder.rglob("*"):
        if part.is_file():
            copy = old / part.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(part.read_bytes().replace(b'"DiTTransformer2DModel"', b'"Transformer2DModel"'))
    drawn = (rollout(made(path), ["207"], [1]).x_0 for path in (folder, old))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-5)
