"""Names of other trainers: each is of one metric of ours, and stands in nobody's way."""

import pytest

from core.metrics import METRICS, lookup
from core.peer_names import PEERS, with_peer_names
from core.schema import LogConfig


@pytest.mark.parametrize("peer", PEERS)
def test_each_name_is_one_metric_of_ours_and_none_of_them(peer):
    names = PEERS[peer]
    assert len({*names.values()}) == len(names)
    for ours, theirs in names.items():
        assert lookup(ours).name == ours
        assert theirs not in METRICS and theirs != ours
        for other in {*METRICS, *names.values()} - {theirs}:  # as in our table: no name is a path prefix of another
            assert not other.startswith(f"{theirs}/") and not theirs.startswith(f"{other}/"), (theirs, other)


def test_the_choices_of_the_key_are_the_peers():
    kinds = LogConfig.model_fields["peer_names"].annotation
    assert {*kinds.__args__} == {"none", *PEERS}


def test_ours_stay_and_theirs_come():
    values = {"reward/total": 2.0, "optim/lr": 1e-3, "ppo/approx_kl": 0.01}
    assert with_peer_names("none", values) == values
    assert with_peer_names("trl", values) == values | {"objective/scores": 2.0, "lr": 1e-3}
    got = with_peer_names("verl", values)
    assert got == values | {"critic/score/mean": 2.0, "actor/lr": 1e-3, "actor/ppo_kl": 0.01}
