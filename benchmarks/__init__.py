"""How fast xpnet is, beside its peers and beside the matrix products alone: `python -m benchmarks --help`."""
