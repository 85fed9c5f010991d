"""Rows through stored models: how good they are, and what they say."""
