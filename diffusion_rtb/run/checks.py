"""Check what a config names, before anything is loaded; and say from where its relative paths count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusion_rtb.config.components import check_component, check_posterior
from diffusion_rtb.config.load import RunConfig
from diffusion_rtb.run.manifest import last_directory
from diffusion_rtb.scoring.prompts import check_component_prompts

__all__ = ["check_components", "paths_explained"]


def check_components(config: RunConfig) -> None:
    """Check the names and arguments of everything the config names; nothing is loaded.

    Raises:
        ValueError: a component does not exist, or an argument is unknown, missing, of the wrong type or out of range; or the
            reward does not take one of the prompts.
    """
    check_component(config.prior, "prior")
    check_posterior(config.prior, config.posterior)
    check_component(config.reward, "reward")
    check_component(config.objective, "objective")
    table = config.prompts.table()
    check_component_prompts(config.reward, table.texts, table.metadata)
    for judge in (config.eval.embedder, config.eval.judge):
        if judge is not None:
            check_component(judge, "reward")


@contextmanager
def paths_explained(folder: Path) -> Iterator[None]:
    """Add to an error about a component where the run was started, if that was elsewhere: relative paths count from there."""
    try:
        yield
    except (ValueError, OSError) as error:
        there = last_directory(folder)
        if there is None or Path(there) == Path.cwd():
            raise
        raise ValueError(
            f"{error}\nThis run was last started in {there}, and relative paths and modules in its config count from the working "
            f"directory, which is {Path.cwd()}: give the command there."
        ) from error
