"""The control process: membership, placement, life of jobs; decisions in `core`."""
