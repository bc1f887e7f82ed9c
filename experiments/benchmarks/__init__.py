"""Measurements, each with its committed record under `experiments/records/benchmarks/`. Not tests: nothing here can
fail.
"""
