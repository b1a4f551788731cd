"""Who is asked for the digest of which bucket: one worker of each node, in turn."""

from types import SimpleNamespace

from rollout.host_digests import HostDigests


class Actor:
    """Answers as Ray does, with a reference: here the words of the call."""

    def __init__(self, name: str) -> None:
        self.digest_bucket = SimpleNamespace(remote=lambda version, index, bucket: (name, version, index, bucket))


def slots(**nodes: str) -> list[SimpleNamespace]:
    """One per name of a worker; its value is its node."""
    return [SimpleNamespace(name=name, node=node, actor=Actor(name)) for name, node in nodes.items()]


def asked(digests: HostDigests) -> dict[tuple[str, int], str]:
    """(node, bucket) -> worker; none is asked twice."""
    found = {(a.node, a.index): a.slot.name for a in digests.asked}
    assert len(found) == len(digests.asked)
    assert all(a.digest == (a.slot.name, 7, a.index, f"bucket {a.index}") for a in digests.asked)
    assert all(a.bucket == f"bucket {a.index}" and a.there for a in digests.asked)
    return found


def dealt(n_buckets: int, **nodes: str) -> dict[tuple[str, int], str]:
    digests = HostDigests(7, n_buckets, slots(**nodes))
    for index in range(n_buckets):
        digests.deal(index, f"bucket {index}")
    return asked(digests)


def test_each_node_reads_each_bucket_once_and_its_workers_take_turns():
    """Nobody goes by what was read on another node: each has a copy of its own."""
    assert dealt(3, a="x", b="y", c="x", d="y") == {
        ("x", 0): "a",
        ("x", 1): "c",
        ("x", 2): "a",
        ("y", 0): "b",
        ("y", 1): "d",
        ("y", 2): "b",
    }


def test_a_worker_alone_on_its_node_takes_the_last_one_when_it_commits():
    assert dealt(2, a="x", b="y", c="x") == {("x", 0): "a", ("x", 1): "c", ("y", 0): "b"}
    assert dealt(1, a="x") == {}


def test_where_nobody_serves_nobody_is_asked():
    assert dealt(2) == {}
