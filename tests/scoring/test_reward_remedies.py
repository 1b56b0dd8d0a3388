"""Rewards written for another trainer: what is said of them names the cause and the remedy, which then works."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from diffusion_rtb.reward_check.checks import TRAINING
from diffusion_rtb.reward_check.report import Report, check_reward, check_rewards
from diffusion_rtb.reward_check.samples import choose_samples, folder_samples, standard_samples, word_samples
from diffusion_rtb.reward_check.subject import Check, Subject
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from rewards.brightness import Brightness
from rewards.jpeg import Jpeg
from rewards.weighted_sum import WeightedSum
from tests.oracles.planted_rewards import good

SAMPLES = standard_samples(16, 32)


def report(reward: Any) -> Report:
    return check_reward(reward, SAMPLES, device="cpu")


def finding(found: Report, name: str) -> Check:
    (check,) = [check for check in found.checks if check.name == name]
    return check


def by_name(images: Any, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([np.asarray(image.convert("L")).mean() for image in images], dtype=torch.float32)


def by_size(images: Any, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(image.resize((4, 4)).getpixel((0, 0))[0]) for image in images])


def by_array(images: Any, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([np.asarray(Image.fromarray(image)).mean() for image in images], dtype=torch.float32)


def by_numpy(images: Any, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(image.astype(float).mean()) for image in images])


def by_bytes(images: Any, prompts: Sequence[str]) -> Tensor:
    if images.dtype != torch.uint8:
        raise TypeError("these are no files")
    return images.float().flatten(1).mean(1)


def exchanged(words: Any, pictures: Any) -> Tensor:
    return pictures.mean((1, 2, 3)) + torch.tensor([len(word) for word in words])


def named_so(prompts: Any, images: Any) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


def strips(images: Any, prompts: Any) -> Tensor:
    return torch.tensor([float(len(text.strip())) for text in images])


@pytest.mark.parametrize(
    "reward, message",
    [
        (by_name, "no attribute 'convert' .*images are float tensors .*to_pil_image"),
        (by_size, "with PIL pictures it runs, but images are float tensors .*to_pil_image"),
        (by_array, "images are float tensors .*to_pil_image"),
        (by_numpy, r"images are float tensors .* images\.cpu\(\)\.numpy\(\)"),
        (by_bytes, r"with 8-bit levels it runs, but .*\(images \* 255\)\.round\(\)\.to\(torch\.uint8\)"),
        (exchanged, r"called with \(images, prompts\), in this order"),
        (named_so, r"first parameter is for prompts .*\(images, prompts\), in this order"),
        (strips, r"\(images, prompts\), in this order"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_reward_for_another_form_is_told_which(reward: Any, message: str) -> None:
    check = finding(report(reward), "call")
    assert check.status == "fail"
    assert re.search(message, check.message), check.message


def test_the_remedies_work() -> None:
    def pictures(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return by_name([to_pil_image(x) for x in images.cpu()], prompts)

    def levels(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return by_bytes((images * 255).round().to(torch.uint8), prompts)

    assert report(pictures).passed
    assert report(levels).passed


def test_training_says_it_too() -> None:
    with pytest.raises(RewardError, match=r"no attribute 'convert' \(images are float tensors .*to_pil_image"):
        evaluate_reward(by_name, SAMPLES.images, SAMPLES.prompts, "mine")


def test_an_error_of_its_own_gets_no_remedy() -> None:
    def broken(images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise ValueError("no model")

    assert finding(report(broken), "call").message == "raised ValueError: no model"


def over_half(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return (images > 128).float().flatten(1).mean(1)


def rounded_down(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.to(torch.uint8).float().flatten(1).mean(1)


def of_words(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return torch.tensor([float(len(prompt)) for prompt in prompts])


@pytest.mark.parametrize(
    "reward, name, message",
    [
        (over_half, "spread", r"all 16 values are 0: .*with images \* 255 they differ"),
        (rounded_down, "levels", r"only pixels of exactly 1 count.*\(images \* 255\)\.round\(\)"),
        (of_words, "levels", "does not look at its images"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_levels_of_255_and_of_1_are_told_apart(reward: Any, name: str, message: str) -> None:
    found = report(reward)
    assert [check.name for check in found.checks if check.status == "fail"] == [name]
    assert re.search(message, finding(found, name).message), finding(found, name).message


@pytest.mark.parametrize(
    "form, message",
    [
        (lambda x: (x, {}), r"returned a tuple; the \(scores, info\) of .* return the scores alone, as a torch tensor"),
        (lambda x: (x.numpy(), {}), r"the \(scores, info\) of "),
        (lambda x: x.to_sparse(), r"returned a sparse tensor \(torch\.sparse_coo\); return values\.to_dense\(\)"),
        (lambda x: x.diag().to_sparse_csr(), r"returned a sparse tensor \(torch\.sparse_csr\)"),
        (
            lambda x: lambda images, prompts: x,
            "returned a function; it makes a reward and is none: call it in your module",
        ),
        (lambda x: None, "returned a NoneType; it ends without `return`"),
        (lambda x: x.numpy(), r"returned a ndarray; return a torch tensor of shape \(16,\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:Sparse CSR")
def test_other_forms_are_named_alike_here_and_in_training(form: Any, message: str) -> None:
    def reward(images: Tensor, prompts: Sequence[str]) -> Any:
        return form(good(images, prompts))

    assert re.search(message, finding(report(reward), "output").message)
    with pytest.raises(RewardError, match=message):
        evaluate_reward(reward, SAMPLES.images, SAMPLES.prompts, "mine")


def tagged(images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Tensor:
    return good(images, prompts) + torch.tensor([float(row["tag"]) for row in metadata])


def test_a_reward_with_metadata_gets_that_of_the_prompts(tmp_path: Path) -> None:
    lines = []
    for i, image in enumerate(SAMPLES.images[:6]):
        to_pil_image(image).save(tmp_path / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"prompt {i % 3}", "tag": i % 3})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    samples = folder_samples(tmp_path)
    assert samples.metadata == {f"prompt {i}": {"tag": i} for i in range(3)}
    found = check_reward(tagged, samples, device="cpu")
    assert found.passed, found.checks
    expected = good(samples.images, samples.prompts) + torch.tensor([0.0, 1, 2, 0, 1, 2])
    assert found.values == pytest.approx(expected.tolist())
    lines[3]["tag"] = 7
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match="gives the prompt 'prompt 0' different metadata"):
        folder_samples(tmp_path)


def test_without_metadata_it_is_told_where_it_comes_from() -> None:
    message = finding(report(tagged), "call").message
    assert message.startswith(
        "raised KeyError: 'tag' (it takes `metadata`, and the prompt has none of that name: prompts.file"
    )


OCR = {"component": "ocr"}


def test_a_reward_that_reads_gets_words() -> None:
    words = choose_samples(count=72, side=64, rewards=[OCR])
    assert words.source.startswith("72 pictures of 64 pixels: words")
    assert all('"' in prompt for prompt in words.prompts)
    assert torch.equal(words.images, word_samples(72, 64).images)
    assert len({image.numpy().tobytes() for image in words.images}) == 72
    inside = {"component": "weighted_sum", "rewards": [{"component": "jpeg"}, OCR]}
    assert choose_samples(count=72, side=64, rewards=[inside]).source == words.source
    for rewards in ([{"component": "jpeg"}], [{**OCR, "text": "open"}], ()):
        assert torch.equal(choose_samples(count=8, side=64, rewards=rewards).images, standard_samples(8, 64).images)
    assert choose_samples(count=8, side=64, prompts=["a"], rewards=[OCR]).source == standard_samples(8, 64).source


def test_prompts_that_do_not_fit_are_a_finding_before_it_is_built() -> None:
    (found,) = check_rewards([OCR], SAMPLES, device="cpu").rewards
    (check,) = found.checks
    assert (check.name, check.status) == ("prompts", "fail")
    assert re.search(r"quote no text, the first is .*Prompts of your own: --prompt", check.message)


def test_ocr_passes_its_check_on_words() -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    (found,) = check_rewards([{**OCR, "side": 96}], word_samples(6, 96), device="cpu").rewards
    assert found.passed, found.checks
    assert 3 <= len(set(found.values))


@pytest.mark.parametrize(
    "rate, status, told",
    [(1000.0, "info", ""), (50.0, "info", "0.18 hours"), (8.0, "warn", "1.1 hours"), (0.5, "warn", "18 hours")],
)
def test_what_a_slow_reward_means(rate: float, status: str, told: str) -> None:
    from diffusion_rtb.reward_check.checks import check_speed

    assert TRAINING == (1000, 32)
    subject = Subject(good, SAMPLES.images, SAMPLES.prompts, spent=[9.0, 16 / rate])
    check = check_speed(subject)
    assert check.status == status
    assert (f"1,000 iterations of 32 samples spend {told} in it" in check.message) == bool(told)


def test_a_part_without_gradient_is_named() -> None:
    mixed = [{"component": "jpeg"}, {"component": "brightness", "name": "light"}]
    check = finding(report(WeightedSum(mixed)), "gradient")
    assert (check.status, check.message) == (
        "warn",
        "that of light alone: jpeg has none, so it is not the gradient of the whole",
    )
    nested = WeightedSum([{"component": "clamp", "low": -9.0, "reward": mixed[0], "name": "c"}, mixed[1]])
    assert finding(report(nested), "gradient").status == "warn"
    both = WeightedSum([{"component": "brightness"}, {"component": "colour", "colour": [1.0, 0.0, 0.0]}])
    for reward in (both, Brightness(), Jpeg()):
        assert finding(report(reward), "gradient").status == "info"
