"""Benchmarks of xpnet, other libraries, and the matrix products alone: `python -m benchmarks --help`.

`python -m benchmarks.gpu_check --help` checks and measures xpnet on a GPU machine in a few minutes.
"""
