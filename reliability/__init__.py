"""Attacks on xpnet: `python -m reliability` runs them, and docs/reliability.md has the result."""
