"""All-reduce jobs at run time: streams between workers, checkpoints, reports of the root."""
