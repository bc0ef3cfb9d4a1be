"""The CPU: NumPy, faster operators, and a thread pool."""
