"""The shape of the packages: imports point one way, importing is cheap, and what the house rules forbid is absent."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import diffusion_rtb
from diffusion_rtb.config.components import Kind, short_names

ROOT = Path(__file__).parents[1]

FORBIDDEN = {
    "diffusion_rtb": {"pipelines", "rewards", "train", "eval", "tests"},
    "pipelines": {"rewards", "train", "eval", "tests"},
    "rewards": {"pipelines", "train", "eval", "tests"},
}

PACKAGES = sorted(FORBIDDEN)
SCRIPTS = ["train.py", "eval.py"]


def _files(*names: str) -> list[Path]:
    found = [
        path for name in names for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    return sorted(found)


def _heads(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """First part of every imported name, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0], node.lineno


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    for path in _files(package):
        for head, line in _heads(ast.parse(path.read_text(encoding="utf-8"))):
            assert head not in FORBIDDEN[package], f"{path.relative_to(ROOT)}:{line} imports {head}"


def test_the_rule_would_catch_an_import() -> None:
    source = "def f():\n    from rewards.jpeg import Jpeg\n    import pipelines.emoji as e"
    assert {head for head, _ in _heads(ast.parse(source))} == {"rewards", "pipelines"}


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_imports_no_pipelines() -> None:
    heavy = {"diffusers", "transformers", "accelerate", "open_clip", "torchvision", "matplotlib"}
    names = ", ".join(diffusion_rtb.__all__)
    assert not heavy & _loaded_by(f"from diffusion_rtb import {names}")


def test_help_does_not_wait_for_torch() -> None:
    assert "torch" not in _loaded_by("import diffusion_rtb.cli.main")


def test_the_public_face_is_small_and_real() -> None:
    assert len(diffusion_rtb.__all__) <= 12
    for name in diffusion_rtb.__all__:
        assert getattr(diffusion_rtb, name).__module__.startswith("diffusion_rtb")
    assert set(diffusion_rtb.__all__) <= set(dir(diffusion_rtb))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffusion_rtb.nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_one_version() -> None:
    try:
        installed = version("diffusion-rtb")
    except PackageNotFoundError:
        pytest.skip("not installed: run from a clone")
    assert installed == diffusion_rtb.__version__


LAYERS = (
    {
        "abilities",
        "config",
        "densities",
        "estimates",
        "files",
        "interfaces",
        "needs",
        "not_finite",
        "resampling",
        "schedulers",
        "versions",
    },
    {"beta", "chain", "exact", "objectives", "out_of_memory", "reach", "scoring"},
    {"remote_reward", "run", "sampling"},
    {"steering"},
    {"behaviours", "evaluation", "reward_check"},
    {"report", "training"},
    {"benchmark", "comparison", "doctor", "sweep"},
    {"cli"},
)
"""Rooms of `diffusion_rtb/`, folders and files on the ground, floor by floor: a room imports only from floors below its own."""

SHELVES = {
    "pipelines",
    "rewards",
    "rewards/embedders",
    "diffusion_rtb/objectives",
    "diffusion_rtb/behaviours",
    "diffusion_rtb/evaluation/metrics",
    "diffusion_rtb/steering",
}
LARGEST_FOLDER = 14
LONGEST_CHAIN, LONGEST_CHAIN_WITH_LAZY = 10, 13


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _imports(*packages: str, lazy: bool = True) -> dict[str, set[str]]:
    """Modules of these packages, and which of them each imports; `lazy`: inside functions too."""
    files = {_module(path): path for path in _files(*packages)}
    graph: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        for node in _statements(ast.parse(path.read_text(encoding="utf-8")), lazy):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"  # `from package import module` imports the module
                name = inner if inner in files else str(node.module)
                graph[module] |= {name} & files.keys() - {module}
    return graph


def _statements(node: ast.AST, lazy: bool) -> Iterator[ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom) and child.level == 0:
            yield child
        for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if not for_types and (lazy or not isinstance(child, ast.FunctionDef)):
            yield from _statements(child, lazy)


def _above(graph: dict[str, set[str]]) -> list[str]:
    """Imports that do not point down."""
    floor = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if _room(module) != _room(other)
        and "diffusion_rtb" not in (module, other)  # the face: it imports when a name is first used
        and floor[_room(other)] >= floor[_room(module)]
    ]


def test_every_room_imports_only_from_floors_below() -> None:
    graph = _imports("diffusion_rtb")
    assert {_room(module) for module in graph} - {"diffusion_rtb"} == set().union(*LAYERS)
    assert _above(graph) == []


def test_the_floors_would_catch_an_import() -> None:
    assert _above({"diffusion_rtb.run.folder": {"diffusion_rtb.training.trainer"}})
    assert _above({"diffusion_rtb.chain.recorder": {"diffusion_rtb.scoring.call"}})  # neighbours do not know each other
    assert not _above({"diffusion_rtb.training.trainer": {"diffusion_rtb.run.folder", "diffusion_rtb"}})


