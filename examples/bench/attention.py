"""One attention of a decode step on a GPU: ``sphkv bench attention``, with the record kept here.

python examples/bench/attention.py --batch 1,8 --length 8192,32768,131072 --tiers K4V4,K4V2 --peers --name h100
"""

import sys
from pathlib import Path

from sphkv_compile.bench.app import app

if __name__ == "__main__":
    app(["attention", "--out", str(Path(__file__).parent / "records"), *sys.argv[1:]])
