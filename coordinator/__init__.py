"""Control and aggregation: the two kinds of coordinator process."""
