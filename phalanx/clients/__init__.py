"""Clients of the services, for other services, the command line and the SDK."""
