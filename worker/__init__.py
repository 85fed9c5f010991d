"""The worker: a session process that never computes, and one leaf process per slot that does."""
