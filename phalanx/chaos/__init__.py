"""Faults on purpose: harming the processes of a running cluster and measuring what it costs."""
