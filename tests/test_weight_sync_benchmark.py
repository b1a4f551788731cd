"""The pure parts of benchmarks/weight_sync.py: sizes, and what is said of goals that were missed."""

from weight_sync import sizes, verdicts


def row(transport: str, workers: int, seconds: float, ratio: float) -> dict:
    cell = {"transport": transport, "mb": 100, "tensors": 10, "workers": workers}
    return cell | {"seconds": seconds, "s_per_gb": seconds * 10, "ratio_to_rpc_per_tensor": ratio}


def test_tensors_have_the_asked_bytes_together():
    for mb, n in [(10, 10), (100, 1000), (500, 7)]:
        got = sizes(mb, n)
        assert len(got) == n and abs(4 * sum(got) / 1e6 - mb) < 0.01 * mb and max(got) <= 3.01 * min(got)


def test_goals_are_judged_by_the_best_transport_of_each_size_and_by_the_worst_size():
    naive = [row("rpc_per_tensor", w, 0.0001, 1.0) for w in (1, 8)]  # it is no transport
    rows = [row("a", 1, 0.006, 30), row("b", 1, 0.9, 2), row("a", 8, 0.03, 10), row("b", 8, 0.009, 25)]
    said = verdicts(naive + rows).splitlines()
    assert said == [
        "at most 0.08 s/GB: MISSED, in 1 of 2 sizes; worst 0.09",
        "at least 20 times as fast as one RPC per tensor: met, in 2 of 2 sizes; worst 25.00",
        "1 to 8 workers cost at most 10 % more: MISSED, in 0 of 1 sizes; worst 1.50",
    ]
    alone = verdicts(naive[:1] + rows[:2]).splitlines()
    assert alone[2] == "1 to 8 workers cost at most 10 % more: not measured"
