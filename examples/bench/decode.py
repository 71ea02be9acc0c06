"""A decode step of a whole small model on a CPU: ``sphkv bench decode``, with the record kept here.

python examples/bench/decode.py --length 4096 --bits 4,K4V2 --name smollm2_4k
"""

import sys
from pathlib import Path

from sphkv_compile.bench.app import app

if __name__ == "__main__":
    app(["decode", "--out", str(Path(__file__).parent / "records"), *sys.argv[1:]])
