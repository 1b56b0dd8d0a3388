"""Shared by all tests: shapes in annotations are executed, every test starts from the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import config

from tests import checked_calls

# Before the packages are imported anywhere: their annotations become run-time checks in the tests only.
checked_calls.install(["diffusion_rtb", "pipelines", "rewards"])

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _written_without_waiting() -> Iterator[None]:
    """What is written is there for every process at once; whether the disk was waited for shows after a power cut only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


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
