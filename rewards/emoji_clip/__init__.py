"""The bundled reward model `emoji-clip`: a small open_clip model that knows emoji names, styles and backgrounds.

It loads through open_clip's own API, from any program:

    model = open_clip.create_model("local-dir:rewards/emoji_clip")
    tokenizer = open_clip.get_tokenizer("local-dir:rewards/emoji_clip")

Pictures are 64x64 RGB. `encode` takes them in [0, 1], as a pipeline returns them with `output_type="pt"`.
`python -m pipelines.emoji.build` made the weights; its drawings are under Apache-2.0 (Noto) and MIT (Fluent).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import open_clip
    from torch import Tensor

Tokenize = Callable[[list[str]], "Tensor"]

PATH = Path(__file__).parent


def path() -> Path:
    """Folder with `open_clip_config.json` and `open_clip_model.safetensors`."""
    return PATH


def load() -> tuple[open_clip.CLIP, Tokenize]:
    """The model in single precision and evaluation mode, and its tokenizer: texts -> ids (batch, 24)."""
    import open_clip

    name = f"local-dir:{PATH}"
    return open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)


def encode(model: open_clip.CLIP, images: Tensor) -> Tensor:
    """Unit embeddings (batch, 128) of pictures (batch, 3, height, width) in [0, 1]; differentiable.

    Pictures that are not 64x64 are resized (area average down, bilinear up).
    """
    from torch.nn.functional import interpolate

    if images.shape[-2:] != (64, 64):
        small = images.shape[-2] < 64 or images.shape[-1] < 64
        images = interpolate(images, size=(64, 64), mode="bilinear" if small else "area")
    return model.encode_image(images * 2 - 1, normalize=True)


def probabilities(model: open_clip.CLIP, images: Tensor, ids: Tensor) -> Tensor:
    """p(text | picture) (batch, texts) among the texts with token ids (texts, 24), by the model's own temperature."""
    text = model.encode_text(ids, normalize=True)
    return (model.logit_scale.exp() * encode(model, images) @ text.T).softmax(dim=-1)
