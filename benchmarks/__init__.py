"""How fast xpnet is, beside its peers and beside the matrix products alone: `python -m benchmarks --help`.

`python -m benchmarks.gpu_check --help`: everything that a GPU machine can tell in a few minutes.
"""
