"""The decisions of storage: pure functions over rows and messages."""
