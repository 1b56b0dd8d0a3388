"""What a pipeline of diffusers says of itself: its parts in model_index.json, its arguments in the signature of its call."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_rtb.config.component_errors import nearest
from diffusion_rtb.files.completeness import read_json
from pipelines._models.proof import SCHEDULER, Parts

__all__ = ["answered", "call_names", "parts_of", "pipeline_class", "predicts_flow", "unloaded"]


def pipeline_class(name: str) -> Any:
    """The pipeline of diffusers of that name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    import diffusers

    known = [found for found in dir(diffusers) if found.endswith("Pipeline")]
    if name not in known:
        raise ValueError(f"pipeline={name!r} is not a pipeline of diffusers.{nearest(name, known)}")
    return getattr(diffusers, name)


def call_names(pipeline: Any) -> list[str]:
    """Names of the arguments of a pipeline's call."""
    return [name for name in inspect.signature(pipeline.__call__).parameters if name != "self"]


def unloaded(pipeline: Any) -> tuple[str, ...]:
    """Parts that judge finished pictures, which no chain needs."""
    wanted = inspect.signature(pipeline.__init__).parameters
    return ("safety_checker", "feature_extractor") if "safety_checker" in wanted else ()


def parts_of(index: Mapping[str, Any], pipeline: Any, folder: Path) -> Parts:
    """The networks and vocabularies of a folder that this pipeline is made of; tokenizer_2 goes with text_encoder_2, and so on.

    Raises:
        ValueError: the folder lacks a part.
    """
    import diffusers
    import torch
    import transformers

    optional = (*unloaded(pipeline), *pipeline._optional_components)
    networks, vocabularies = [], {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        library, kind = index.get(name) or (None, None)
        if kind is None or name in unloaded(pipeline):
            needed = parameter.default is parameter.empty and name not in ("self", *optional)
            text = name.startswith(("text_encoder", "tokenizer")) and name not in index
            if needed or text:  # a folder of this pipeline says null of what it leaves out
                raise ValueError(
                    f"{folder} has no {name}, of which a {pipeline.__name__} is made. Build the pipeline with one, call its "
                    "save_pretrained(FOLDER), and give that folder."
                )
            continue
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(str(library)), str(kind), None)
        if inspect.isclass(cls) and issubclass(cls, torch.nn.Module):
            networks.append(name)
        elif name.startswith("tokenizer"):
            vocabularies[name] = name.replace("tokenizer", "text_encoder")
    return Parts(networks, {name: encoder for name, encoder in vocabularies.items() if encoder in networks})


def predicts_flow(folder: Path) -> bool:
    """Whether a folder's scheduler says that the network predicts the velocity of a flow."""
    config = read_json(folder / SCHEDULER)
    kind = str(config.get("_class_name")), str(config.get("prediction_type"))
    return "FlowMatch" in kind[0] or "flow" in kind[1] or bool(config.get("use_flow_sigmas"))


def answered(pipeline: Any) -> Sequence[str | None]:
    """What a pipeline's `encode_prompt` answers, by the names of its call's arguments; empty where its code does not say.

    Its last line returns local variables, and diffusers calls them as the call calls its arguments.
    """
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        return ()
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(encode))).body
    last = function.body[-1] if isinstance(function, ast.FunctionDef) else None
    value = last.value if isinstance(last, ast.Return) else None
    names = [getattr(item, "id", None) for item in (value.elts if isinstance(value, ast.Tuple) else [value])]
    known = [name if name in call_names(pipeline) else None for name in names]
    return known if "prompt_embeds" in known else ()
