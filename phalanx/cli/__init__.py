"""The command line ``phalanx``."""
