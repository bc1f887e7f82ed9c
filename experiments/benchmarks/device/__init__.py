"""Measures the library on an accelerator that is there for minutes: `python -m experiments.benchmarks.device`."""
