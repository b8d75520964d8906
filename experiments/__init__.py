"""Experiments: one script per figure or table, each runnable alone (``python -m experiments.NAME --help``)."""
