"""What cannot be a component is refused before it is called; what somebody else's code raises is one message that says where."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from diffusion_rtb.cli.main import main
from diffusion_rtb.cli.messages import EXTRAS
from diffusion_rtb.config.component_shape import Kind
from diffusion_rtb.config.components import build, describe, short_names

ROOT = Path(__file__).parents[2]

MODULE = '''
import functools
import torch

called = []

def act(images, prompts=None, *, recursive=False):
    called.append("act")

def good(images, prompts, scale=2.0):
    return scale * images.flatten(1).mean(1)

def by_keyword(images, prompts, *, scale):
    return scale * images.flatten(1).mean(1)

def anything(*args, **kwargs):
    return args[0].flatten(1).mean(1)

def with_metadata(images, prompts, metadata):
    return images.flatten(1).mean(1)

def make():
    called.append("make")
    return good

def one(images):
    called.append("one")

@torch.no_grad()
def decorated(images, prompts):
    return images.flatten(1).mean(1)

class Acts:
    """No component of any kind."""
    def __init__(self, *args, **kwargs):
        called.append("Acts")

    @staticmethod
    def check(**arguments):
        called.append("check")

class OneArgument(Acts):
    def __call__(self, images):
        called.append("call")

class NoForward(torch.nn.Module):
    def __init__(self):
        called.append("NoForward")

class Network(torch.nn.Module):
    def forward(self, images, prompts):
        return images.flatten(1).mean(1)

class OneForward(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1).mean(1)

class Static:
    @staticmethod
    def __call__(images, prompts):
        return images.flatten(1).mean(1)

class Inherited(Network):
    pass

class Judge:
    def classify(self, images, classes):
        return images

class Meta(type):
    def __call__(cls, *args):
        called.append("Meta")
        return super().__call__(*args)

class Metaclassed(metaclass=Meta):
    pass

instance, network, method = Network(), Network().eval(), Static().__call__
part = functools.partial(good, scale=4.0)
number, text = 3, "text"
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shapes.py").write_text(MODULE)
    sys.modules.pop("shapes", None)
    importlib.invalidate_caches()
    return "shapes"


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen",
        "os:system",
        "shutil:rmtree",
        "builtins:exec",
        "os.path:exists",
        "http.server:HTTPServer",
        "code:InteractiveConsole",
        "antigravity:fly_id",
        "functools:partial",
        "torch:os.system",
        "shapes:functools.partial",
    ],
)
def test_nothing_of_python_itself_is_a_component(kind: Kind, name: str, mine: str) -> None:
    sys.modules.pop("antigravity", None)
    for function in (describe, build):
        with pytest.raises(ValueError, match="a module of Python itself"):
            function({"component": name, "args": ["touch", "x"], "command": "touch x"}, kind)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize(
    "name",
    [
        "make",
        "one",
        "Acts",
        "OneArgument",
        "NoForward",
        "OneForward",
        "Metaclassed",
        "number",
        "text",
        "torch",
    ],
)
def test_what_has_another_shape_is_not_even_called(kind: Kind, name: str, mine: str) -> None:
    if kind == "embedder" and name in ("one", "OneForward"):
        assert describe({"component": f"{mine}:{name}"}, kind).kind == kind
        return
    for function in (describe, build):
        with pytest.raises(ValueError, match=f"shapes:{name}'"):
            function({"component": f"{mine}:{name}"}, kind)
    assert importlib.import_module("shapes").called == []


@pytest.mark.parametrize(
    "name", ["good", "decorated", "Network", "Inherited", "Static", "instance", "network", "method", "part"]
)
def test_every_form_of_reward_is_taken(name: str, mine: str) -> None:
    reward = build({"component": f"{mine}:{name}"}, "reward")
    scale = {"good": 2.0, "part": 4.0}.get(name, 1.0)
    assert reward(torch.full((1, 3, 2, 2), 0.25), ["a"]).tolist() == [0.25 * scale]


def test_a_function_gets_its_arguments(mine: str) -> None:
    reward = build({"component": f"{mine}:by_keyword", "scale": 4}, "reward")
    assert reward(torch.full((1, 3, 2, 2), 0.25), ["a"]).tolist() == [1.0]


def test_a_made_reward_takes_no_arguments(mine: str) -> None:
    with pytest.raises(ValueError, match=r"shapes:instance' is made already and takes no arguments, got 'scale'"):
        describe({"component": f"{mine}:instance", "scale": 2}, "reward")


def test_a_factory_is_told_what_to_do(mine: str) -> None:
    with pytest.raises(
        ValueError, match=r"takes \(\), and a reward is called with \(images, prompts\).*`reward = make\(\)`"
    ):
        describe({"component": f"{mine}:make"}, "reward")


def test_the_kinds_are_not_mixed_up() -> None:
    for kind in get_args(Kind):
        for other in set(get_args(Kind)) - {kind}:
            for path in list(short_names(other).values())[:2]:
                if (kind, other) in {("reward", "objective"), ("reward", "embedder")}:
                    continue  # callable with two arguments; what embeds is on the shelf of rewards
                with pytest.raises(ValueError, match=f"it is no {kind}|an {kind} is called with"):
                    describe({"component": path}, kind)


FAULTS = {
    "missing": ("import not_there_xyz\n", "ModuleNotFoundError: No module named 'not_there_xyz'", 1),
    "syntax": ("def r(images, prompts:\n    return 1\n", "SyntaxError", 1),
    "name": ("\nundefined_name\n", "NameError: name 'undefined_name' is not defined", 2),
    "assertion": ("\n\nassert False\n", "AssertionError", 3),
    "exit": ("import sys\nsys.exit(3)\n", "tried to end the program (SystemExit: 3)", 2),
    "division": ("1 / 0\n", "ZeroDivisionError: division by zero", 1),
    "own": ("class Odd(Exception): pass\nraise Odd('words of its own')\n", "Odd: words of its own", 2),
    "group": ("raise ExceptionGroup('several', [KeyError(1)])\n", "several", 1),
    "value": ("raise ValueError('say why')\n", "say why", 1),
}

CONSTRUCTORS = {
    "key": ("{}['x']", "KeyError: 'x'"),
    "index": ("[][1]", "IndexError: list index out of range"),
    "attribute": ("self.nothing", "AttributeError: 'R' object has no attribute 'nothing'"),
    "import": ("__import__('uvicorn_xyz')", "No module named 'uvicorn_xyz'"),
    "silent": ("(_ for _ in ()).throw(AssertionError)", "AssertionError"),
    "type": ("None + 1", "unsupported operand"),
    "file": ("open('/no/such/file')", "No such file or directory: '/no/such/file'"),
    "stop": ("next(iter(()))", "StopIteration"),
}

CONFIG = {
    "prior": {"component": "gaussian", "steps": 3, "mean": [0.0, 0.0], "covariance": [[1.0, 0.0], [0.0, 1.0]]},
    "reward": {"component": "faulty:R"},
    "beta": 1.0,
    "prompts": {"list": [""]},
    "train": {"iterations": 1, "prompts_per_iteration": 1, "group": 2, "micro_batch": 2},
}


@pytest.fixture
def failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, list[str]], tuple[int, str]]:
    """Run a command with this text as the module `faulty`; its exit code and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    (tmp_path / "c.yaml").write_text(json.dumps(CONFIG))

    def run(text: str, argv: list[str]) -> tuple[int, str]:
        (tmp_path / "faulty.py").write_text(text)
        sys.modules.pop("faulty", None)
        importlib.invalidate_caches()
        with pytest.raises(SystemExit) as left:
            main(argv)
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        assert isinstance(left.value.code, int)
        return left.value.code, said.err

    return run


