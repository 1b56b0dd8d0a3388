"""Stable Diffusion's UNet under the names of its first implementation, walked from its structure: what LoRA programs look up.

ComfyUI and the WebUIs hold the network as `input_blocks`, `middle_block` and `output_blocks` and translate a LoRA's names into
these. Here both translations are derived from the structure alone: `ldm_unet` counts the blocks as the network is built,
`by_arithmetic` takes a name apart as a WebUI does. Neither knows the other, or diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Shape = tuple[int, ...]

PROJECTIONS = {"to_q": 0, "to_k": 1, "to_v": 1, "to_out.0": 0}
"""Projections of one attention: does it read the context?"""


def ldm_unet(channels: Sequence[int], context: int, linear: bool) -> dict[str, tuple[str, Shape]]:
    """diffusers' module name -> (ldm's module name, shape of its weight), of every linear and convolution.

    Args:
        channels: Of the four levels; attention is in the upper three, two blocks each.
        context: Width of the text embedding.
        linear: Whether `proj_in` and `proj_out` are linear (Stable Diffusion 2.x) or convolutions (1.x).
    """
    found: dict[str, tuple[str, Shape]] = {}
    time, first = 4 * channels[0], channels[0]

    def residual(name: str, ldm: str, into: int, out: int) -> None:
        found[f"{name}.conv1"] = f"{ldm}.in_layers.2", (out, into, 3, 3)
        found[f"{name}.time_emb_proj"] = f"{ldm}.emb_layers.1", (out, time)
        found[f"{name}.conv2"] = f"{ldm}.out_layers.3", (out, out, 3, 3)
        if into != out:
            found[f"{name}.conv_shortcut"] = f"{ldm}.skip_connection", (out, into, 1, 1)

    def transformer(name: str, ldm: str, width: int) -> None:
        for part in ("proj_in", "proj_out"):
            found[f"{name}.{part}"] = f"{ldm}.{part}", (width, width) if linear else (width, width, 1, 1)
        block = "transformer_blocks.0"
        for attention in ("attn1", "attn2"):
            for part, reads in PROJECTIONS.items():
                source = context if attention == "attn2" and reads else width
                found[f"{name}.{block}.{attention}.{part}"] = f"{ldm}.{block}.{attention}.{part}", (width, source)
        found[f"{name}.{block}.ff.net.0.proj"] = f"{ldm}.{block}.ff.net.0.proj", (8 * width, width)
        found[f"{name}.{block}.ff.net.2"] = f"{ldm}.{block}.ff.net.2", (width, 4 * width)

    found["conv_in"] = "input_blocks.0.0", (first, 4, 3, 3)
    found["conv_out"] = "out.2", (4, first, 3, 3)
    found["time_embedding.linear_1"] = "time_embed.0", (time, first)
    found["time_embedding.linear_2"] = "time_embed.2", (time, time)
    place, width, skips = 1, first, [first]
    for level, out in enumerate(channels):
        for block in range(2):
            residual(f"down_blocks.{level}.resnets.{block}", f"input_blocks.{place}.0", width, out)
            if level < 3:
                transformer(f"down_blocks.{level}.attentions.{block}", f"input_blocks.{place}.1", out)
            width, place = out, place + 1
            skips.append(width)
        if level < 3:
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op", (width, width, 3, 3)
            place += 1
            skips.append(width)
    for number, part in ((0, 0), (1, 2)):
        residual(f"mid_block.resnets.{number}", f"middle_block.{part}", width, width)
    transformer("mid_block.attentions.0", "middle_block.1", width)
    place = 0
    for level, out in enumerate(reversed(channels)):
        for block in range(3):
            residual(f"up_blocks.{level}.resnets.{block}", f"output_blocks.{place}.0", width + skips.pop(), out)
            if level > 0:
                transformer(f"up_blocks.{level}.attentions.{block}", f"output_blocks.{place}.1", out)
            width, place = out, place + 1
        if level < 3:
            part = 2 if level > 0 else 1
            found[f"up_blocks.{level}.upsamplers.0.conv"] = (
                f"output_blocks.{place - 1}.{part}.conv",
                (width, width, 3, 3),
            )
    assert not skips
    return found


RESIDUAL = {"conv1": "in_layers_2", "conv2": "out_layers_3", "time_emb_proj": "emb_layers_1"}
RESIDUAL |= {"conv_shortcut": "skip_connection"}


def by_arithmetic(name: str) -> str | None:
    """A LoRA's name, `lora_unet_…`, as ldm's with all dots as underscores, by counting three blocks a level; None: unknown."""
    plain = {"conv_in": "input_blocks_0_0", "conv_out": "out_2"}
    plain |= {"time_embedding_linear_1": "time_embed_0", "time_embedding_linear_2": "time_embed_2"}
    name = name.removeprefix("lora_unet_")
    if name in plain:
        return plain[name]
    if found := re.fullmatch(r"(down|up)_blocks_(\d)_(attentions|resnets)_(\d)_(.+)", name):
        way, level, kind, block, rest = found.groups()
        count = 3 * int(level) + int(block) + (way == "down")
        side = "input" if way == "down" else "output"
        return f"{side}_blocks_{count}_{int(kind == 'attentions')}_{RESIDUAL.get(rest, rest)}"
    if found := re.fullmatch(r"mid_block_(attentions|resnets)_(\d)_(.+)", name):
        kind, block, rest = found.groups()
        return f"middle_block_{1 if kind == 'attentions' else 2 * int(block)}_{RESIDUAL.get(rest, rest)}"
    if found := re.fullmatch(r"down_blocks_(\d)_downsamplers_0_conv", name):
        return f"input_blocks_{3 * int(found[1]) + 3}_0_op"
    if found := re.fullmatch(r"up_blocks_(\d)_upsamplers_0_conv", name):
        return f"output_blocks_{3 * int(found[1]) + 2}_{2 if int(found[1]) else 1}_conv"
    return None
