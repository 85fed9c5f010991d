"""Kernel support vector machines by a cascade: their tasks, and what predicts with them."""