COMMANDS = [
    ["train", "c.yaml"],
    ["config", "c.yaml"],
    ["check-reward", "c.yaml", "--dim", "2"],
    ["serve-reward", "--reward", "faulty:R"],
]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: argv[0])
def test_a_module_that_fails_is_named(
    fault: str, argv: list[str], failing: Callable[[str, list[str]], tuple[int, str]], tmp_path: Path
) -> None:
    text, expected, line = FAULTS[fault]
    code, said = failing(text, argv)
    assert code in (1, 2)
    assert expected in said
    assert "component 'faulty:R'" in said
    assert f"{tmp_path / 'faulty.py'}, line {line}" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("fault", CONSTRUCTORS)
def test_a_constructor_that_fails_is_named(
    fault: str, failing: Callable[[str, list[str]], tuple[int, str]], tmp_path: Path
) -> None:
    text, expected = CONSTRUCTORS[fault]
    source = f"class R:\n    def __init__(self):\n        {text}\n    def __call__(self, images, prompts):\n        return images\n"
    code, said = failing(source, ["train", "c.yaml"])
    assert code == 1
    assert expected in said
    assert "reward 'faulty:R'" in said
    assert f"{tmp_path / 'faulty.py'}, line 3)" in said
    assert not list((tmp_path / "runs").glob("*"))


def test_a_reward_that_fails_while_it_trains_is_named(
    failing: Callable[[str, list[str]], tuple[int, str]], tmp_path: Path
) -> None:
    code, said = failing("def R(images, prompts):\n    return {}['x']\n", ["train", "c.yaml"])
    assert code == 1
    assert "Reward 'R' on vectors 0 to 1" in said
    assert "raised KeyError: 'x'" in said
    assert f"{tmp_path / 'faulty.py'}, line 2" in said


def test_a_missing_package_is_told_by_its_extra(
    failing: Callable[[str, list[str]], tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS.values()) <= set(extras)
    monkeypatch.setitem(sys.modules, "rapidocr_onnxruntime", None)  # as Python itself marks what cannot be imported
    _, said = failing("import rapidocr_onnxruntime\n", ["train", "c.yaml"])
    assert "pip install 'diffusion-rtb[ocr]'" in said


def test_a_fault_of_our_own_says_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("diffusion_rtb.cli.main.config_text", lambda run: dict[str, str]()["unforeseen"])  # a bug
    with pytest.raises(SystemExit) as left:
        main(["config", str(ROOT / "configs" / "quickstart.yaml")])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert "error: KeyError: 'unforeseen'" in said
    assert "test_component_shape.py, line" in said
    assert "this may be a fault of diffusion-rtb; --traceback shows where" in said
    with pytest.raises(KeyError):
        main(["config", str(ROOT / "configs" / "quickstart.yaml"), "--traceback"])
