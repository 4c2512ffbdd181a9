"""What the notebooks of the DPO course import: see the README for the map of the modules.

Kept light: importing the package loads neither torch nor transformers.
"""

import warnings

# Progress bars here are plain text; Jupyter widgets are not needed for them, and not missed.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
