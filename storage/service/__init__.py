"""The gRPC side of storage: servicers, thread pools, metrics and housekeeping."""
