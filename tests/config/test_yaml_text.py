"""YAML 1.2 scalars, and texts of others that would take all memory or time, refused at once."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from diffusion_rtb.config.load import ConfigError, load_config
from diffusion_rtb.config.yaml_text import read_yaml, write_yaml

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30", "12:30"),
        ("1:02:03.5", "1:02:03.5"),
        ("0o14", 12),
        ("014", 14),
        ("-014", -14),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("+3", 3),
        ("1e-4", 1e-4),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-.inf", -math.inf),
        ("no", "no"),
        ("true", True),
        ("2026-01-01", "2026-01-01"),
        ("[<<, =, ~]", ["<<", "=", None]),
        ("{a: 1, <<: {b: 2}}", {"a": 1, "b": 2}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    """The expected values are those of the specification's core schema, https://yaml.org/spec/1.2.2/#103-core-schema."""
    found = read_yaml(text)
    assert found == value
    assert type(found) is type(value)


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.text("0123456789:o_xb.-+ein", max_size=8)))
def test_what_is_written_reads_back(value: Any) -> None:
    found = read_yaml(write_yaml([value]))[0]
    assert found == value
    assert type(found) is type(value)


def laughs(levels: int = 9, each: int = 9) -> str:
    names = "abcdefghijklm"[: levels + 1]
    lines = [f"a: &a [{', '.join('x' * each)}]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * each)}]" for old, new in pairwise(names)]
    return "\n".join([*lines, f"prompts: {{list: *{names[-1]}}}"])


HOSTILE = {
    "laughs": (laughs(), "aliases repeat more than 10000 values"),
    "wide": (f"a: &a [{'x,' * 9999}x]\nb: [*a, *a]", "aliases repeat more than 10000 values"),
    "long": (f"a: &a {'x' * 1_001_000}\nb: [*a]", "aliases repeat more than 10000 values"),
    "merges": (
        "a: &a {k: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [{'*a,' * 99}*a]}}\n" for i in range(999)),
        "aliases repeat",
    ),
    "brackets": ("[" * 20_000, "60 levels"),
    "braces": ("{a: " * 20_000, "60 levels"),
    "dashes": ("- " * 20_000, "60 levels"),
    "lines": ("".join(f"{' ' * i}a:\n" for i in range(2000)), "60 levels"),
    "keys": ("? " * 20_000, "60 levels"),
    "chain": ("k: &a0 [x]\n" + "".join(f"k{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 20_000)), "60 levels"),
    "itself": ("a: &a [*a]", "inside the value it stands for"),
    "digits": ("beta: " + "9" * 5000, "does not fit its type"),
    "tag": ("beta: !!int cat", "does not fit its type"),
    "python": ("a: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    "mapping": ("? [a]\n: b", "a key must be a word"),
    "twice": ("beta: 1\nbeta: 2", "'beta' is given twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_refused_at_once(name: str, tmp_path: Path) -> None:
    text, reason = HOSTILE[name]
    start = time.process_time()
    with pytest.raises(yaml.YAMLError, match=reason):
        read_yaml(text)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"a.yaml is not YAML.*{reason}"):
        load_config(tmp_path / "a.yaml")
    if "\n" not in text:
        with pytest.raises(ConfigError, match=reason):
            load_config(QUICKSTART, [f"prompts.list={text}"])
    assert time.process_time() - start < 2


def test_aliases_that_people_use_are_read() -> None:
    assert read_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_many_problems_are_not_all_listed() -> None:
    with pytest.raises(ConfigError, match="5001 problems") as caught:
        load_config(QUICKSTART, [f"prompts.list=[{'1,' * 4999}1]"])
    assert len(str(caught.value).splitlines()) < 30


def test_a_received_value_is_shown_in_part() -> None:
    with pytest.raises(ConfigError, match=r"train\.lr: got 'xxx") as caught:
        load_config(QUICKSTART, [f"train.lr={'x' * 100_000}"])
    assert len(str(caught.value)) < 110_000 / 100
