"""A prior that wants to know a run's prompts is told them, with their metadata and the folder their paths count from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from diffusion_rtb.config.load import ConfigError, load_config
from diffusion_rtb.run.checks import describe_components
from diffusion_rtb.run.folder import find_run, open_run
from diffusion_rtb.run.posterior import load_prior
from tests.oracles.third_party_prior import WalkPrior

ROWS = [{"prompt": "a cat", "start": "starts/cat.txt"}, {"prompt": "a dog", "start": "starts/dog.txt"}]


class Starting(WalkPrior):
    """Reads a number for each prompt from a file that its row names."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: dict[str, float] = {}

    def read_prompts(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]], folder: Path) -> None:
        for prompt, row in zip(prompts, metadata, strict=True):
            if "start" not in row:
                raise ValueError(f"{prompt!r} has no column `start`")
            self.starts[prompt] = float((folder / row["start"]).read_text())


def written(folder: Path, rows: Sequence[Mapping[str, str]] = ROWS) -> Path:
    (folder / "data/starts").mkdir(parents=True)
    for name, number in (("cat", 1.5), ("dog", -2.0)):
        (folder / f"data/starts/{name}.txt").write_text(str(number))
    (folder / "data/p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "prior": {"component": f"{__name__}:Starting"},
        "reward": {"component": "tests.oracles.third_party_prior:first"},
        "beta": 1.0,
        "prompts": {"file": "data/p.jsonl"},
        "out": str(folder / "runs"),
        "train": {"prompts_per_iteration": 2, "group": 2, "micro_batch": 4},
    }
    (folder / "run.yaml").write_text(json.dumps(data))
    return folder / "run.yaml"


def test_it_is_told_before_it_is_built(tmp_path: Path) -> None:
    prior: Any = describe_components(load_config(written(tmp_path))).prior
    assert prior.construct().starts == {"a cat": 1.5, "a dog": -2.0}
    assert prior.build() is prior.construct()


def test_a_run_knows_where_its_prompt_file_was(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    open_run(config)
    (tmp_path / "data/p.jsonl").unlink()
    _, prior = load_prior(tmp_path / "runs/run")
    assert isinstance(prior, Starting)
    assert prior.starts == {"a cat": 1.5, "a dog": -2.0}
    shutil.move(tmp_path / "data", tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"cat\.txt"):
        load_prior(tmp_path / "runs/run")
    moved, _ = find_run(tmp_path / "runs/run", [f"prompts.folder={tmp_path / 'elsewhere'}"])
    found: Any = describe_components(moved).prior.construct()
    assert found.starts == {"a cat": 1.5, "a dog": -2.0}
    assert open_run(moved, tmp_path / "runs/run") is None, "the run itself is the same"


def test_a_prompt_that_will_not_do_is_refused(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, [*ROWS, {"prompt": "a cow"}]))
    with pytest.raises(ValueError, match="'a cow' has no column `start`"):
        describe_components(config)


def test_prompts_without_metadata_have_no_folder(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, [{"prompt": "a cat"}, {"prompt": "a dog"}]))
    assert config.prompts.folder is None
    with pytest.raises(ConfigError, match="folder belongs to a `file`"):
        load_config(tmp_path / "run.yaml", ["prompts.file=null", "prompts.list=[a, b]", "prompts.folder=here"])
