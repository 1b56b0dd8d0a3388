"""Will this run work, and what does it cost? Looked at before its first hour: `diffusion-rtb doctor CONFIG`."""
