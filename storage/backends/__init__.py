"""Back ends: where storage keeps what it was given."""
