"""A whole model at a long context on a GPU: ``sphkv bench model``, with the record kept here.

python examples/bench/model.py --batch 1,8 --length 32768 --ttft --name h100
"""

import sys
from pathlib import Path

from sphkv_compile.bench.app import app

if __name__ == "__main__":
    app(["model", "--out", str(Path(__file__).parent / "records"), *sys.argv[1:]])
