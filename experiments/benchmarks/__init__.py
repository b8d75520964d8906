"""Benchmarks: ratios measured side by side in one run (``python -m experiments.benchmarks.speed --help``)."""
