"""Rebuild the bundled priors `emoji` and `emoji_flow` and the reward models `emoji-clip` and `emoji-taste` from the npm registry.

    python -m pipelines.emoji.build --work runs/emoji                # everything, one stage after another
    python -m pipelines.emoji.build --work runs/emoji --stage unet   # one stage; run it again to continue

Needs npm and resvg_py. Stages resume from atomic checkpoints in the work folder; a training's budget (`--minutes`) is
wall time over all its runs. `decoder`, `clip` and `unet` need only `vae` and may run side by side; `flow` needs `data` and the
exported `emoji` and `emoji-clip`, `taste` the exported two alone.

Budgets on one core of an AMD EPYC with AVX-512 bf16 each: vae 50 min, decoder 25 (5,712 steps), unet 90 (7,871), clip 45 (2,624),
flow 50 (13,714; 75 s before it for the cache). Besides, data 15 s, export and sheet 1 min, report 1 min, taste 1 min.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from pipelines.emoji import FLOW, PATH
from pipelines.emoji.build import clip, drawings, export, flow, taste, unet, vae
from pipelines.emoji.build.folder import export_prior
from pipelines.emoji.build.stages import run_stages

MINUTES = {"vae": 50.0, "decoder": 25.0, "clip": 45.0, "unet": 90.0, "flow": 50.0}
STAGES = (
    *("data", "vae", "latents", "decoder", "unet", "clip", "export", "export-clip", "sheet", "report", "taste"),
    *("flow", "export-flow", "sheet-flow", "report-flow"),
)
CLIP_PATH = PATH.parents[2] / "rewards" / "emoji_clip"
TASTE_PATH = CLIP_PATH.with_name("emoji_taste")


def main() -> None:
    """Run the stages that the command line names."""
    folders = {
        "prior": (PATH, "where to write the prior"),
        "flow": (FLOW, "where to write the flow prior"),
        "clip": (CLIP_PATH, "where to write emoji-clip"),
        "taste": (TASTE_PATH, "where to write emoji-taste"),
    }
    run_stages(__doc__, STAGES, run, folders)


def run(stage: str, options: argparse.Namespace) -> None:
    """Run one stage."""
    work: Path = options.work
    if stage == "taste":  # of the exported models alone
        taste.make(options.prior, options.clip, options.taste)
        return
    data = drawings.load(work)
    minutes = options.minutes or MINUTES.get(stage, 0)

    def cache() -> flow.Cache:
        return flow.Cache.load(data, work, options.prior, options.clip)

    actions: dict[str, Callable[[], object]] = {
        "data": lambda: data,
        "vae": lambda: vae.train(data, work, minutes),
        "latents": lambda: vae.cache_latents(data, work),
        "decoder": lambda: vae.train_decoder(data, work, minutes),
        "unet": lambda: unet.train(vae.cache_latents(data, work), work, minutes),
        "clip": lambda: clip.train(data, work, minutes),
        "export": lambda: export_prior(export.pipeline(work), options.prior, licences=PATH),
        "export-clip": lambda: clip.export(work, options.clip),
        "sheet": lambda: export.sheet(options.prior, options.prior.parent / "sheet.png"),
        "report": lambda: export.report(data, work, options.prior, options.clip),
        "flow": lambda: flow.train(cache(), work, minutes),
        "export-flow": lambda: export_prior(
            flow.pipeline(cache(), work, options.prior, options.clip), options.flow, licences=PATH
        ),
        "sheet-flow": lambda: export.sheet(options.flow, options.flow.parent / "sheet_flow.png"),
        "report-flow": lambda: export.report_flow(work, options.flow, options.prior, options.clip),
    }
    actions[stage]()


if __name__ == "__main__":
    main()
