"""The fast path: the numbers of the plain step for a fraction of its work."""
