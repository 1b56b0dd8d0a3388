"""`diffusion-rtb benchmark` on a tiny architecture: what it counts is right, and nothing is measured twice, lost, or a crash."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_rtb.benchmark.compiled import measure_compiled
from diffusion_rtb.benchmark.device import counted, precision
from diffusion_rtb.benchmark.expected import expected_seconds
from diffusion_rtb.benchmark.network import measure_network
from diffusion_rtb.benchmark.plan import Model, Part, load_models, plan
from diffusion_rtb.benchmark.results import Results
from diffusion_rtb.benchmark.run import Budget, _stopped_after, _TooLongError, measure_parts
from diffusion_rtb.benchmark.subject import Subject, config_of
from diffusion_rtb.cli.main import main
from diffusion_rtb.config.components import describe
from tests.oracles.architecture import save_architecture

ROW = """
{name}:
  prior: {{component: "{component}", path: "random:{path}"}}
  steps: 3
  batches: [1, 2]
  iterations: [{{batch: 2, steps: 2}}]
  dtypes: [float32]
  compile: 200
"""
MEASURED = ["network-b1-t3", "network-b2-t3", "sampling-b1-t3", "sampling-b2-t3", "floor-b1-t3"]
MEASURED += ["iteration-b2-t2", "update-b2-t2"]


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_architecture(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def rows(architecture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "models.yaml"
    models = {
        "tiny": "stable_diffusion",
        "greedy": "tests.oracles.greedy:Greedy",
        "broken": "tests.oracles.greedy:Broken",
        "slow": "tests.oracles.greedy:Slow",
    }
    text = "".join(ROW.format(name=name, component=which, path=architecture) for name, which in models.items())
    file.write_text(text)
    return file


def command(rows: Path, out: Path, *options: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "--models", str(rows), "--device", "cpu", "--out", str(out), *options])
    return int(left.value.code or 0)


def parts(out: Path) -> dict[str, Any]:
    return json.loads((out / "benchmark.json").read_text())["parts"]


@pytest.fixture(scope="module")
def measured(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All parts of one model; compiling does not fit."""
    out = tmp_path_factory.mktemp("measured") / "benchmark"
    assert command(rows, out, "--model", "tiny", "--minutes", "5") == 0
    return out


# What is measured


def test_every_part_has_its_numbers(measured: Path) -> None:
    found = parts(measured)
    assert list(found) == [
        "float32-rate",
        *(f"tiny-float32-{name}" for name in MEASURED),
        "tiny-float32-compiled-b1-t3",
    ]
    assert found["tiny-float32-compiled-b1-t3"]["skipped"].startswith("too long: about 20")
    assert found["float32-rate"]["flop_per_second"] > 1e6
    for batch in (1, 2):
        sampling = found[f"tiny-float32-sampling-b{batch}-t3"]
        assert sampling["same_images"] is True
        assert sampling["waits_per_step"] is None
        assert sampling["peak_memory"] is None
    iteration = found["tiny-float32-iteration-b2-t2"]
    assert iteration["parity"] == 0
    assert sum(iteration["seconds_of"].values()) < 10 * iteration["seconds"]
    assert 0 < found["tiny-float32-floor-b1-t3"]["nats"] < 1e-3  # float32


def test_operations_add_up(measured: Path, architecture: Path) -> None:
    """A chain is its network calls and a decoder, twice the batch is twice the work, a gradient is more work, adapters are some."""
    found = {name: row for name, row in parts(measured).items() if "flop" in row}
    call = found["tiny-float32-network-b1-t3"]
    assert found["tiny-float32-network-b2-t3"]["flop"] == 2 * call["flop"]
    assert call["flop"] < call["flop_with_gradient"] <= 3 * call["flop"]
    prior = calls_of_the_prior(architecture)
    assert prior < call["flop"]
    sampling, two = (found[f"tiny-float32-sampling-b{batch}-t3"]["flop"] for batch in (1, 2))
    decoder = sampling - 3 * prior
    assert decoder > 0
    assert two == 2 * sampling
    # Two trajectories of two steps: rollout of q, log p, gradient of log q; and the decoder.
    iteration = found["tiny-float32-iteration-b2-t2"]["flop"]
    assert iteration == 2 * (2 * (call["flop"] + prior + call["flop_with_gradient"]) + decoder)
    # Two states of two samples: one call of p and one of q with its gradient for each, and nothing else.
    update = found["tiny-float32-update-b2-t2"]
    assert update["flop"] == update["flop_of_calls"] == 2 * 2 * (prior + call["flop_with_gradient"])


