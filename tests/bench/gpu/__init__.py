"""Benchmarks of one CUDA device: kernels, the engine's step, transfers, and HTTP on top."""
