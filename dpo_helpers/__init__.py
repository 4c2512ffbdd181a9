"""What the notebooks of the DPO course import: see the README for the map of the modules.

Kept light: importing the package loads neither torch nor transformers.
"""

__version__ = "0.1.0"
