import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # reference_losses.py, which tests/dist reads too
