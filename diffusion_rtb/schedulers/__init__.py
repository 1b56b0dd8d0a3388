"""Schedulers that diffusers lacks, for its own pipelines; each file is one class and imports nothing of the package."""

from diffusion_rtb.schedulers.flow_match_sde import FlowMatchSDEScheduler

__all__ = ["FlowMatchSDEScheduler"]
