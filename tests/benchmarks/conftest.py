"""The benchmarks are scripts: their folder is put where they find each other when they run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
