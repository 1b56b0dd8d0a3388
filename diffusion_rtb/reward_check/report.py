"""Is this reward fit for training? Every check before a GPU-hour is spent, as a report.

report = check_rewards([{"component": "clip_score"}], standard_samples())
show_reports(report, Console())         # diffusion_rtb/reward_check/terminal.py
report.passed
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion_rtb.config.components import describe
from diffusion_rtb.reward_check import checks
from diffusion_rtb.reward_check import pixel_checks as pixels
from diffusion_rtb.reward_check.measures import brightness, jpeg_bits, peak_memory
from diffusion_rtb.reward_check.samples import Samples
from diffusion_rtb.reward_check.subject import Broken, Check, Limits, Subject
from diffusion_rtb.run.process_state import accelerator
from diffusion_rtb.scoring.memory import observing, stateful_rewards
from diffusion_rtb.scoring.prompts import check_component_prompts, check_reward_prompts
from diffusion_rtb.scoring.remedies import other_form, remedy

__all__ = ["Report", "Reports", "check_reward", "check_rewards", "reward_component", "reward_components"]

NOT_REACHED = "not reached"
"""What is said of checks that an earlier fault leaves without an answer."""

AFTER_CALL: Mapping[str, Callable[[Subject], Check]] = {
    "spread": checks.check_spread,
    "repeat": checks.check_repeat,
    "one by one": checks.check_one_by_one,
    "order": checks.check_order,
    "prompts": checks.check_prompts,
    "broken": checks.check_broken,
    "levels": pixels.check_levels,
    "precision": checks.check_precision,
    "device": lambda subject: checks.check_device(subject, _other_device(subject.images.device)),
    "gradient": pixels.check_gradient,
    "speed": checks.check_speed,
    "file size": partial(pixels.check_cheap, "file size", jpeg_bits),
    "brightness": partial(pixels.check_cheap, "brightness", brightness),
}
"""The checks that need a first call; speed comes after those that call the reward on the clock."""


@dataclass(frozen=True, eq=False)
class Report:
    """What was found about one reward."""

    name: str
    checks: list[Check]
    values: list[float]
    """Of each sample; empty if the reward could not be called."""

    @property
    def passed(self) -> bool:
        """No check failed; warnings do not count."""
        return not any(check.status == "fail" for check in self.checks)

    @property
    def warned(self) -> bool:
        return any(check.status == "warn" for check in self.checks)

    def statistics(self) -> dict[str, float]:
        """Mean, standard deviation and quartiles of the values; empty without values."""
        if not self.values:
            return {}
        values = torch.tensor(self.values, dtype=torch.float64)
        names, at = ("min", "quarter", "median", "three_quarters", "max"), torch.linspace(0, 1, 5, dtype=torch.float64)
        spread = {"mean": float(values.mean()), "std": float(values.std(correction=0))}
        return spread | dict(zip(names, values.quantile(at).tolist(), strict=True))

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps(..., allow_nan=False)`."""
        found = [asdict(check) for check in self.checks]
        return {
            "name": self.name, "passed": self.passed, "statistics": self.statistics(), "checks": found, "values": self.values,
        }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reports:
    """What was found about some rewards on the same samples."""

    samples: Samples
    rewards: list[Report]

    @property
    def passed(self) -> bool:
        """No check of any reward failed."""
        return all(report.passed for report in self.rewards)

    @property
    def warned(self) -> bool:
        return any(report.warned for report in self.rewards)

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps(..., allow_nan=False)`."""
        samples = {
            "source": self.samples.source,
            "shape": list(self.samples.images.shape),
            "prompts": self.samples.prompts,
        }
        return {
            "format": "diffusion_rtb.check_reward/1",
            "passed": self.passed,
            "samples": samples,
            "rewards": [report.as_json() for report in self.rewards],
        }


def reward_component(text: str) -> dict[str, Any]:
    """The component that a word of the command line stands for.

    Args:
        text: A reward's name, `module:attribute`, `{component: NAME, argument: value}` in YAML, or a config file or a run's
            folder, for the reward in it.

    Raises:
        ValueError: the YAML or the config is wrong.
    """
    if text.lstrip().startswith("{"):
        import yaml

        from diffusion_rtb.config.yaml_text import read_yaml

        try:
            found = read_yaml(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{text!r} is no YAML mapping: {error}") from None
        return dict(found)
    if Path(text).suffix in (".yaml", ".yml") or Path(text).is_dir():
        from diffusion_rtb.config.load import load_config

        return load_config(Path(text)).reward.model_dump()
    return {"component": text}


def reward_components(words: Sequence[str]) -> list[dict[str, Any]]:
    """The components that the words of a command line stand for; `key=value` is an argument of the reward before it.

    Raises:
        ValueError: an argument comes first, or its reward has it already; see `reward_component`.
    """
    from diffusion_rtb.config.yaml_text import with_arguments

    found: list[dict[str, Any]] = []
    for word in words:
        key, equals, _ = word.partition("=")
        if not (equals and key.isidentifier()) or Path(word).exists():
            found.append(reward_component(word))
        elif found:
            found[-1] = with_arguments(found[-1], [word])
        else:
            raise ValueError(
                f"{word!r} is an argument of a reward, and no reward stands before it: check-reward NAME {word}."
            )
    return found


def check_rewards(
    components: Sequence[Mapping[str, Any]],
    samples: Samples,
    limits: Limits | None = None,
    *,
    device: torch.device | str | None = None,
) -> Reports:
    """Check rewards on the same samples, and how they go along with each other.

    Args:
        components: `{component: NAME, argument: value}` each; all are checked before the first is built.
        samples: What they are asked about.
        limits: From where on a finding is bad.
        device: Where the samples are; None: on the accelerator, or the CPU where there is none.

    Raises:
        ValueError: no components, or one that does not exist or has bad arguments.
    """
    if not components:
        raise ValueError("Name at least one reward to check.")
    checked = [describe(component, "reward") for component in components]
    names = _distinct([str(component["component"]) for component in components])
    found: list[Report] = []
    for name, component, described in zip(names, components, checked, strict=True):
        try:
            unfit = _unfit(samples, partial(check_component_prompts, component))
            reward = None if unfit else described.build()
            unfit = unfit or _unfit(samples, partial(check_reward_prompts, reward, name=name))
        except Exception as error:  # noqa: BLE001 — a reward that cannot be built is a finding, beside those of the others
            found.append(Report(name, [Check("build", "fail", f"raised {type(error).__name__}: {error}")], []))
            continue
        if unfit:
            found.append(Report(name, [Check("prompts", "fail", unfit)], []))
        else:
            found.append(check_reward(reward, samples, limits, name=name, device=device))
    return Reports(samples, [_with_others(report, found) for report in found])


def _unfit(samples: Samples, check: Callable[..., None]) -> str | None:
    """What a reward says against the samples' prompts."""
    texts = list(dict.fromkeys(samples.prompts))
    try:
        check(prompts=texts, metadata=[samples.metadata.get(text, {}) for text in texts])
    except ValueError as error:
        return f"{error} Prompts of your own: --prompt, --prompt-file, --images or --prior."
    return None


def check_reward(
    reward: Any,
    samples: Samples,
    limits: Limits | None = None,
    *,
    name: str = "reward",
    device: torch.device | str | None = None,
    only: Collection[str] = tuple(AFTER_CALL),
) -> Report:
    """Check a reward, whatever callable it is, on samples; see `diffusion_rtb/reward_check/checks.py` for what is checked.

    A reward that learns statistics while training (`standardise`) learns them from the samples first. The first call is always
    looked at, and of `AFTER_CALL` `only` these.
    """
    here = torch.device(device) if device is not None else accelerator() or torch.device("cpu")
    images, prompts = samples.images.to(here), list(samples.prompts)
    subject = Subject(reward, images, prompts, limits or Limits(), metadata=samples.metadata)
    with checks.settings_kept():
        return Report(name, _findings(subject, only), subject.values.tolist())


def _findings(subject: Subject, only: Collection[str]) -> list[Check]:
    reward, here = subject.reward, subject.images.device
    try:
        if stateful_rewards(reward):
            with observing(reward):
                subject.ask(subject.images, subject.prompts)
        with peak_memory(here) as memory:
            found = checks.check_calls(subject)
    except Broken as problem:
        names = ["output", "finite", "input", "settings", *only, "memory"]
        rest = [Check(other, "skip", NOT_REACHED) for other in names if other != problem.name]
        said, cause = str(problem), problem.__cause__
        if cause is not None and not remedy(cause, reward):  # the exception itself does not say why
            said += other_form(reward, subject.images, subject.prompts)
        return [Check(problem.name, "fail", said), *rest]
    found += [_guarded(other, check, subject) for other, check in AFTER_CALL.items() if other in only]
    found.append(checks.check_memory(subject, memory.mib, memory.what))
    return found


def _guarded(name: str, check: Callable[[Subject], Check], subject: Subject) -> Check:
    """What a check finds; a call that goes wrong in it is that."""
    try:
        return check(subject)
    except Broken as problem:
        return Check(name, "fail", str(problem))


def _other_device(here: torch.device) -> torch.device | None:
    """The CPU for an accelerator, an accelerator for the CPU, None if there is none."""
    return accelerator() if here.type == "cpu" else torch.device("cpu")


def _distinct(names: Sequence[str]) -> list[str]:
    """Names, a repeated one with its number."""
    return [name if names.count(name) == 1 else f"{name} #{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def _with_others(report: Report, reports: Sequence[Report]) -> Report:
    """The report with rank correlations of its values with those of the other rewards."""
    if not report.values:
        return report
    others = [other for other in reports if other is not report and other.values]
    mine = torch.tensor(report.values)
    more = [pixels.check_along(f"with {other.name}", mine, torch.tensor(other.values)) for other in others]
    return Report(report.name, [*report.checks, *more], report.values)
