"""Benchmarks that need more than a running server: `python -m tests.bench`."""