def calls_of_the_prior(architecture: Path) -> int:
    """Operations of one call with the adapters off."""
    row = Model.model_validate(load_row(architecture))
    subject = Subject(Part("network", "float32", "tiny", 1, 2, row), "cpu")
    args, kwargs = subject.network_call(1)
    with torch.no_grad(), subject.prior.as_prior():
        return counted(lambda: subject.network(*args, **kwargs))


def test_shares_are_of_the_measured_rate(measured: Path) -> None:
    found = parts(measured)
    rate, call = found["float32-rate"], found["tiny-float32-network-b1-t3"]
    assert call["share_of_rate"] == pytest.approx(call["flop"] / call["seconds"] / rate["flop_per_second"])
    assert rate["flop_per_second"] == pytest.approx(2 * rate["side"] ** 3 / rate["seconds"])


def test_operations_of_a_product_and_of_a_convolution() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert counted(lambda: a @ b) == 2 * 3 * 5 * 7
    picture, kernel = torch.ones(1, 2, 8, 8), torch.ones(4, 2, 3, 3)
    assert counted(lambda: torch.nn.functional.conv2d(picture, kernel)) == 2 * (4 * 6 * 6) * (2 * 3 * 3)


def test_compiling_is_measured_and_undone() -> None:
    """On the smallest network there is, without a C++ compiler: the graph is captured, and run as it is."""
    prior = {"component": "gaussian", "mean": [1.0], "covariance": [[2.0]]}
    row = Model.model_validate(load_row(Path("x")) | {"prior": prior})
    part = Part("compiled", "float32", "gaussian", 1, 2, row)
    subject = Subject(part, "cpu")
    found = measure_compiled(subject, part, backend="eager")
    assert found["parity"] == 0
    assert found["first_call"] > found["seconds"] > 0
    assert subject.network._compiled_call_impl is None


def load_row(architecture: Path) -> dict[str, Any]:
    prior = {"component": "stable_diffusion", "path": f"random:{architecture}"}
    return {"prior": prior, "steps": 2, "batches": [1], "iterations": [], "dtypes": ["float32"], "compile": 1.0}


def test_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with precision("tf32"):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with precision("float32"):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


# What is not measured twice, lost, or a crash


def test_a_second_call_repeats_nothing_and_a_named_part_is_measured_again(
    measured: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = parts(measured)
    assert command(rows, measured, "--model", "tiny", "--minutes", "5") == 0
    assert parts(measured) == before
    assert command(rows, measured, "--model", "tiny", "--part", "tiny-float32-floor") == 0
    after = parts(measured)
    again = {name for name in after if after[name] != before[name]}
    assert again == {"tiny-float32-floor-b1-t3"}
    assert capsys.readouterr().out.endswith((measured / "benchmark.md").read_text())


def test_without_time_everything_is_left_for_the_next_call(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--model", "tiny", "--part", "float32-rate")
    assert command(rows, tmp_path, *wanted, "--minutes", "0") == 0
    assert "- float32-rate: no time: about 2 s, 0 s are left" in capsys.readouterr().out
    assert command(rows, tmp_path, "--model", "tiny", "--minutes", "0.1", "--part-minutes", "0.04") == 0
    found = parts(tmp_path)
    assert "flop_per_second" in found["float32-rate"]  # expected to take 2 s
    assert found["tiny-float32-network-b1-t3"]["skipped"].startswith("too long: about 15 s, a part may take 2 s")


def test_no_room_is_a_result_and_an_error_is_tried_again(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--part", "greedy-float32-network", "--part", "broken-float32-network-b1-t3"]
    models = ["--model", "greedy", "--model", "broken"]
    assert command(rows, tmp_path, *models, *chosen) == 1  # something failed
    found = parts(tmp_path)
    assert found["greedy-float32-network-b1-t3"]["flop"] > 0
    assert found["greedy-float32-network-b2-t3"]["out_of_memory"] == "at batch 2"
    assert found["broken-float32-network-b1-t3"]["failed"] == "LookupError: no arguments"
    shown = capsys.readouterr()
    assert "- greedy-float32-network-b2-t3: out of memory at batch 2" in shown.out
    assert "1 parts failed: broken-float32-network-b1-t3." in shown.err
    command(rows, tmp_path, *models, "--list")
    listed = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "network" in line)
    assert listed["greedy-float32-network-b2-t3"].strip() == "out of memory at batch 2"
    assert listed["greedy-float32-network-b1-t3"].strip().startswith("measured in")


def test_a_part_that_takes_longer_than_it_may_is_stopped(rows: Path, tmp_path: Path) -> None:
    results, part = Results(tmp_path, {}), Part("sampling", "float32", "slow", 1, 3, load_models(rows)["slow"])
    results.parts["slow-float32-network-b1-t3"] = {
        "batch": 1,
        "seconds": 1e-3,
        "seconds_with_gradient": 1e-3,
        "load_seconds": 0.0,
    }
    measure_parts([part], results, Budget(60.0, 1.0), torch.device("cpu"))
    assert results.parts[part.name]["skipped"].startswith("stopped after")
    assert not results.done(part.name)


def swallowing_then_renaming() -> None:
    with suppress(Exception):
        time.sleep(60)
    try:
        time.sleep(60)
    except Exception as error:
        raise LookupError("of a library") from error


def test_a_stop_that_a_library_swallows_or_renames_is_one_all_the_same() -> None:
    with pytest.raises(_TooLongError), _stopped_after(0.01):
        swallowing_then_renaming()
    with pytest.raises(LookupError), _stopped_after(60.0):
        raise LookupError("before its time")


def test_numbers_of_two_machines_are_not_mixed(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(rows, tmp_path, "--model", "tiny", "--part", "float32-rate", "--minutes", "0") == 0
    file = tmp_path / "benchmark.json"
    text = file.read_text()
    machine = json.loads(text)["machine"]
    file.write_text(json.dumps(json.loads(text) | {"machine": machine | {"torch": "1.0"}}))
    assert command(rows, tmp_path, "--model", "tiny", "--list") == 1
    assert f"(torch '1.0', here '{machine['torch']}')" in " ".join(capsys.readouterr().err.split())
    file.write_text(text[:-20])
    assert command(rows, tmp_path, "--model", "tiny", "--list") == 1
    assert "benchmark.json is damaged" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "tinny"], "no model 'tinny'. Did you mean 'tiny'?"),
        (["--dtype", "float23"], "no dtype 'float23' here. Did you mean 'float32'?"),
        (["--part", "tiny-float32-flor"], "no part 'tiny-float32-flor'"),
        (["--dtype", "tf32", "--device", "cpu"], "tf32 is a mode of CUDA devices, and this is cpu"),
        (["--device", "tpuu"], "--device tpuu: torch knows no such device"),
    ],
)
def test_what_does_not_exist_is_named(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["benchmark", "--models", str(rows), "--out", str(tmp_path), *options])
    assert left.value.code == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "benchmark.json").exists()


