"""How Phalanx speaks gRPC: channels, servers, deadlines, retries, errors; no decisions."""
