"""Backups of storage: the folder that holds them, how they are made and how they are checked."""
