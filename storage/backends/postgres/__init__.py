"""Journals, leases, jobs and the catalog in PostgreSQL; needs the extra ``postgres``."""
