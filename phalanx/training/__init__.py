"""The algorithm itself, without a cluster: sampler, leaves, stop rules, the root's decisions."""
