"""The figures of docs/RELIABILITY.md, each measured by one module of this package."""
