"""Components by name: what exists is found, what does not is answered with the nearest, arguments are checked first."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from diffusion_rtb import objectives
from diffusion_rtb.config import components as module
from diffusion_rtb.config.components import Kind, build, describe, locate, short_names
from diffusion_rtb.config.load import Component
from diffusion_rtb.objectives.rtb import RTB

ROOT = Path(__file__).parents[2]

BRIGHTNESS = """
from typing import Literal, TypedDict, Unpack

def brightness(images, prompts, scale: float = 1.0):
    return scale * images.flatten(1).mean(1)

class Brightness:
    loaded = 0

    def __init__(self, scale: float, channels: tuple[int, ...] = (0, 1, 2), mode: Literal["mean", "max"] = "mean",
                 device: str = "cpu") -> None:
        if scale == 0:
            raise ValueError("scale is 0: every image would have the same reward. Use a positive one.")
        self.scale, self.channels, self.mode, self.device = scale, channels, mode, device

    def load_weights(self):
        Brightness.loaded += 1

    def __call__(self, images, prompts):
        return self.scale * images[:, list(self.channels)].flatten(1).mean(1)

class Old:
    @staticmethod
    def check(**arguments):
        raise AssertionError

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)

class OnePhase:
    constructed = 0

    def __init__(self, weights: str) -> None:
        OnePhase.constructed += 1

    def __call__(self, images, prompts):
        return images.flatten(1).mean(1)

class Settings(TypedDict, total=False):
    channels: tuple[int, ...]
    mode: Literal["mean", "max"]

class Warmth(Brightness):
    def __init__(self, blue: float = 0.5, **settings: Unpack[Settings]) -> None:
        super().__init__(1 - blue, **settings)

NOT_CALLABLE = 3
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Write a module of the user's own into the working directory and return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    return write


def test_every_file_is_found_by_its_name() -> None:
    assert locate("rtb", "objective") is RTB
    assert set(short_names("objective")) >= {"rtb", "trust_pcl"}
    assert set(short_names("reward")) >= {"clip_score", "jpeg", "classifier", "weighted_sum"}
    assert set(short_names("prior")) >= {"stable_diffusion"}


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_short_name_is_the_first_public_class_of_its_file(kind: Kind) -> None:
    for name, path in short_names(kind).items():
        file, _, attribute = path.partition(":")
        found = locate(name, kind)
        assert found is locate(path)
        assert found.__module__.startswith(file)
        assert attribute in importlib.import_module(file).__all__
        assert file.rpartition(".")[2] == name


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_helper_is_no_component(kind: Kind) -> None:
    assert not [name for name in short_names(kind) if name.startswith("_")]
    with pytest.raises(ValueError, match=f"There is no {kind} named '_blip'"):
        locate("_blip", kind)


def test_a_hyphen_reads_like_an_underscore() -> None:
    assert locate("trust-pcl", "objective") is locate("trust_pcl", "objective")


def test_an_own_file_goes_by_its_path(mine: Callable[[str, str], str]) -> None:
    mine("my_rewards", BRIGHTNESS)
    reward = build({"component": "my_rewards:Brightness", "scale": 2}, "reward")
    assert reward(torch.full((2, 3, 4, 4), 0.25), ["a", "b"]).tolist() == [0.5, 0.5]


def test_a_plain_function_is_a_reward(mine: Callable[[str, str], str]) -> None:
    mine("my_functions", BRIGHTNESS)
    reward = build({"component": "my_functions:brightness", "scale": 4}, "reward")
    assert reward(torch.full((1, 3, 4, 4), 0.25), ["a"]).tolist() == [1.0]
    assert reward.__name__ == "brightness"
    with pytest.raises(ValueError, match="no argument 'images'"):
        describe({"component": "my_functions:brightness", "images": 1}, "reward")


def test_a_config_and_a_plain_dict_build_the_same() -> None:
    arguments = {"component": "rtb", "log_z": "per_prompt", "huber_delta": 2}
    a, b = build(arguments, "objective"), build(Component.model_validate(arguments), "objective")
    assert type(a) is type(b) is RTB
    assert type(a.log_z) is type(b.log_z)


def test_an_entry_point_of_an_installed_package_is_found(mine: Callable[[str, str], str], tmp_path: Path) -> None:
    mine("their_rewards", BRIGHTNESS)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[diffusion_rtb.rewards]\nbrightness = their_rewards:Brightness\n")
    importlib.invalidate_caches()
    assert locate("brightness", "reward").__name__ == "Brightness"


