"""Processes as forks of one that has their code loaded: both sides of the protocol."""
