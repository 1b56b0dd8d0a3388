"""The page of an evaluation: one HTML file to send around, made from the files that evaluations and runs have written."""
