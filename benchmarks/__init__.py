"""Measurements, side by side with TRL and against the arithmetic that the work needs. See README.md."""
