"""Trained models as objects and files of other libraries."""
