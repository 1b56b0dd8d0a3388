"""Configs: closed, frozen, readable errors, complete when saved, and every field of them is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from diffusion_rtb.config.load import (
    ConfigError,
    RunConfig,
    TrainConfig,
    config_diff,
    config_schema,
    config_text,
    field_types,
    load_config,
)
from diffusion_rtb.config.yaml_text import read_yaml, write_yaml
from diffusion_rtb.run.folder import open_run
from tests.oracles.reads import fields_read

ROOT = Path(__file__).parents[2]

BASIC = """
prior: {component: stable_diffusion, path: somewhere}
reward: {component: jpeg}
beta: 1.5
prompts: {list: [a cat, a dog, a fish, a bird]}
"""


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    path = tmp_path / "basic.yaml"
    path.write_text(BASIC)
    return path


def test_defaults_and_name_are_filled_in(basic: Path) -> None:
    config = load_config(basic)
    assert (config.name, config.seed, config.objective.component, config.train.group) == ("basic", 0, "rtb", 8)
    assert config.prior.model_dump() == {"component": "stable_diffusion", "path": "somewhere"}


def test_overrides_are_yaml_and_reach_every_level(basic: Path) -> None:
    config = load_config(
        basic,
        [
            "train.lr=1e-4",
            "behaviours=[{component: on_policy, exploration: 2}, {component: replay, share: 0.25}]",
            "behaviours.on_policy.exploration=.5",
            "behaviours.1.capacity=9",
            "train.tracker=[wandb]",
            "prior.steps=20",
            "beta={value: 2.0, anneal: {start: 0.5, iterations: 5}}",
            "prompts.list.0=a horse",
            "name=2026-01-01",
        ],
    )
    assert config.train.lr == 1e-4
    assert [behaviour.model_dump() for behaviour in config.behaviours] == [
        {"component": "on_policy", "exploration": 0.5},
        {"component": "replay", "share": 0.25, "capacity": 9},
    ]
    assert config.train.tracker == ("wandb",)
    assert config.prior.model_dump()["steps"] == 20
    assert config.beta.anneal is not None
    assert (config.beta.anneal.start, config.beta.anneal.iterations) == (0.5, 5)
    assert config.prompts.texts()[0] == "a horse"
    assert config.name == "2026-01-01"
    assert load_config(basic, ["beta={value: 2.0, anneal: null}"]).beta == load_config(basic, ["beta=2"]).beta


def test_prompts_of_a_file_are_kept_beside_the_config(basic: Path, tmp_path: Path) -> None:
    (basic.parent / "prompts.txt").write_text("# four prompts\n\na cat\n  a dog \nno\n1e-3\n", encoding="utf-8")
    config = load_config(basic, ["prompts={file: prompts.txt}"])
    assert config.prompts.texts() == ("a cat", "a dog", "no", "1e-3")
    run = tmp_path / "run"
    open_run(config, run)
    (basic.parent / "prompts.txt").unlink()  # the run does not need it any more
    again = load_config(run)
    assert again.prompts.texts() == config.prompts.texts()
    assert config_diff(config, again) == {}
    assert (run / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[3] == '{"prompt": "1e-3"}'


def test_a_config_is_frozen(basic: Path) -> None:
    config = load_config(basic)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 2.0  # type: ignore[misc]
    assert isinstance(config.prompts.list, tuple)


@pytest.mark.parametrize(
    "path",
    sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "compare"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_every_config_of_the_repository_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion_rtb.run.checks import describe_components

    monkeypatch.chdir(ROOT)
    describe_components(load_config(path))


def test_a_saved_config_reads_back_equal(basic: Path, tmp_path: Path) -> None:
    config = load_config(
        basic, ["train.lr=1e-05", "eval.factors=[{name: style, classes: [a, b]}]", "eval.labeller.component=jpeg"]
    )
    open_run(config, tmp_path / "run")
    assert load_config(tmp_path / "run") == config
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NESTED = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@given(NESTED)
def test_yaml_is_written_so_that_it_reads_back(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value


@given(st.text())
def test_strings_survive_other_yaml_readers(text: str) -> None:
    assert yaml.safe_load(write_yaml({"key": text})) == {"key": text}


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("3", 3),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1.2.3", "1.2.3"),
        ("2026-01-01", "2026-01-01"),
        ("null", None),
        ("~", None),
        ("e5", "e5"),
        ("0x10", 16),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


def test_the_difference_of_two_configs_names_keys(basic: Path) -> None:
    changed = load_config(
        basic, ["train.lr=1", "reward.quality=50", "beta={value: 3.0, anneal: {start: 0.1, iterations: 2}}"]
    )
    assert config_diff(load_config(basic), changed) == {
        "reward.quality": (None, 50),
        "train.lr": (0.001, 1.0),
        "beta": (1.5, None),
        "beta.value": (None, 3.0),
        "beta.anneal.start": (None, 0.1),
        "beta.anneal.iterations": (None, 2),
    }
    assert config_diff(changed, changed) == {}


def test_the_schema_describes_every_key_and_allows_no_other() -> None:
    schema = config_schema()
    sections = {"RunConfig": schema, **schema["$defs"]}
    for name, section in sections.items():
        assert section["description"], name
        assert section.get("additionalProperties") is (name == "Component"), name
        for key, field in section["properties"].items():
            described = field.get("description") or "$ref" in field
            assert described, f"{name}.{key}"
    json.dumps(schema)


@pytest.mark.parametrize(
    "override, expected",
    [
        ("train.grup=3", "train.grup: there is no such key. Did you mean 'train.group'?"),
        ("lr=3", "lr: there is no such key. Did you mean 'train.lr'?"),
        ("behavior=0", "Did you mean 'behaviours'?"),
        ("qqq=1", "Known here: name, seed"),
        ("eval.factors=[{name: x, classes: [a, b], labls: [c, d]}]", "Did you mean 'eval.factors.labels'?"),
        ("train.lr=abc", "train.lr: got 'abc' (str). Input should be a valid number."),
        ("train.group=4.5", "train.group: got 4.5 (float). Input should be a valid integer."),
        ("train.group=true", "train.group: got True (bool)"),
        ("train=3", "train: got 3 (int). Input should be a section"),
        ("train.tracker=[wandbb]", "'tensorboard', 'wandb' or 'trackio'"),
        ("train.tracker=wandb", "train.tracker: got 'wandb' (str). Input should be a list."),
        ("train.lr=0", "greater than 0"),
        ("beta=0", "beta: got 0 (int). Input should be greater than 0."),
        ("beta=-1.5", "beta: got -1.5 (float). Input should be greater than 0."),
        ("beta=null", "beta: got None"),
        ("beta={value: 0}", "beta.value: got 0 (int). Input should be greater than 0."),
        ("beta={value: 1, anneal: {start: 0.5, iteration: 5}}", "Did you mean 'beta.anneal.iterations'?"),
        ("beta_anneal={start: 0.5, iterations: 5}", "`beta: {value: 1.5, anneal: {start: 0.5, iterations: 5}}`"),
        ("behaviour.kl_budget={nats: 3}", "Write `behaviours: []` and `beta: {value: 1.5, kl_budget: {nats: 3}}`"),
        ("beta={value: 1, anneal: {start: 0.5, iterations: 5}, kl_budget: {nats: 2.0}}", "(nats 2) both decide beta"),
        ("train.micro_batch=7", "cannot be divided by micro_batch 7; use one of [1, 2, 4, 8, 16, 32]"),
        ("behaviour.prior_share=0.25", "Write `behaviours: [{component: prior_buffer, share: 0.25}]`."),
        (
            "behaviour={exploration: {scale: 1.0, until: 80, measured: 0}, replay: {share: 0.0, capacity: 256}, kl_budget: null}",
            "Write `behaviours: [{component: on_policy, exploration: 1.0, until: 80, measured: 0}]`.",
        ),
        ("behaviour=[]", "`behaviours: [{component: NAME, share: 0.25}]`"),
        (
            "behaviours.replay.share=0.5",
            "behaviours: got {'replay': {'share': 0.5}} (dict). Input should be a list",
        ),
        ("prompts.list=[]", "prompts.list: got []"),
        ("prompts.list=[a, b, c, a]", "'a' is given more than once"),
        ("prompts.list=[a, b]", "prompts_per_iteration 4 is more than the 2 prompts"),
        ("prompts.file=x.txt", "exactly one of `list` and `file`"),
        ("prompts={file: nowhere.txt}", "there is no file 'nowhere.txt'"),
        ("prompts={file: empty.txt}", "has no prompts. Write one per line"),
        ("eval.factors=[{name: style, classes: [a, b]}]", "1 factors need a labeller"),
        (
            "eval={labeller: {component: jpeg}, factors: [{name: x, classes: [a, b], labels: [c]}]}",
            "1 labels for 2 classes",
        ),
        ("name=../elsewhere", "name: got '../elsewhere'"),
        ("reward=clip_score", "reward: got 'clip_score' (str). Input should be a section"),
        ("beta", "not of the form key.sub=value"),
        ("prompts.list=[a", "the value is not YAML"),
        ("prompts.list.7=a", "'7' is not a position in a list of 4 (0 to 3)"),
        ("beta.x=3", "beta is 1.5 and has no keys"),
    ],
)
def test_errors_name_key_value_and_remedy(basic: Path, override: str, expected: str) -> None:
    (basic.parent / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(ConfigError) as error:
        load_config(basic, [override])
    assert expected in str(error.value)
    assert override.partition("=")[0].rpartition(".")[2] in str(error.value)


def test_all_problems_are_told_at_once(basic: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)3 problems.*train\.grup.*") as error:
        load_config(basic, ["train.grup=3", "beta=-1", "seed=x"])
    assert {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]} == {"train.grup", "beta", "seed"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("- a\n- b", "must hold `key: value` lines, got list"),
        ("a: [", "is not YAML"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("", "got NoneType"),
        ("beta: 1.0", "prior: this key is required"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad") as error:
        load_config(path)
    assert expected in str(error.value)


def test_a_missing_file_names_the_nearest(basic: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean '.*basic\.yaml'"):
        load_config(basic.with_name("basik.yaml"))


def _sections(root: type[BaseModel]) -> set[type[BaseModel]]:
    return {owner for _, owner, _ in field_types(root)}


def _unread(root: type[BaseModel], sources: list[str]) -> set[str]:
    read = fields_read(sources, _sections(root))
    return {dotted for dotted, owner, name in field_types(root) if (owner.__name__, name) not in read}


def _sources() -> Iterator[str]:
    for package in ("diffusion_rtb", "pipelines", "rewards"):
        for path in (ROOT / package).rglob("*.py"):
            yield path.read_text(encoding="utf-8")


def test_every_field_is_read_and_one_that_nobody_reads_is_noticed() -> None:
    class LongerTrain(TrainConfig):
        dummy: int = 0

    class LongerRun(RunConfig):
        train: LongerTrain = LongerTrain()

    # The code knows the sections by the names they have in the package.
    LongerTrain.__name__, LongerRun.__name__ = "TrainConfig", "RunConfig"
    assert _unread(LongerRun, list(_sources())) == {"train.dummy"}


@pytest.mark.parametrize(
    "source, read",
    [
        ("def f(config: RunConfig) -> None:\n    g(config.train.lr)", True),
        ("def f(c: RunConfig) -> None:\n    t = c.train\n    g(t.lr)", True),
        ("def f(c: RunConfig) -> None:\n    a, t = 1, c.train\n    g(t.lr)", True),
        (
            "class A:\n  def __init__(self, c: RunConfig):\n    self.c = c\n  def f(self):\n    return self.c.train.lr",
            True,
        ),
        ("class A:\n    c: RunConfig\n    def f(self):\n        return self.c.train.lr", True),
        ("class A(Protocol):\n    c: RunConfig\n\ndef f(a: A):\n    return a.c.train.lr", True),
        ("class A:\n    c: int\n\ndef f(a: A):\n    return a.c.train.lr", False),
        ("def f() -> tuple[RunConfig, int]: ...\n\ndef g():\n    c, _ = f()\n    return c.train.lr", True),
        ("def f(c: RunConfig) -> None:\n    c.train.lr = 3", False),
        ("def f(c: RunConfig, other: Other) -> None:\n    other.train.lr", False),
        ("def f(c: RunConfig) -> None:\n    c.train.lr_objective", False),
        ("@model_validator(mode='after')\ndef f(c: RunConfig) -> None:\n    c.train.lr", False),
    ],
)
def test_reads_are_followed_by_type(source: str, read: bool) -> None:
    assert (("TrainConfig", "lr") in fields_read([source], _sections(RunConfig))) is read


def test_text_of_a_config_is_its_file(basic: Path, tmp_path: Path) -> None:
    config = load_config(basic)
    open_run(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8") == config_text(config)
