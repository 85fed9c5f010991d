"""The session process: talks to control, aggregators and storage, feeds the leaf processes."""
