"""An image-text model of the open_clip library, bundled, on this machine or from the hub, as two maps to unit vectors."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.files.completeness import check_names, looks_like, refuse_lora, tensor_shapes
from diffusion_rtb.files.vocabulary import check_rows, check_tokenizer
from rewards import emoji_clip
from rewards._models.network import Dtype
from rewards._models.preprocess import Preprocess
from rewards._models.torchscript import is_torchscript
from rewards._models.two_towers import TwoTowers
from rewards._models.weights import HUB, check_weights, fetch, fill, read_weights

__all__ = ["OpenClip"]

BUNDLED = {"emoji-clip": emoji_clip.path()}
"""Models that come with the package."""

FOLDER = "local-dir:"

NOT_WEIGHTS = ("attn_mask", "input_resolution", "context_length", "vocab_size")
"""What published files of CLIP hold besides."""


SMALL = 256
"""Widths below are those of no published network: of trials, with the architecture's number of heads."""


class OpenClip(TwoTowers):
    """A model of the open_clip library.

    Args:
        model: "emoji-clip", an architecture name of open_clip, a folder with `open_clip_config.json`, or `hf-hub:ID`.
        weights: For an architecture name: a local file, OpenAI's TorchScript archives included, or one of open_clip's tags,
            which downloads.
        batch, dtype: See `TwoTowers`.
    """

    def __init__(self, model: str, weights: str | None = None, *, batch: int = 64, dtype: Dtype = "float32") -> None:
        import open_clip

        folder = _folder(model)
        name = f"{FOLDER}{folder}" if folder else model
        try:
            if weights is not None and is_torchscript(weights):
                network = _of_openai(model, weights)
            else:
                network = open_clip.create_model(name, weights, require_pretrained=True)
        except (RuntimeError, KeyError, pickle.UnpicklingError, EOFError) as error:
            _explain(name, weights, _weights_in(folder) if folder else weights)
            source = "" if folder else f" from {weights or 'the hub'}"
            reason = " ".join(str(error).split())[:400]
            raise ValueError(f"The weights of open_clip model {model!r} do not load{source}: {reason}") from error
        _check_bias(network, _weights_in(folder) if folder else weights)
        self.preprocess = Preprocess.of_open_clip(network.visual.preprocess_cfg)
        self.tokenizer = _tokenizer(name, network)
        super().__init__(network, model, batch=batch, dtype=dtype)

    @classmethod
    def of_file(
        cls, architecture: str, weights: str, preprocess: str, *, batch: int = 64, dtype: Dtype = "float32"
    ) -> OpenClip:
        """A model whose sizes are those of the tensors in a file; number of heads and activation are the architecture's.

        Args:
            architecture: A vision transformer of open_clip.
            weights: A local file, or `hf-hub:OWNER/NAME/FILE`, in open_clip's or OpenAI's layout.
            preprocess: How images are fitted into the network's input: "shortest", "fit", … (see `Preprocess`).
            batch, dtype: See `TwoTowers`.
        """
        import open_clip

        path = fetch(weights)
        state = _weights_alone(read_weights(path))
        config = _sized(open_clip.get_model_config(architecture), state, path)
        network = open_clip.model.CLIP(**config)
        fill(network, state, path, f"a CLIP model like {architecture}")
        side, context = config["vision_cfg"]["image_size"], config["text_cfg"]["context_length"]
        settings = {**vars(open_clip.transform.PreprocessCfg(side)), "resize_mode": preprocess}
        model = cls.__new__(cls)
        model.preprocess = Preprocess.of_open_clip(settings)
        model.tokenizer = open_clip.get_tokenizer(architecture, context_length=context)
        TwoTowers.__init__(model, network, str(path), batch=batch, dtype=dtype)
        return model

    def embed_images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """See `TwoTowers`."""
        return self.model.encode_image(self.preprocess(images).to(self.dtype))

    def embed_text(self, text: str) -> Float[Tensor, "1 dim"]:
        """See `TwoTowers`."""
        return self.model.encode_text(self.tokenizer([text]).to(self._device))


def check_open_clip(model: str, weights: str | None = None) -> None:
    """Refuse what `OpenClip` cannot load, before anything is.

    Raises:
        FileNotFoundError: a folder or a file is missing.
        ValueError: no such architecture or tag; weights missing, truncated, or given where the model has its own.
    """
    folder = _folder(model)
    if folder or model.startswith(HUB):
        if weights is not None:
            raise ValueError(f"{model!r} has its own weights; leave out `weights`, got {weights!r}.")
        if folder:
            check_weights(_weights_in(folder))
    else:
        _check_architecture(model, weights)


def _explain(name: str, weights: str | None, file: Path | str | None) -> None:
    """Say what a file lacks that open_clip could not load; return if it lacks nothing, or is not on this machine."""
    if file is None or not Path(file).is_file():
        return
    import open_clip

    if Path(file).suffix == ".safetensors":
        found = tensor_shapes([Path(file)])
    else:
        found = {key: tuple(value.shape) for key, value in read_weights(file).items()}
    refuse_lora(found, file)
    network = open_clip.create_model(name, load_weights=False)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    check_names(found, wanted, file, f"open_clip model {name.removeprefix(FOLDER)!r}")


def _check_bias(network: Any, file: Path | str | None) -> None:
    """open_clip makes up a `logit_bias` of 0 where a file has none."""
    if getattr(network, "logit_bias", None) is None or file is None or Path(file).suffix != ".safetensors":
        return
    names = tensor_shapes([Path(file)])
    if not any(name.rpartition(".")[2] == "logit_bias" for name in names):
        raise ValueError(
            f"{file} does not hold the weights of its network: 1 missing (first: logit_bias). {looks_like(['logit_bias'], ())}"
        )