def test_nothing_imports_the_commands() -> None:
    users = {module for module, others in _imports(*PACKAGES).items() if any(_room(other) == "cli" for other in others)}
    assert {_room(module) for module in users} <= {"cli"}


def test_folders_hold_what_one_can_look_over() -> None:
    for folder in {path.parent for path in _files(*PACKAGES)}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert folder.relative_to(ROOT).as_posix() in SHELVES or len(modules) <= LARGEST_FOLDER, folder


def _longest(graph: dict[str, set[str]]) -> list[str]:
    """The longest way along imports."""

    @functools.cache
    def ahead(module: str) -> list[str]:
        return [module, *max((ahead(other) for other in graph[module]), key=len, default=[])]

    return max((ahead(module) for module in graph), key=len)


@pytest.mark.parametrize(("lazy", "most"), [(False, LONGEST_CHAIN), (True, LONGEST_CHAIN_WITH_LAZY)])
def test_the_way_along_imports_is_short(lazy: bool, most: int) -> None:
    chain = _longest(_imports(*PACKAGES, lazy=lazy))  # a circle would not end
    assert len(chain) <= most, " > ".join(chain)


@pytest.mark.parametrize(
    ("kind", "shelf"),
    [
        ("prior", "pipelines"),
        ("reward", "rewards"),
        ("embedder", "rewards/embedders"),
        ("objective", "diffusion_rtb/objectives"),
        ("metric", "diffusion_rtb/evaluation/metrics"),
        ("behaviour", "diffusion_rtb/behaviours"),
        ("steering", "diffusion_rtb/steering"),
    ],
)
def test_shelves_hold_only_what_a_config_can_name(kind: Kind, shelf: str) -> None:
    on_shelf = {path.stem for path in (ROOT / shelf).glob("*.py") if not path.name.startswith("_")}
    assert on_shelf <= set(short_names(kind))


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", _files(*PACKAGES, *SCRIPTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_house_rules(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "the module has no docstring"
    for public in _public(tree):
        assert ast.get_docstring(public), f"{public.name} has no docstring"
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {"print", "eval", "exec"} & calls
    assert not {call for call in calls if call.endswith(".cuda")}, "device comes from the data or the config"
    # Naming the exception that a refused file raises is not using pickle.
    unpickling = {"pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "pickle.Unpickler", "pickle.Pickler"}
    assert not unpickling & calls
    assert not {"dill", "joblib", "shelve", "cloudpickle"} & {head for head, _ in _heads(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert arguments.get("weights_only") == "True", f"line {node.lineno}: torch.load unpickles"


# Sizes are aims; the limits here are where a file or function has outgrown them.
LONGEST_FILE, LONGEST_FUNCTION = 330, 45


@pytest.mark.parametrize("path", _files(*PACKAGES, *SCRIPTS), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_FILE
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef):
            assert _code_lines(node, lines) <= LONGEST_FUNCTION, f"{node.name}, line {node.lineno}"


def _code_lines(node: ast.FunctionDef, lines: list[str]) -> int:
    """Lines of a function's body without blank lines, comments and its docstring."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not body:
        return 0
    block = lines[body[0].lineno - 1 : body[-1].end_lineno]
    return sum(1 for line in block if line.strip() and not line.strip().startswith("#"))


def test_no_file_names_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone")
    home = re.compile(r"(?<![\w.])/(root|home/\w+|work)/")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ""} and path.is_file() and path != Path(__file__):
            text = path.read_bytes().decode("utf-8", errors="ignore")
            assert not home.search(text), name


PLUG_INS = {
    "objective",
    "reward",
    "prior",
    "embedder",
    "labeller",
    "judge",
    "part",
    "inner",
    "plug_in",
    "behaviour",
    "source",
}

LOOKED_FOR_ELSEWHERE = {
    "diffusion_rtb/scoring/metadata.py": "the call of a torch module is its forward",
    "diffusion_rtb/run/members.py": "checks the optional members of priors",
}
"""Files that read an attribute of a plug-in with a default; `abilities.py` is where that belongs."""


def _guesses(tree: ast.AST) -> Iterator[int]:
    """Lines that ask a plug-in for an attribute which it may lack."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (ast.unparse(node.func), len(node.args)) in {("getattr", 3), ("hasattr", 2)}:
            asked, name = ast.unparse(node.args[0]).split(".")[-1], ast.unparse(node.args[1])
            if asked in PLUG_INS and not name.startswith("'__"):
                yield node.lineno


def test_what_a_plug_in_can_do_is_asked_in_one_place() -> None:
    paths = _files(*PACKAGES)
    found = {path.relative_to(ROOT).as_posix() for path in paths if [*_guesses(ast.parse(path.read_text("utf-8")))]}
    assert found - {"diffusion_rtb/abilities.py"} <= LOOKED_FOR_ELSEWHERE.keys()


def test_a_guess_would_be_seen() -> None:
    source = "getattr(self.objective, 'clip_range', None)\nhasattr(reward, 'embed')\ngetattr(scheduler, 'order', 1)"
    assert [*_guesses(ast.parse(source))] == [1, 2]
