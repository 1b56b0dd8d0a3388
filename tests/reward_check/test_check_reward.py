"""Every check passes a good reward and fails one with the fault it is for."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from diffusion_rtb.files.whole import write_json
from diffusion_rtb.reward_check.checks import check_device
from diffusion_rtb.reward_check.measures import jpeg_bits, peak_memory, spearman
from diffusion_rtb.reward_check.report import Report, check_reward, check_rewards, reward_component, reward_components
from diffusion_rtb.reward_check.samples import standard_samples, vector_samples
from diffusion_rtb.reward_check.subject import Check, Limits, Subject
from diffusion_rtb.reward_check.terminal import show_reports
from diffusion_rtb.scoring.call import RewardError, evaluate_reward
from rewards.jpeg import Jpeg
from tests.oracles import planted_rewards as planted

SAMPLES = standard_samples(16, 32)


def report(reward: Any, limits: Limits | None = None) -> Report:
    return check_reward(reward, SAMPLES, limits, device="cpu")


def finding(found: Report, name: str) -> Check:
    (check,) = [check for check in found.checks if check.name == name]
    return check


def test_a_good_reward_passes_everything() -> None:
    found = report(planted.good, Limits(images_per_second=1.0, memory_mib=500.0))
    assert found.passed
    assert not found.warned
    status = {check.name: check.status for check in found.checks}
    passed = [
        "output",
        "finite",
        "input",
        "settings",
        "spread",
        "repeat",
        "one by one",
        "order",
        "broken",
        "levels",
        "speed",
        "memory",
    ]
    assert {name for name, value in status.items() if value == "pass"} == {
        *passed,
        *(["device"] if torch.cuda.is_available() else []),
    }
    assert {name for name in status if status[name] == "info"} >= {
        "prompts",
        "precision",
        "gradient",
        "file size",
        "brightness",
    }
    assert finding(found, "gradient").value == pytest.approx(1.0, abs=0.01)
    assert finding(found, "prompts").message.startswith("used: ")


FAULTS: list[tuple[Any, str, str]] = [
    (planted.raises, "call", r"raised ZeroDivisionError: no cats \[found\]"),
    (planted.a_list, "output", r"returned a list; return a torch tensor of shape \(16,\)"),
    (planted.column, "output", r"returned shape \(16, 1\); return values\.squeeze\(1\)"),
    (planted.scalar, "output", r"returned shape \(\); return one number per sample, shape \(16,\)"),
    (planted.integers, "output", r"returned torch\.int64; return a floating dtype"),
    (planted.elsewhere, "output", "values on meta; return values.to"),
    (planted.nan_for_one, "finite", r"is nan for sample 3, prompt '.*' \(1 of 16 are not finite\)"),
    (planted.infinite, "finite", r"is (-?inf|nan) for sample 0.* \(16 of 16 are not finite\)"),
    (planted.in_place, "input", "changed its samples in place"),
    (planted.leaves_float64, "settings", r"other settings: \{'default dtype': torch\.float64\}"),
    (planted.constant, "spread", r"all 16 values are 0\.7: nothing can be learned"),
    (planted.constant_up_to_rounding, "spread", "all 16 values are 1000"),
    (planted.noisy, "repeat", r"two calls on the same samples differ by .* standard deviations"),
    (planted.Counting(), "repeat", "two calls on the same samples differ"),
    (planted.batch_statistics, "one by one", r"differs from all at once by .*must not depend on the rest of the batch"),
    (planted.batch_of_one, "one by one", r"a single sample: returned shape \(\); return one number per sample"),
    (planted.normalised_by_batch, "one by one", r"a single sample: is (inf|nan) for sample 0.* \(1 of 1 are"),
    (planted.by_place, "order", r"another order changes values .*must not depend on its place"),
    (planted.Running(), "order", "another order changes values"),
    (planted.slow, "speed", r"samples/s in batches of 16 .*at least 1000 were asked for"),
    (planted.greedy, "memory", r"MiB more of the process at its peak, for 16 samples; at most 100 were allowed"),
]  # fmt: skip


@pytest.mark.parametrize("reward, name, message", FAULTS, ids=lambda x: getattr(x, "__name__", None))
def test_a_fault_fails_its_check(reward: Any, name: str, message: str) -> None:
    found = report(reward, Limits(images_per_second=1000.0 if reward is planted.slow else None, memory_mib=100.0))
    check = finding(found, name)
    assert check.status == "fail"
    assert re.search(message, check.message), check.message
    assert not found.passed
    assert torch.equal(SAMPLES.images, standard_samples(16, 32).images)
    assert torch.get_default_dtype() == torch.float32, "what a reward changed is put back"


def test_one_fault_is_one_finding() -> None:
    for reward, name in (
        (planted.in_place, "input"),
        (planted.leaves_float64, "settings"),
        (planted.constant, "spread"),
    ):
        assert [check.name for check in report(reward).checks if check.status == "fail"] == [name]


@pytest.mark.parametrize("reward", [fault[0] for fault in FAULTS], ids=lambda x: getattr(x, "__name__", None))
def test_what_training_would_refuse_fails_here_too(reward: Any) -> None:
    """`evaluate_reward` is what training calls."""
    try:
        with torch.random.fork_rng():
            evaluate_reward(reward, SAMPLES.images.clone(), SAMPLES.prompts, "reward")
        refused = False
    except RewardError:
        refused = True
    finally:
        torch.set_default_dtype(torch.float32)
    found = report(reward)
    early = any(check.status == "fail" for check in found.checks if check.name in ("call", "output", "finite", "input"))
    assert early == refused


@pytest.mark.parametrize(
    "reward, name, message",
    [
        (planted.seeds, "settings", "draws from torch's global generator, or seeds it"),
        (planted.saturated, "spread", r"of 16 samples have the value 0\.1: no direction among them"),
        (planted.brightness, "brightness", r"rank correlation \+1\.00: .*no more than raising brightness"),
        (planted.of_black, "broken", r"a sample of NaN gets 0: let the NaN through, or raise"),
        (Jpeg(), "file size", r"rank correlation -1\.00: .*no more than lowering file size"),
        (planted.wrong_gradient, "gradient", r"small steps bring 0\.33 of what it promises"),
        (planted.zero_gradient, "gradient", "zero everywhere"),
        (planted.infinite_gradient, "gradient", "not finite"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_may_be_a_fault_is_a_warning(reward: Any, name: str, message: str) -> None:
    found = report(reward)
    check = finding(found, name)
    assert check.status == "warn"
    assert re.search(message, check.message), check.message
    assert found.warned


@pytest.mark.parametrize(
    "reward, name, message",
    [
        (planted.no_gradient, "gradient", "none: the values carry none"),
        (planted.refuses_gradients, "gradient", "none: asked for, the reward raised RuntimeError"),
        (planted.refuses_half, "precision", r"float64 0, bfloat16 refused, float16 refused"),
        (planted.brightness, "prompts", "not used: other prompts, the same values"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_no_fault_is_told(reward: Any, name: str, message: str) -> None:
    check = finding(report(reward), name)
    assert check.status == "info"
    assert message in check.message


def test_devices_must_agree() -> None:
    """Without a second device the first stands in for it: a reward that drifts from call to call disagrees with itself."""
    subject = Subject(planted.Counting(), SAMPLES.images, SAMPLES.prompts)
    subject.values = subject.ask(SAMPLES.images, SAMPLES.prompts)
    assert check_device(subject, torch.device("cpu")).status == "fail"
    steady = Subject(planted.good, SAMPLES.images, SAMPLES.prompts)
    steady.values = steady.ask(SAMPLES.images, SAMPLES.prompts)
    assert check_device(steady, torch.device("cpu")).status == "pass"
    assert check_device(steady, None).status == "skip"


@pytest.mark.gpu
def test_a_reward_that_stays_on_the_cpu_fails_on_a_gpu() -> None:
    assert check_reward(planted.good, SAMPLES, device="cuda").passed
    found = check_reward(lambda images, prompts: planted.good(images.cpu(), prompts), SAMPLES, device="cuda")
    assert finding(found, "output").status == "fail"
    found = check_reward(lambda images, prompts: planted.good(images.cpu(), prompts), SAMPLES, device="cpu")
    assert finding(found, "device").status == "fail"


def test_one_prompt_for_all_says_nothing_about_prompts() -> None:
    found = check_reward(planted.good, SAMPLES.with_prompts(["a cat"]), device="cpu")
    assert finding(found, "prompts").status == "skip"


def test_vectors_are_samples_too() -> None:
    samples = vector_samples(2, 24)
    posterior = {"means": [[1.0, 2.0], [0.0, 0.0]], "variance": 2.0}
    found = check_rewards(
        [{"component": "density", "density": posterior, "minus": {"mean": [0.0, 0.0], "covariance": 9.0}}],
        samples,
        device="cpu",
    )
    assert found.passed
    (one,) = found.rewards
    assert [finding(one, name).status for name in ("file size", "brightness", "prompts")] == ["skip"] * 3
    assert finding(one, "gradient").value == pytest.approx(1.0, abs=0.05)


SEVERAL: list[dict[str, Any]] = [
    {"component": "jpeg"},
    {"component": "jpeg", "sign": "incompress"},
    {"component": "standardise", "reward": {"component": "tests.oracles.planted_rewards:good"}},
    {"component": "tests.oracles.planted_rewards:nan_for_one"},
    {"component": "tests.reward_check.test_check_reward:Unbuildable"},
]


class Unbuildable:
    """Its weights are missing."""

    def __init__(self) -> None:
        raise RuntimeError("no weights")

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        raise AssertionError


def test_rewards_are_compared_with_each_other() -> None:
    found = check_rewards(SEVERAL, SAMPLES, device="cpu")
    assert [one.name for one in found.rewards] == [
        "jpeg #1",
        "jpeg #2",
        "standardise",
        *(c["component"] for c in SEVERAL[3:]),
    ]
    assert [one.passed for one in found.rewards] == [True, True, True, False, False]
    assert finding(found.rewards[0], "with jpeg #2").value == pytest.approx(-1.0)
    mine, jpeg = (torch.tensor(found.rewards[i].values) for i in (2, 0))
    assert finding(found.rewards[2], "with jpeg #1").value == spearman(mine, jpeg)
    assert mine.mean() == pytest.approx(0.0, abs=1e-6), "it learned its statistics from the samples"
    assert [check.name for check in found.rewards[4].checks] == ["build"]
    assert found.rewards[4].checks[0].message == "raised RuntimeError: no weights"
    assert not found.passed


def test_json_holds_everything_and_no_nan(tmp_path: Path) -> None:
    found = check_rewards(SEVERAL, SAMPLES, device="cpu")
    write_json(tmp_path / "report.json", found.as_json())
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    back = json.loads((tmp_path / "report.json").read_text())
    assert back == found.as_json()
    assert back["format"] == "diffusion_rtb.check_reward/1"
    assert back["passed"] is False
    assert back["samples"]["shape"] == [16, 3, 32, 32]
    assert len(back["samples"]["prompts"]) == len(back["rewards"][0]["values"]) == 16
    numbers = back["rewards"][0]["statistics"]
    values = np.array(back["rewards"][0]["values"])
    assert numbers["mean"] == pytest.approx(values.mean())
    assert numbers["std"] == pytest.approx(values.std())
    quartiles = [numbers[name] for name in ("min", "quarter", "median", "three_quarters", "max")]
    assert quartiles == pytest.approx(np.quantile(values, [0, 0.25, 0.5, 0.75, 1]).tolist())
    for reward in [planted.infinite_gradient, planted.constant, planted.raises]:
        json.dumps(report(reward).as_json(), allow_nan=False)


def test_the_table_says_what_was_found() -> None:
    found = check_rewards([*SEVERAL[:1], {"component": "tests.oracles.planted_rewards:raises"}], SAMPLES, device="cpu")
    text = io.StringIO()
    show_reports(found, Console(file=text, width=160))
    assert "Samples: 16 pictures of 32 pixels" in text.getvalue()
    assert "raised ZeroDivisionError: no cats [found]" in text.getvalue()
    assert "PASS; look at: file size" in text.getvalue()
    assert "FAIL: call" in text.getvalue()


def test_nothing_is_built_while_an_argument_is_wrong() -> None:
    with pytest.raises(ValueError, match="quality is 100"):
        check_rewards([SEVERAL[4], {"component": "jpeg", "quality": 100}], SAMPLES)
    with pytest.raises(ValueError, match="at least one reward"):
        check_rewards([], SAMPLES)


def test_what_a_word_stands_for(tmp_path: Path) -> None:
    assert reward_component("jpeg") == {"component": "jpeg"}
    assert reward_component("my_module:f") == {"component": "my_module:f"}
    assert reward_component("{component: jpeg, quality: 80}") == {"component": "jpeg", "quality": 80}
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert reward_component(str(config))["component"] == "classifier"
    with pytest.raises(ValueError, match="is no YAML mapping"):
        reward_component("{component: jpeg")
    with pytest.raises((ValueError, OSError), match="nothing"):
        reward_component(str(tmp_path / "nothing.yaml"))
    words = ["my_module:f", "scale=2.0", "jpeg", "{component: jpeg, quality: 80}", "sign=incompress"]
    assert reward_components(words) == [
        {"component": "my_module:f", "scale": 2.0},
        {"component": "jpeg"},
        {"component": "jpeg", "quality": 80, "sign": "incompress"},
    ]


levels = st.lists(st.integers(0, 4), min_size=2, max_size=9)


def ranked(values: list[int]) -> list[float]:
    """Mean place, from 1, of each value's equals in the sorted list."""
    places = sorted(values)
    return [np.mean([i + 1 for i, other in enumerate(places) if other == value]) for value in values]  # type: ignore[misc]


@settings(deadline=None)
@given(levels, st.randoms(use_true_random=False))
def test_spearman_is_pearson_of_ranks(values: list[int], random: Any) -> None:
    other = [random.randrange(5) for _ in values]
    found = spearman(torch.tensor(values, dtype=torch.float32), torch.tensor(other, dtype=torch.float32))
    if len(set(values)) == 1 or len(set(other)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(ranked(values), ranked(other))[0, 1])


def test_jpeg_bits_are_those_of_the_reward() -> None:
    expected = Jpeg("incompress", unit="bits_per_pixel")(SAMPLES.images, SAMPLES.prompts)
    torch.testing.assert_close(jpeg_bits(SAMPLES.images), expected)


def test_peak_memory_sees_what_is_given_back() -> None:
    with peak_memory(torch.device("cpu")) as used:
        held = bytearray(b"x") * (96 * 2**20)
        time.sleep(0.05)
        del held
    assert 90 < used.mib < 200
