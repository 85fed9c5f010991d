"""Independent tasks: who runs which, what came of them, and what has to be durable first."""
