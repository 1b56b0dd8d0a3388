"""How the bundled Fashion-MNIST prior and classifier were made: `python -m pipelines.fashion.build`."""
