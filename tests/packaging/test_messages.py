"""Every error and warning that a user may see says what was expected or what to do."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = ("AssertionError", "NotImplementedError", "ArenaFull", "SystemExit", "typer.Exit", "typer.BadParameter")
"""Faults of our own, exits, and what carries another error's words."""
SAYS_SO = re.compile(r"expected|did you mean|nearest|such as|run:|[Gg]ive |[Cc]rop |Mask |Compile |Try |run a |Go on ")
ELSEWHERE = ("attentions stay dense:", "strict=True, and", "sphkv:")
"""The ends of those that go on with a refusal, or with what ``warn_once`` was given; other tests see to them."""


def messages(path: Path):
    """(line, text) of each error that is raised and each warning; an f-string's fields are left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or (call is node and ast.unparse(node.func) != "warnings.warn"):
            continue
        if ast.unparse(call.func) not in OURS:
            parts = [x.value for x in ast.walk(call) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            if parts:  # else the words come from elsewhere
                yield node.lineno, "".join(parts)


def test_each_says_what_to_do():
    files = [*ROOT.glob("sphkv_compile/**/*.py"), *ROOT.glob("patterns/*.py")]
    files = [f for f in files if not {"bench", "testing"} & set(f.relative_to(ROOT).parts)]
    found = [(f"{f.relative_to(ROOT)}:{line}", text) for f in files for line, text in messages(f)]
    assert len(found) > 50
    assert [m for m in found if not SAYS_SO.search(m[1]) and not m[1].rstrip().endswith(ELSEWHERE)] == []
