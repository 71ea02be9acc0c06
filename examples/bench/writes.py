"""A step's append and a prompt's encoding on a GPU: ``sphkv bench writes``, with the record kept here.

python examples/bench/writes.py --batch 1,8,64 --length 32768,131072 --name h200
"""

import sys
from pathlib import Path

from sphkv_compile.bench.app import app

if __name__ == "__main__":
    app(["writes", "--out", str(Path(__file__).parent / "records"), *sys.argv[1:]])
