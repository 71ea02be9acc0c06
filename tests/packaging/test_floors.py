"""Imports go one way: a floor of the package uses those below it only."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("spec", "lowering", "printing"),
    ("codecs",),
    ("policies",),
    ("storage",),
    ("kernels",),
    ("ops",),
    ("runtime", "patterns"),
    ("passes",),
    ("backend", "integrations"),
    ("testing",),
    ("report",),
    ("explain",),
    ("doctor", "bench", "eval", "__init__"),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sphkv_compile."):
            found.add(node.module.split(".")[1])
    return found


def test_no_floor_imports_from_above_itself():
    wrong = []
    for path in [*ROOT.glob("sphkv_compile/**/*.py"), *ROOT.glob("patterns/*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        floor = "patterns" if parts[0] == "patterns" else parts[1]
        wrong += [
            f"{'/'.join(parts)} -> {used}" for used in imports(path) if used != floor and LEVEL[used] >= LEVEL[floor]
        ]
    assert not wrong
