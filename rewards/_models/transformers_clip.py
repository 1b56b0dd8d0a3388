"""An image-text model in the layout of the transformers library, CLIP, SigLIP or SigLIP 2, local or from the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.files.completeness import check_transformers, read_json, weight_files
from diffusion_rtb.files.vocabulary import check_rows, load_tokenizer
from rewards._models.naflex import Naflex
from rewards._models.network import Dtype
from rewards._models.preprocess import Preprocess
from rewards._models.two_towers import TwoTowers
from rewards._models.weights import check_weights

__all__ = ["TransformersClip"]

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class TransformersClip(TwoTowers):
    """A `CLIPModel`, `SiglipModel` or `Siglip2Model`.

    Args:
        model: A hub id, OWNER/NAME, or a folder written by `save_pretrained`.
        processor: The same for tokenizer and image processor; default: those of `model`.
        batch: Images per network call.
        dtype: Of the network.
    """

    def __init__(self, model: str, processor: str | None = None, *, batch: int = 64, dtype: Dtype = "float32") -> None:
        processor = processor or model
        from transformers import AutoImageProcessor, AutoModel

        proved, variant = _proved(model)
        config = proved.config
        self.kind: str = config.model_type
        settings = _loaded(AutoImageProcessor, processor, "image processor").to_dict()
        self.preprocess = (
            Naflex.of_transformers(settings) if self.kind == "siglip2" else Preprocess.of_transformers(settings)
        )
        self.tokenizer = _tokenizer(processor)
        self.context: int = config.text_config.max_position_embeddings
        self._check_fit(config, model, processor)
        network = _loaded(AutoModel, model, "weights", variant=variant)
        super().__init__(network, model, batch=batch, dtype=dtype)

    def embed_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """See `TwoTowers`."""
        pixels = self.preprocess(images).to(self.dtype)
        inputs = self.preprocess.patches(pixels) if isinstance(self.preprocess, Naflex) else {"pixel_values": pixels}
        return _pooled(self.model.get_image_features(**inputs))

    def embed_text(self, text: str) -> Float[Tensor, "1 dim"]:
        """See `TwoTowers`."""
        # CLIP reads a text up to its end token. SigLIP was trained on lower-case texts, padded to the full length without a
        # mask; not all of its published tokenizers write them in lower case.
        settings: dict[str, Any] = {"truncation": True, "max_length": self.context, "return_tensors": "pt"}
        if self.kind == "clip":
            tokens = self.tokenizer([text], **settings)
        else:
            tokens = self.tokenizer([text.lower()], padding="max_length", **settings)
        return _pooled(self.model.get_text_features(input_ids=tokens["input_ids"].to(self._device)))

    def _check_fit(self, config: Any, model: str, processor: str) -> None:
        check_rows(self.tokenizer, processor, config.text_config.vocab_size, None, repr(model))
        if isinstance(self.preprocess, Naflex):
            return
        side = config.vision_config.image_size
        if self.preprocess.crop != (side, side):
            raise ValueError(
                f"The image processor of {processor!r} makes images of {self.preprocess.crop} pixels, {model!r} takes "
                f"{(side, side)}: they are not of one model."
            )


def check_transformers_clip(model: str, processor: str | None, kinds: tuple[str, ...]) -> None:
    """Refuse what `TransformersClip` cannot load, before anything is.

    Args:
        model: As in the constructor.
        processor: As in the constructor.
        kinds: The `model_type`s that are right for the caller.

    Raises:
        FileNotFoundError: a folder or a file in it is missing.
        ValueError: neither a folder nor a hub id; another kind of model; weights or a vocabulary that are not whole.
    """
    if is_folder(model):
        _check_model(Path(model), kinds)
    if is_folder(processor or model):
        folder = Path(processor or model)
        read_json(_one_of(folder, PROCESSORS, "image processor"))
        _tokenizer(str(folder))


def is_folder(name: str) -> bool:
    """Whether `name` is a folder on this machine, or else a hub id; FileNotFoundError if it can be neither."""
    if Path(name).is_dir():
        return True
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return False
    raise FileNotFoundError(f"{name!r} is neither a folder on this machine nor a hub id of the form OWNER/NAME.")


def _check_model(folder: Path, kinds: tuple[str, ...]) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"There is no {config}: {folder} is not the folder of a model of transformers.")
    found = read_json(config).get("model_type")
    if found not in kinds:
        raise ValueError(f"{config} describes a model of type {found!r}, wanted is one of {kinds}.")
    _proved(str(folder))


def _proved(model: str) -> tuple[Any, str | None]:
    """The network without memory, once all its weights were found, and the variant of the files that have them."""
    from transformers import AutoModel

    what = f"the image-text model {model!r}"
    if not Path(model).is_dir():
        try:
            return check_transformers(AutoModel, model, model, what), None
        except ValueError as error:
            if "model.safetensors" not in str(error):
                raise
            return check_transformers(AutoModel, model, model, what, variant="fp16"), "fp16"
    where, variant = _weights_in(Path(model))
    return check_transformers(AutoModel, model, where, what, variant=variant), variant


def _weights_in(folder: Path) -> tuple[Path, str | None]:
    """What errors on a folder's weights name, and the variant of its files."""
    for variant in (None, "fp16"):
        if files := weight_files(folder, "model", variant):
            for file in files:
                check_weights(file)
            return (files[0] if len(files) == 1 else folder), variant
    if any(folder.glob("pytorch_model*.bin.index.json")):  # several files of the old format: left to transformers
        return folder, None
    return check_weights(_one_of(folder, WEIGHTS, "weights")), None


def _one_of(folder: Path, names: tuple[str, ...], what: str) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no {what}: it needs {' or '.join(names)}.")
    return found


def _loaded(kind: Any, name: str, what: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"The {what} of {name!r} cannot be loaded: {reason}") from error


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return load_tokenizer(AutoTokenizer, name)
    except ImportError as error:
        raise ImportError(
            f"The tokenizer of {name!r} is a SentencePiece model: pip install 'diffusion-rtb[siglip]' (or sentencepiece and "
            f"protobuf). {error}"
        ) from error


def _pooled(output: Any) -> Tensor:
    """transformers 5 returns the embedding inside of an output, 4 returned it bare."""
    return output if isinstance(output, Tensor) else output.pooler_output
