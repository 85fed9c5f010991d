"""The storage service: everything that must survive the death of any process."""
