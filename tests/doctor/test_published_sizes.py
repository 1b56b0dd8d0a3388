"""A model of published size is planned from json files and headers alone; one that does not fit is never opened."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.doctor.examinations.weights import examine
from diffusion_rtb.doctor.patient import Patient
from diffusion_rtb.doctor.report import examine_run
from diffusion_rtb.doctor.sizes import network_header
from tests.oracles.published_sizes import save_stable_diffusion_15, write_sparse

PUBLISHED = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
"""Numbers of Stable Diffusion 1.5, and of a LoRA of rank 4 on the attention of its UNet in diffusers' own training script."""
LORA = 797_184


def config(folder: Path, **prior: object) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "large",
            "prior": {"component": "stable_diffusion", "path": str(folder), "steps": 10, "device": "cpu", **prior},
            "posterior": {"rank": 4},
            "reward": {"component": "jpeg"},
            "beta": 1.0,
            "prompts": {"list": ["a cat"]},
            "train": {"prompts_per_iteration": 1, "group": 2, "micro_batch": 2},
        }
    )


def test_the_plan_of_stable_diffusion_needs_its_headers_alone(tmp_path: Path) -> None:
    save_stable_diffusion_15(tmp_path / "sd")
    on_disk = sum(512 * file.stat().st_blocks for file in (tmp_path / "sd").rglob("*.safetensors"))
    patient = Patient(config(tmp_path / "sd", dtype="float16"), tmp_path / "run")
    before = psutil.Process().memory_info().rss
    numbers = examine(patient).numbers
    assert {name: header["numbers"] for name, header in numbers["networks"].items()} == PUBLISHED
    assert numbers["bytes"] == 2 * sum(PUBLISHED.values())
    assert numbers["trained"] == LORA
    assert numbers["trained_bytes"] == 16 * LORA
    assert on_disk < 10**6 < sum(header["on_disk"] for header in numbers["networks"].values())
    assert psutil.Process().memory_info().rss - before < numbers["bytes"] / 10
    assert "loaded" not in vars(patient)


def test_what_cannot_fit_is_not_loaded(tmp_path: Path) -> None:
    total, widen = psutil.virtual_memory().total, 2
    while 4 * 0.9 * widen**2 * PUBLISHED["unet"] < total:
        widen *= 2
    save_stable_diffusion_15(tmp_path / "sd", widen)
    report = examine_run(config(tmp_path / "sd"), tmp_path / "run")
    weights = report.examined["weights"]
    assert weights.verdict == report.verdict == "stop"
    assert weights.numbers["bytes"] > total
    assert "they do not fit" in weights.findings[0].text
    assert "prior.dtype" in weights.findings[0].remedy
    for name in ("reward", "memory", "time", "disk"):
        assert "the weights do not fit" in report.examined[name].findings[0].text


def test_floating_tensors_are_counted_in_the_dtype_they_are_loaded_in(tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7,), "scalar": ()}
    for dtype, size in ((torch.float16, 2), (torch.float32, 4)):
        write_sparse(tmp_path / "x.safetensors", shapes, dtype)
        found = network_header([tmp_path / "x.safetensors"], torch.bfloat16)
        assert (found.numbers, found.on_disk, found.loaded) == (23, 23 * size, 23 * 2)
    write_sparse(tmp_path / "x.safetensors", {"positions": (77,)}, torch.int64)
    assert network_header([tmp_path / "x.safetensors"], torch.float16).loaded == 77 * 8


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_lora_grows_with_its_rank(tmp_path: Path, rank: int) -> None:
    from pipelines._diffusers.lora import lora_numbers

    shapes = {
        "attn.to_q.weight": (320, 320),
        "attn.to_k.weight": (320, 768),
        "conv.weight": (8, 4, 3, 3),
        "conv.bias": (8,),
    }
    assert lora_numbers(shapes, rank, ["to_q", "to_k"]) == rank * (640 + 1088)
    assert lora_numbers(shapes, rank, ["conv"]) == rank * (4 * 9 + 8)
