"""Bytes are those that torch counts: of modules, of an optimizer after a real step, of real graphs."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from diffusion_rtb.doctor.activations import activation_bytes, scaled
from diffusion_rtb.doctor.finding import Examined, Finding
from diffusion_rtb.doctor.sizes import GraphBytes, bytes_of, module_bytes, optimizer_bytes, reward_networks
from diffusion_rtb.doctor.terminal import show_examined
from diffusion_rtb.doctor.words import count_text, many, seconds_text
from diffusion_rtb.sampling.sampler import Sampler
from pipelines.stable_diffusion import StableDiffusion
from tests.oracles.tiny import save_tiny, tiny_unet


def test_a_module_is_its_parameters_and_buffers_each_once() -> None:
    unet = tiny_unet()
    assert module_bytes(unet, unet) == sum(tensor.nbytes for tensor in unet.state_dict().values())
    assert module_bytes(nn.BatchNorm1d(5)) == 4 * (4 * 5) + 8  # weight, bias, mean, variance, and a counter


@pytest.mark.parametrize("shapes", [[(3, 5)], [(7,), (2, 2, 2)]])
def test_an_optimizer_has_two_moments_and_a_counter(shapes: list[tuple[int, ...]]) -> None:
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = torch.optim.AdamW(parameters)
    assert optimizer_bytes(optimizer) == 0
    torch.stack([parameter.sum() for parameter in parameters]).sum().backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == 2 * bytes_of(parameters) + 4 * len(parameters)


def test_a_graph_is_the_distinct_storages_that_backward_needs() -> None:
    x, weight = torch.randn(6, 10, requires_grad=True), torch.randn(4, 10)
    with GraphBytes([weight]) as graph:
        y = x.exp().sin()  # exp keeps its result, sin its input: one storage
        assert graph.now == 6 * 10 * 4
        z = (y @ weight.T).tanh()  # the weight is known, x of a frozen weight is not needed: the result of tanh
        assert graph.now == 6 * 10 * 4 + 6 * 4 * 4
        z.sum().backward()
    assert graph.now == 0
    assert graph.peak == 6 * 10 * 4 + 6 * 4 * 4


def test_a_graph_that_is_freed_on_the_way_counts_its_largest_part() -> None:
    x = torch.randn(50, requires_grad=True)
    with GraphBytes() as graph:
        for _ in range(3):
            x.exp().sum().backward()
    assert graph.peak == 50 * 4


def test_activations_of_a_larger_micro_batch_follow_from_those_of_two_small_ones(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    prior = StableDiffusion(str(save_tiny(tmp_path_factory.mktemp("model") / "tiny")), steps=3)
    prior.attach(rank=2, alpha=2.0)
    sampler = Sampler(prior, lambda images, prompts: images.mean((1, 2, 3)), ["a cat"], 6)
    batch = sampler.draw([0] * 6, list(range(6)), of_prior=True)
    measured = {count: activation_bytes(sampler, batch, count) for count in (1, 2, 6)}
    assert scaled(measured[1], measured[2], 6) == pytest.approx(measured[6], rel=0.01)
    assert measured[6] > 4 * measured[1]
    assert all(parameter.grad is None for parameter in prior.parameters().values())


def test_the_networks_of_a_reward_are_found_inside_others() -> None:
    class Judge:
        def __init__(self, network: nn.Module) -> None:
            self.tools = {"network": network}

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return images.mean((1, 2, 3))

    class Sum:
        def __init__(self, rewards: dict[str, object]) -> None:
            self.rewards = rewards

    inner, outer = nn.Linear(2, 3), nn.Linear(4, 1)
    assert set(reward_networks(Sum({"a": Judge(inner), "b": outer, "c": Judge(inner)}))) == {inner, outer}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0412, "0.041 s"),
        (3.26, "3.3 s"),
        (45.0, "45 s"),
        (59.7, "1 min"),
        (370.0, "6 min 10 s"),
        (3600.0, "1 h"),
        (7500.0, "2 h 5 min"),
        (275_000.0, "3 d 4 h"),
    ],
)
def test_durations_as_people_say_them(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_numbers_as_people_say_them() -> None:
    assert [count_text(n) for n in (512, 77_312, 859_520_964, 12 * 10**9)] == ["512", "77.3 k", "859.5 M", "12.0 G"]
    assert [many(1, "prompt"), many(4, "micro-batch"), many(2, "process")] == [
        "1 prompt",
        "4 micro-batches",
        "2 processes",
    ]


def test_only_the_verdict_and_the_remedy_of_a_page_have_a_colour() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=60)
    remedy = Finding("look", "a sentence that does not fit into what is left of the line", "a=setting")
    show_examined("name", Examined([Finding("ok", "fine"), remedy], [("label", "1 kB")]), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0] == "\x1b[32mok   \x1b[0mname       fine"
    assert lines[1].startswith("\x1b[33mlook \x1b[0m           a sentence")
    assert "\x1b" not in lines[2]
    assert lines[3] == " " * 16 + "\x1b[33m-> a=setting\x1b[0m"
    assert lines[4] == " " * 16 + "\x1b[2mlabel                \x1b[0m1 kB"
