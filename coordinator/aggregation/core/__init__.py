"""Pure decisions of the aggregator: no clock, socket, file or thread inside."""
