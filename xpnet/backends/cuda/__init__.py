"""A CUDA GPU through CuPy."""
