"""Benchmarks of xpnet, other libraries, and the matrix products alone: `python -m benchmarks --help`.

`python -m benchmarks.tiny_nets --help` compares `fit` with a plain NumPy script, for nets with few weights.
`python -m benchmarks.gpu_check --help` checks and measures xpnet on a GPU machine in a few minutes.
"""
