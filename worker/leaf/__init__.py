"""The leaf process: runs leaves and nothing else. The only place where a job's own code runs."""
