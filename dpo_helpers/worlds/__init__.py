"""Worlds whose truth is known: the embedded one, and a table of responses."""
