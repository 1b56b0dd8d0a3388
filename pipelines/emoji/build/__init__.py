"""How the bundled emoji prior and emoji-clip were made: `python -m pipelines.emoji.build`."""
