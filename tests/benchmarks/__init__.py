"""Benchmarks: every performance gate's two sides, measured in turn in one run (``python -m tests.benchmarks``)."""
