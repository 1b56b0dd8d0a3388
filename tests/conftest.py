"""Shared by all tests: shapes in annotations are executed, every test starts from the same seed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import config, install_import_hook

# Before the packages are imported anywhere: their jaxtyping annotations become run-time checks in the tests only.
install_import_hook(["diffusion_rtb", "pipelines", "rewards"], "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

from diffusion_rtb.chain.noise import GivenStart, ProbeNoise, RowNoise  # noqa: E402

for _mode in (GivenStart, ProbeNoise, RowNoise):
    # Called for every operation of torch, and no shape is in its annotations: checking it takes a third of a training test.
    inspect.unwrap(_mode.__torch_function__).__no_type_check__ = True


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@contextmanager
def _unchecked() -> Iterator[None]:
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


@pytest.fixture
def shapes_unchecked() -> Iterator[None]:
    """For whole trainings, which the checks make up to three times as long; other tests run the same functions checked."""
    with _unchecked():
        yield


@pytest.fixture(scope="module")
def shapes_unchecked_in_module() -> Iterator[None]:
    """The same for all tests of a file and for what they share."""
    with _unchecked():
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked `gpu` is skipped without a card; `make gpu-check` runs it where there is one.

    The longest test comes first, so that no worker is left alone with it at the end.
    """
    items.sort(key=lambda item: "test_pretended_device" not in item.nodeid)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
