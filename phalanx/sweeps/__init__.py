"""Sweeps: which configurations there are, how they are tried, and what is told of them."""
