"""What a reader sees: figures, tables, checks."""
