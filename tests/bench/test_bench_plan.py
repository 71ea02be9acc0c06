"""The plan bench on a CPU: tokens come, plans drop and demote within the budget, and rows say so."""

from sphkv_compile.bench import plan as bench


def test_plans_are_made_within_the_budget():
    run = bench.Run(bench.Shape(2, 2, 2, 64), 1, 1024, 0.1, "cpu")
    row = bench.row(run, 0.1)
    pool = run.pool
    assert pool.arena.used <= pool.retention.budget + pool.retention.aside(pool)
    assert pool.retention.done.dropped > 0 and row["moved"] > 0
    assert run.length == 1024 + 128 * (bench.WARM + bench.PLANS) <= run.geometry.capacity
    assert row["L"] == 1024 and row["every"] == 128 and 0 < row["ms"] <= row["longest_ms"]
    assert "share" not in row  # attention is timed on a GPU


def test_the_table_shows_every_row():
    rows = [
        {
            "what": "plan",
            "B": 1,
            "L": 64,
            "budget": 0.1,
            "ms": 7.0,
            "longest_ms": 8.0,
            "attention_ms": 2.0,
            "share": 0.5,
        },
        {"what": "allocation", "B": 1, "L": 64, "ms": 3.0},
    ]
    table = bench.table(rows)
    assert table.row_count == 2
    assert [list(column.cells) for column in table.columns][-1] == ["50.0 %", "-"]
