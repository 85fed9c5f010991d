"""Clusters on one machine: real service processes under a small supervisor."""
