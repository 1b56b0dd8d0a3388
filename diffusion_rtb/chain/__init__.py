"""The denoising chain: recorded, led along given states, continued, noised; log-densities of its transitions."""