SHELF = Path(objectives.__file__).parent
OBJECTIVES = ", ".join(sorted(file.stem for file in SHELF.glob("*.py") if not file.stem.startswith("_")))


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        (
            "rtv",
            "objective",
            f"There is no objective named 'rtv'. Did you mean 'rtb'? Known: {OBJECTIVES}.",
        ),
        ("zzzz", "objective", f"Known: {OBJECTIVES}."),
        ("rtb", "reward", "There is no reward named 'rtb'."),
        ("rtb", None, "'rtb' is not of the form 'module:attribute'"),
        ("diffusion_rtb.objectives.rtb:RTBB", None, "has ['RTB', 'rtb_residual'], not 'RTBB'. Did you mean 'RTB'?"),
        ("diffusion_rtb.objectives.rtb:", None, "not ''"),
        ("diffusion_rtb.objectives.rbt:RTB", None, "no module 'diffusion_rtb.objectives.rbt'. Did you mean"),
        ("nowhere_at_all:X", None, "must lie in the working directory, on PYTHONPATH, or be installed"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_what_does(name: str, kind: Kind | None, expected: str) -> None:
    with pytest.raises(ValueError, match=r"rtv|zzzz|rtb|RTB|nowhere") as error:
        locate(name, kind)
    assert expected in str(error.value)


def test_a_missing_library_inside_a_component_is_told_as_it_is(mine: Callable[[str, str], str]) -> None:
    mine("needs_more", "import a_library_nobody_has\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_nobody_has"):
        locate("needs_more:X")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"scal": 1.0}, "has no argument 'scal'. Did you mean 'scale'? It has: scale, channels, mode, device."),
        ({}, "needs 'scale': add `scale: ...` to it."),
        ({"scale": "much"}, "argument 'scale': got 'much' (str)."),
        ({"scale": 1.0, "channels": "red"}, "argument 'channels': got 'red' (str)."),
        ({"scale": 1.0, "mode": "median"}, "Input should be 'mean' or 'max'."),
        ({"scale": 0}, "scale is 0: every image would have the same reward."),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(
    mine: Callable[[str, str], str], arguments: dict[str, object], expected: str
) -> None:
    mine("checked_rewards", BRIGHTNESS)
    component = {"component": "checked_rewards:Brightness", **arguments}
    for attempt in (describe, build):
        with pytest.raises(ValueError, match=r"scal|channels|mode") as error:
            attempt(component, "reward")
        assert expected in str(error.value)
    assert locate("checked_rewards:Brightness").loaded == 0


def test_arguments_that_a_class_hands_on_are_checked_too(mine: Callable[[str, str], str]) -> None:
    warmth = {"component": f"{mine('handed_on', BRIGHTNESS)}:Warmth"}
    assert describe(warmth | {"blue": 0.25, "channels": [0]}, "reward").construct().channels == (0,)
    for given, expected in (
        ({"mode": "median"}, "argument 'mode': got 'median' (str)"),
        ({"channel": [0]}, "no argument 'channel'. Did you mean 'channels'? It has: blue, channels, mode."),
        ({"scale": 1.0}, "no argument 'scale'"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            describe(warmth | given, "reward")


def test_weights_are_loaded_once_and_last(mine: Callable[[str, str], str]) -> None:
    mine("phases", BRIGHTNESS)
    described = describe({"component": "phases:Brightness", "scale": 2.0}, "reward")
    assert (described.construct().scale, locate("phases:Brightness").loaded) == (2.0, 0)
    assert described.build() is described.build() is described.construct()
    assert locate("phases:Brightness").loaded == 1
    plain = describe({"component": "phases:OnePhase", "weights": "large.pt"}, "reward")
    assert locate("phases:OnePhase").constructed == 0
    assert type(plain.build()) is locate("phases:OnePhase")
    assert locate("phases:OnePhase").constructed == 1


def test_a_static_check_is_told_where_it_goes(mine: Callable[[str, str], str]) -> None:
    mine("old_ways", BRIGHTNESS)
    with pytest.raises(ValueError, match=r"let the constructor raise its ValueErrors.* load_weights\(self\)"):
        describe({"component": "old_ways:Old"}, "reward")


def test_arguments_are_converted_to_their_annotation(mine: Callable[[str, str], str]) -> None:
    mine("typed_rewards", BRIGHTNESS)
    component = {"component": "typed_rewards:Brightness", "scale": 1, "channels": [0, 2]}
    reward = build(component, "reward")
    assert (reward.scale, type(reward.scale), reward.channels) == (1.0, float, (0, 2))


@pytest.mark.parametrize("component", [{"scale": 1.0}, {"component": 3}, {}])
def test_what_is_not_a_component_shows_how_one_is_written(component: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"is written `\{component: NAME"):
        build(component, "objective")


def test_what_cannot_be_constructed_is_refused(mine: Callable[[str, str], str]) -> None:
    mine("odd_rewards", BRIGHTNESS)
    with pytest.raises(ValueError, match="is of type int: name a class or a function"):
        build({"component": "odd_rewards:NOT_CALLABLE"}, "reward")


def test_files_are_listed_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shelf"
    package.mkdir()
    (package / "__init__.py").touch()
    body = "__all__ = ['helper', 'Mine']\nraise RuntimeError\ndef helper(): ...\nclass Mine:\n    def __call__(self): ...\n"
    (package / "mine.py").write_text(body)
    (package / "_private.py").write_text("class A: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = module._files("shelf")
    assert found == {"mine": "shelf.mine:Mine"}
