"""The version of the rules of training."""

RULES = 1
"""Which rows a leaf takes and in which order, how leaves are summed, how a step is made of the sum.

Raise it with every change after which the same job has other bits. It is part of the numeric
fingerprint: members with another one take no part in a job, instead of mixing both. The release of
Phalanx is no part of that, so a job keeps its bits over an upgrade that leaves the rules alone.
"""
