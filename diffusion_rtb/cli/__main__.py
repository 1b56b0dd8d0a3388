"""`python -m diffusion_rtb.cli` is `diffusion-rtb`."""

from __future__ import annotations

from diffusion_rtb.cli.main import main

if __name__ == "__main__":
    main()
