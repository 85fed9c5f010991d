"""The words that choose how logs are written; apart from the logs themselves, which take time to import."""

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("json", "text")
