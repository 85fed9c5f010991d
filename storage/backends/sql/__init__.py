"""Journals, leases, jobs and the catalog as rows: one set of statements for every SQL database."""
