"""The examples are no installed package: the repository root has to be importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
