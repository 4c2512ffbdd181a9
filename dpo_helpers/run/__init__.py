"""A run on disk: its stages, what they are made from, and what survives."""
