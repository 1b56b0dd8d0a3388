"""The bundled priors `emoji` and `emoji_flow` and the reward model `emoji-clip`: small, consistent and able to draw."""

from __future__ import annotations

import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from pipelines import emoji
from rewards import emoji_clip

ROOT = Path(__file__).parents[2]
MINIMUM = (0.9, 0.8, 0.95)  # accuracy of name, style and background; chance is 0.007, 0.33 and 0.125
FOLDERS = {"prior": (emoji.path(), 25), "flow": (emoji.flow_path(), 20), "emoji-clip": (emoji_clip.path(), 8.5)}


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    """The prior, loaded with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = StableDiffusionPipeline.from_pretrained(str(emoji.path()), local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def clip() -> tuple[open_clip.CLIP, emoji_clip.Tokenize]:
    return emoji_clip.load()


def draw(
    pipe: StableDiffusionPipeline, prompts: list[str], *, steps: int, guidance: float, seed: int = 0
) -> torch.Tensor:
    """Pictures (prompts, 3, 64, 64) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return pipe(
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=1.0,
            generator=generator,
            output_type="pt",
        ).images


@pytest.mark.parametrize("part", FOLDERS)
def test_folder_is_small_licensed_and_holds_no_pickle(part: str) -> None:
    folder, limit = FOLDERS[part]
    files = [f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc"]
    assert sum(f.stat().st_size for f in files) < limit * 1e6
    assert {"LICENSE-noto.txt", "LICENSE-fluent.txt"} <= {f.name for f in files}
    assert not [f.name for f in files if f.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]


@pytest.mark.parametrize("part", FOLDERS)
def test_weights_are_finite_and_half_precision(part: str) -> None:
    weights = list(FOLDERS[part][0].rglob("*.safetensors"))
    assert len(weights) == {"prior": 3, "flow": 4, "emoji-clip": 1}[part]
    for file in weights:
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not name.endswith("attn_mask"):
                assert tensor.dtype == torch.float16, name
                assert tensor.isfinite().all(), name


@pytest.mark.parametrize(
    "parts, text",
    [
        (("cat",), "a cat emoji"),
        (("umbrella", "flat"), "an umbrella emoji, flat style"),
        (("unicorn", None, "red"), "a unicorn emoji, on a red background"),
        (("owl", "noto", "orange"), "an owl emoji, noto style, on an orange background"),
        ((None, "fluent", None), "an emoji, fluent style"),
    ],
)
def test_caption_grammar(parts: tuple[str | None, ...], text: str) -> None:
    assert emoji.caption(*parts) == text


def test_words_are_unambiguous() -> None:
    assert len(emoji.NAMES) == len(set(emoji.NAMES)) == 152
    assert len(emoji.ICONS) == len(set(emoji.ICONS.values()))
    assert len(emoji.STYLES) == 3
    assert len(emoji.COLOURS) == 8


def test_token_ids_equal_open_clip(pipe: StableDiffusionPipeline) -> None:
    captions = [emoji.caption(n, s, c) for n in emoji.NAMES for s, c in ((None, None), ("fluent", "purple"))]
    reference = open_clip.SimpleTokenizer(context_length=pipe.tokenizer.model_max_length)(captions)
    ours = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    assert ours.shape == reference.shape, "a caption is longer than the text encoder's context"
    assert torch.equal(torch.where(reference == 0, pipe.tokenizer.pad_token_id, reference), ours)


def test_noise_schedule_is_memoryless_and_ends_with_a_floor(pipe: StableDiffusionPipeline) -> None:
    alpha_bar = pipe.scheduler.alphas_cumprod
    assert alpha_bar[0] == pytest.approx(0.99, abs=1e-4)
    assert alpha_bar[-1] == pytest.approx(1e-4, rel=0.02)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.final_alpha_cumprod == alpha_bar[0]
    angle = alpha_bar.double().sqrt().acos()
    assert torch.allclose(angle.diff(), angle.diff().mean().expand(len(angle) - 1), rtol=0.05), (
        "equal steps of the angle"
    )


def test_sampling_is_deterministic_finite_and_64_pixels(pipe: StableDiffusionPipeline) -> None:
    first = draw(pipe, ["a cat emoji"] * 2, steps=4, guidance=1.0)
    assert first.shape == (2, 3, 64, 64)
    assert first.isfinite().all()
    assert torch.equal(first, draw(pipe, ["a cat emoji"] * 2, steps=4, guidance=1.0))
    assert not torch.equal(first, draw(pipe, ["a cat emoji"] * 2, steps=4, guidance=1.0, seed=1))


def test_clip_loads_through_open_clip_and_matches_its_preprocessing(
    clip: tuple[open_clip.CLIP, emoji_clip.Tokenize],
) -> None:
    model, tokenize = clip
    assert tokenize(["a cat emoji"]).shape == (1, 24)
    images = torch.rand(3, 3, 64, 64)
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{emoji_clip.path()}")
    normalise = preprocess.transforms[-1]
    with torch.no_grad():
        reference = stock.eval().encode_image(normalise(images), normalize=True)
        ours = emoji_clip.encode(model, images)
    torch.testing.assert_close(ours, reference)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(3))


def test_clip_reads_what_the_prior_draws(
    pipe: StableDiffusionPipeline, clip: tuple[open_clip.CLIP, emoji_clip.Tokenize]
) -> None:
    model, tokenize = clip
    count, colours = 48, list(emoji.COLOURS)
    pick = torch.randint(len(emoji.NAMES), (count,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(name, i % 3, i % 8) for i, name in enumerate(pick)]
    images = draw(
        pipe, [emoji.caption(emoji.NAMES[n], emoji.STYLES[s], colours[c]) for n, s, c in rows], steps=12, guidance=2.0
    )
    texts = (
        [emoji.caption(n) for n in emoji.NAMES],
        [emoji.caption(None, s) for s in emoji.STYLES],
        [emoji.caption(None, None, c) for c in colours],
    )
    for column, (choices, least) in enumerate(zip(texts, MINIMUM, strict=True)):
        with torch.no_grad():
            read = emoji_clip.probabilities(model, images, tokenize(choices)).argmax(dim=-1)
        accuracy = float((read == torch.tensor([row[column] for row in rows])).float().mean())
        assert accuracy >= least, (choices[0], accuracy)
