"""Data: cells and environments in, batches out."""
