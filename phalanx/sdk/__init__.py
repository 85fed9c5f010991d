"""The Python interface: the verbs of the command line as plain, blocking calls."""
