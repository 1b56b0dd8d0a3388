"""The bundled prior `emoji_flow`: a Stable Diffusion 3 folder without T5, consistent with the models it was made from."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.functional import pad
from transformers import CLIPTextModel

from diffusion_rtb.config.components import build
from diffusion_rtb.schedulers import FlowMatchSDEScheduler
from pipelines import emoji
from pipelines._models.folder import BUNDLED, left_out, local_folder
from pipelines.emoji.build.captions import Captions, tokenizer
from pipelines.emoji.build.weighed import Weighed
from pipelines.stable_diffusion_3 import StableDiffusion3
from rewards import emoji_clip

MINIMUM = (0.9, 0.8, 0.95)  # accuracy of name, style and background; chance is 0.007, 0.33 and 0.125
WORDS = [emoji.caption(name, "fluent", "purple") for name in emoji.ICONS]


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    """The prior, loaded with every warning an error; diffusers wants to be told that T5 is absent."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = StableDiffusion3Pipeline.from_pretrained(
            str(emoji.flow_path()), text_encoder_3=None, tokenizer_3=None, local_files_only=True
        )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_bundled_under_its_name() -> None:
    assert local_folder("emoji_flow", StableDiffusion3Pipeline) == emoji.flow_path()
    assert {"emoji", "emoji_flow"} <= set(BUNDLED)
    assert left_out(emoji.flow_path(), StableDiffusion3Pipeline) == ["text_encoder_3", "tokenizer_3"]
    with pytest.raises(ValueError, match=r"expected .* were passed"):  # why load and the model card name them
        StableDiffusion3Pipeline.from_pretrained(str(emoji.flow_path()))


def test_no_config_says_where_it_was_made() -> None:
    configs = list(emoji.flow_path().parent.rglob("config.json"))
    assert len(configs) > 5
    assert not [file for file in configs if "_name_or_path" in file.read_text()]


def test_its_family_takes_it_by_name_and_says_how_plain_diffusers_does() -> None:
    prior = build({"component": "stable_diffusion_3", "path": "emoji_flow", "steps": 4, "device": "cpu"}, "prior")
    assert isinstance(prior, StableDiffusion3)
    assert "('pipelines/emoji/flow', dtype=torch.float32, text_encoder_3=None, tokenizer_3=None)" in prior.snippet()
    assert prior.pipe.text_encoder_3 is None
    assert prior.dims == (4, 8, 8)


def test_tokenizers_cut_captions_as_clips_own(pipe: StableDiffusion3Pipeline) -> None:
    texts = [*Captions().texts, *WORDS]
    whole = tokenizer()
    expected = [whole.convert_ids_to_tokens(row) for row in whole(texts).input_ids]
    for short in (pipe.tokenizer, pipe.tokenizer_2):
        assert [short.convert_ids_to_tokens(row) for row in short(texts).input_ids] == expected
        assert max(len(row) for row in expected[: len(Captions().texts)]) == short.model_max_length


def test_text_encoders_compute_what_those_of_emoji_and_emoji_clip_do(pipe: StableDiffusion3Pipeline) -> None:
    encoder, (clip, read) = (
        CLIPTextModel.from_pretrained(emoji.path() / "text_encoder", dtype=torch.float32),
        emoji_clip.load(),
    )
    ids = tokenizer()(WORDS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        tokens, _, pooled, _ = _encode(pipe, WORDS)
        other = encoder(ids, output_hidden_states=True)
        expected = torch.cat([other.pooler_output, clip.encode_text(read(WORDS))], -1)
    length, width = pipe.tokenizer.model_max_length, encoder.config.hidden_size
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens[:, :length, :width], other.hidden_states[-2][:, :length], rtol=1e-4, atol=1e-4)
    assert not tokens[:, length:].any(), "zeros stand for T5"


def _encode(pipe: StableDiffusion3Pipeline, texts: list[str]) -> tuple[torch.Tensor, ...]:
    answer: tuple[torch.Tensor, ...] = pipe.encode_prompt(texts, None, None, "cpu", do_classifier_free_guidance=False)
    return answer


def test_autoencoder_is_that_of_emoji(pipe: StableDiffusion3Pipeline) -> None:
    other = AutoencoderKL.from_pretrained(emoji.path() / "vae")
    ours, theirs = pipe.vae.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert pipe.vae.config.shift_factor != 0


def test_many_zeros_weigh_like_one_with_a_higher_logit(pipe: StableDiffusion3Pipeline) -> None:
    """What the training relies on, and why the prior takes any `max_sequence_length` from 1 on."""
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, 300.0])
    tokens, pooled = torch.randn(2, 16, 104), torch.randn(2, 192)
    other = SD3Transformer2DModel.from_config(pipe.transformer.config)
    other.load_state_dict(pipe.transformer.state_dict())
    attention = Weighed()
    other.set_attn_processor(attention)
    attention.count = torch.tensor([256.0, 256.0])
    with torch.no_grad():
        stock = pipe.transformer(x, pad(tokens, (0, 0, 0, 256)), pooled, t).sample
        one = pipe.transformer(x, pad(tokens, (0, 0, 0, 1)), pooled, t).sample
        ours = other(x, pad(tokens, (0, 0, 0, 1)), pooled, t).sample
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one, stock, rtol=1e-4, atol=1e-4), "the count matters"


def test_emoji_clip_reads_what_the_prior_draws_with_noise(pipe: StableDiffusion3Pipeline) -> None:
    model, tokenize = emoji_clip.load()
    scheduler, colours = pipe.scheduler, list(emoji.COLOURS)
    pipe.scheduler = FlowMatchSDEScheduler.from_config(scheduler.config, shift=3.0)
    pick = torch.randint(len(emoji.NAMES), (48,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [(name, i % 3, i % 8) for i, name in enumerate(pick)]
    images = pipe(
        [emoji.caption(emoji.NAMES[n], emoji.STYLES[s], colours[c]) for n, s, c in rows],
        num_inference_steps=12,
        guidance_scale=2.0,
        max_sequence_length=1,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    pipe.scheduler = scheduler
    assert images.shape == (48, 3, 64, 64)
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
