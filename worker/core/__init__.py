"""Decisions of the worker. No clock, socket, file or process in here: events in, effects out."""
