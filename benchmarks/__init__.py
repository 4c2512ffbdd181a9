"""Measurements, side by side with TRL and against the arithmetic that the work needs. See README.md.

These processes and those that it starts, TRL's too, have OpenMP threads that sleep while they wait, as the package
has (`dpo_helpers/__init__.py`). libgomp reads this once, when torch is loaded, so it is set here, before any of them
loads it; a value from outside is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
