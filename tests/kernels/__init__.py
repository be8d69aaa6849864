"""Tests of the kernels against their references."""
