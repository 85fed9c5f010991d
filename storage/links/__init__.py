"""Chunks that are not stored: made from linked files by processes of their own."""
