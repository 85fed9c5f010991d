"""The words that choose how logs are written, apart from the logs, which are slow to import."""

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "text")
