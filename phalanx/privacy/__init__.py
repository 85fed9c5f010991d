"""Differential privacy of single rows: what is clipped, drawn, added and spent."""
