import sys
from pathlib import Path

from megatron_qad.engine import prepare

sys.path.append(str(Path(__file__).parents[2] / "dist"))  # tiny_models
prepare()  # the test modules import megatron, and are imported after this file
