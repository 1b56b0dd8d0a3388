"""What an evaluation measures: one file each, named by `eval.metrics`; see `evaluation/metric.py`."""
