"""What the notebooks of the DPO course import: docs/decisions.md has the map of the modules.

Kept light: importing the package loads neither torch nor transformers.
"""

import os
import warnings

# OpenMP threads that spin while they wait take the core from whoever has work, such as a second kernel. libgomp reads
# this once, when torch is loaded, so it is set here, before any module of the package loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The Hub's second way of sending large files has time limits of its own; by HTTP those of `run.sources` hold for all.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")

# Progress bars here are plain text; Jupyter widgets are not needed for them, and not missed.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
