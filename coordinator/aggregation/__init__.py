"""The aggregator: owns ranges of jobs' parameters, reduces contributions, applies the optimizer."""