def _tokenizer(name: str, network: Any) -> Any:
    """open_clip's; one of transformers that it stands for must have its vocabulary."""
    import open_clip

    tokenizer: Any = open_clip.get_tokenizer(name)
    behind = getattr(tokenizer, "tokenizer", None)
    if behind is not None:
        tables = (module for key, module in network.named_modules() if key.endswith("token_embedding"))
        rows = next((table.num_embeddings for table in tables), None)
        check_tokenizer(behind, name.removeprefix(FOLDER))
        check_rows(behind, name.removeprefix(FOLDER), rows)
    return tokenizer


def _of_openai(model: str, path: str) -> Any:
    """A network with the tensors of a TorchScript archive: OpenAI's layout, activation and preprocessing."""
    import open_clip

    architecture = model.replace("/", "-")
    config, activated = open_clip.get_model_config(architecture), f"{architecture}-quickgelu"
    if not config.get("quick_gelu") and activated in open_clip.list_models():
        raise ValueError(
            f"{path} is a TorchScript archive, OpenAI's format, and OpenAI's networks have QuickGELU: with the GELU of "
            f"{model!r} they would embed otherwise. Give {activated!r}."
        )
    network = open_clip.model.CLIP(**config)
    fill(network, _weights_alone(read_weights(path)), path, f"the CLIP model {model}")
    network.visual.preprocess_cfg = vars(open_clip.transform.PreprocessCfg(config["vision_cfg"]["image_size"]))
    return network


def _weights_alone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in NOT_WEIGHTS}


def _sized(config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """An architecture's config with the sizes of the tensors that were read from `path`."""
    try:
        patches, context = state["visual.positional_embedding"], state["positional_embedding"]
        width, _, patch, _ = state["visual.conv1.weight"].shape
        embed, vocabulary = state["visual.proj"].shape[1], len(state["token_embedding.weight"])
        hidden = [len(state[f"{tower}transformer.resblocks.0.mlp.c_fc.bias"]) for tower in ("visual.", "")]
    except KeyError as error:
        raise ValueError(f"{path} does not hold a CLIP model in open_clip's layout: it has no {error}.") from None
    vision, text = config["vision_cfg"], config["text_cfg"]
    for of, found, known in (("images", width, vision["width"]), ("texts", context.shape[1], text["width"])):
        if found != known and found >= SMALL:
            raise ValueError(
                f"{path} holds a network of width {found} for {of}, this architecture has {known}: it is another one, and its "
                "number of heads cannot be read off its tensors."
            )
    heads = vision["width"] // vision.get("head_width", 64)
    if width % heads or context.shape[1] % text["heads"]:
        raise ValueError(
            f"{path} holds a network of width {width} for images and {context.shape[1]} for texts; they must be multiples "
            f"of the {heads} and {text['heads']} heads of this architecture."
        )
    vision_cfg = {
        "image_size": patch * round((len(patches) - 1) ** 0.5), "patch_size": patch, "width": width,
        "layers": _layers(state, "visual."), "head_width": width // heads, "mlp_ratio": hidden[0] / width,
    }  # fmt: skip
    text_cfg = {
        "context_length": len(context), "vocab_size": vocabulary, "width": context.shape[1],
        "layers": _layers(state, ""), "mlp_ratio": hidden[1] / context.shape[1],
    }  # fmt: skip
    return {**config, "embed_dim": embed, "vision_cfg": {**vision, **vision_cfg}, "text_cfg": {**text, **text_cfg}}


def _layers(state: Mapping[str, Tensor], tower: str) -> int:
    pattern = re.compile(re.escape(tower) + r"transformer\.resblocks\.(\d+)\.")
    return 1 + max(int(found[1]) for found in map(pattern.match, state) if found)


def _folder(model: str) -> Path | None:
    """The folder that `model` names, or None for an architecture or a hub id."""
    if model in BUNDLED:
        return BUNDLED[model]
    if model.startswith(FOLDER):
        return Path(model.removeprefix(FOLDER))
    return Path(model) if Path(model).is_dir() else None


def _weights_in(folder: Path) -> Path:
    config = folder / "open_clip_config.json"
    if not config.is_file():
        raise FileNotFoundError(f"There is no {config}: {folder} is not the folder of an open_clip model.")
    if "model_cfg" not in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"{config} has no 'model_cfg': it does not describe an open_clip model.")
    names = [
        f"open_clip_{name}{suffix}"
        for suffix in (".safetensors", ".bin", ".pth")
        for name in ("model", "pytorch_model")
    ]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no weights: it needs {names[0]}.")
    return found


def _check_architecture(model: str, weights: str | None) -> None:
    import open_clip

    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        known = [*BUNDLED, *open_clip.list_models()]
        raise ValueError(
            f"open_clip has no architecture {model!r}.{nearest(name, known)} Use 'emoji-clip', one of open_clip.list_models(), "
            f"a folder with open_clip_config.json, or 'hf-hub:ID'."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None:
        raise ValueError(
            f"Architecture {model!r} needs `weights`: a local file, or one of the tags {tags}, which downloads."
        )
    if weights.lower() not in tags:
        if "." not in weights and "/" not in weights:
            raise ValueError(
                f"{model!r} has no weights {weights!r}.{nearest(weights, tags)} Tags: {tags}; or give a file."
            )
        check_weights(weights)