def test_a_row_with_another_key_is_named(tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(ROW.format(name="tiny", component="stable_diffusion", path="x").replace("batches", "batch"))
    with pytest.raises(ValueError, match="model tiny: batch"):
        load_models(file)


# The plan


def test_the_wanted_dtype_of_every_model_comes_before_the_second_of_any() -> None:
    parts = plan(load_models())
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    assert [part.measure for part in parts[:4]] == ["rate"] * 4
    compiled = [i for i, part in enumerate(parts) if part.measure == "compiled"]
    assert compiled == list(range(len(parts) - len(load_models()), len(parts)))
    assert names.index("flux1_dev-bfloat16-iteration-b1-t4") < names.index("sd15-float16-network-b1-t20")


@pytest.mark.parametrize("name", load_models())
def test_every_row_is_a_prior_that_can_be_made(name: str) -> None:
    row = load_models()[name]
    prior = row.prior.model_dump() | {"dtype": "bfloat16", "steps": row.steps, "device": "cpu"}
    describe(prior, "prior")


def test_what_a_part_is_going_to_take() -> None:
    row = Model.model_validate(load_row(Path("x")) | {"compile": 50.0})
    results = {
        "m-bfloat16-network-b2-t5": {"batch": 2, "seconds": 0.2, "seconds_with_gradient": 0.6, "load_seconds": 7.0}
    }
    sampling = Part("sampling", "bfloat16", "m", 4, 5, row)
    assert expected_seconds(sampling, results, loaded=True) == pytest.approx(6 * 5 * 4 * 0.1)
    assert expected_seconds(sampling, results, loaded=False) == pytest.approx(12 + 7)
    iteration = Part("iteration", "float16", "m", 1, 3, row)  # of another dtype: what is known of this one
    assert expected_seconds(iteration, results, loaded=True) == pytest.approx(3 * 2 * 3 * (2 * 0.1 + 0.3))
    assert expected_seconds(Part("compiled", "bfloat16", "m", 1, 2, row), {}, loaded=True) == 65.0


def test_a_row_may_have_a_posterior_of_its_own(architecture: Path) -> None:
    """Numbers of the network without what is trained, and of what is trained: the same, where that is the network."""
    row = load_row(architecture) | {"posterior": {"full": True}}
    part = Part("network", "float32", "tiny", 1, 2, Model.model_validate(row))
    assert config_of(part, "cpu").posterior == {"full": True}
    found = measure_network(Subject(part, "cpu"), part, None)
    assert found["parameters"] == found["trained"] > 0
