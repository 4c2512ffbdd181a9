"""What only a maintainer runs."""
