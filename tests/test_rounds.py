"""Responses in rounds: which prompts make a batch, on which rank, and that none is lost: by the code of a run, with
drawn lengths in place of a model."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import tiny_models
from core.config import load
from core.faults import InvariantFault, UserError
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory, sample_uid
from core.under_way import UnderWay, Written, deal
from core.weights import Probe, named_tensors
from launch import build, under_way
from launch.job import Inline
from launch.run import _read_input
from rollout.engines.engine import Begun
from rollout.engines.sampling import Filters
from rollout.engines.transformers_engine import TransformersEngine
from rollout.prompts import PromptStream
from rollout.rounds import RoundPlan
from rollout.shares import Rollouts
from rollout.worker import RolloutWorker
from trainer.ahead import Ahead
from trainer.backlog import Backlog
from trainer.checkpoint import Checkpoint
from trainer.loop import account
from weight_delivery import packed

MAX_TOKENS = 40


def request(ordinal: int, k: int = 0) -> PromptRequest:
    uid = sample_uid("r", ordinal, k)
    return PromptRequest(
        ordinal=ordinal, k=k, sample_uid=uid, prompt_ids=np.array([1]), columns={"prompt": "x"}, seed=0
    )


def length_of(r: PromptRequest) -> int:
    """Of a whole response: a long tail, cut at MAX_TOKENS; a function of (ordinal, k)."""
    return int(np.clip(np.random.default_rng([r.ordinal, r.k]).lognormal(2, 0.9), 1, MAX_TOKENS))


def so_far(r: PromptRequest, n: int, versions: np.ndarray) -> Trajectory:
    """The first n tokens of a response."""
    whole = length_of(r)
    return Trajectory(
        request=r,
        response_ids=np.arange(n) + r.ordinal,
        rollout_logprobs=-np.arange(n, dtype=np.float32),
        action_mask=np.ones(n, dtype=bool),
        token_offsets=np.zeros((n, 2), dtype=np.int64),
        policy_version=versions,
        finish_reason=None if n < whole else "length" if n == MAX_TOKENS else "stop",
        finished_at=0.0,
    )


@dataclass
class Writer:
    """In place of a group of workers: gives each response its next tokens, chunk by chunk, the last chunk first."""

    version: int = 0
    counters: Counter = field(default_factory=Counter)
    chunks: list[list[tuple[int, int]]] = field(default_factory=list)  # (ordinal, k) of what was written together

    def generate(self, chunks: list, begun: dict, most: int) -> Iterator[tuple[int, list, list]]:
        for number, chunk in reversed(list(enumerate(chunks))):
            written = []
            for r in chunk:
                before = begun[r.sample_uid]
                old = before.policy_version if before is not None else np.zeros(0, dtype=np.int64)
                n = min(len(old) + most, length_of(r))
                written.append(so_far(r, n, np.append(old, np.full(n - len(old), self.version))))
            self.chunks.append([(r.ordinal, r.k) for r in chunk])
            over = [t for t in written if t.finish_reason is not None]
            yield number, over, [t for t in written if t.finish_reason is None]

    def let_rest(self) -> None:
        """It does."""


def configured(**more: object) -> Config:
    sizes = {
        "rollout.batch_size": 24,
        "rollout.n_samples_per_prompt": 2,
        "rollout.chunk_size": 4,
        "rollout.max_new_tokens": MAX_TOKENS,
        "rollout.round_tokens": 8,
        "rollout.extra_prompts": 7,
        "ppo.mini_batch_size": 24,
        "run.steps": 6,
    }
    return load(None, {**tiny_models.LEARNER_SETTINGS, **sizes, **more}, folder=Path("/nowhere"))


class Rank:
    """One learner rank of a run whose learner does nothing."""

    def __init__(self, cfg: Config, index: int = 0, size: int = 1) -> None:
        rows = [{"prompt": f"the cat {i}"} for i in range(1000)]
        self.cfg, self.writer, self.backlog = cfg, Writer(), Backlog(in_rounds=True)
        self.prompts = PromptStream(rows, tiny_models.make_tokenizer(), cfg.data, run_id="r", seed=0)
        share = build.shares(cfg, index, size)
        self.plan = build.round_plan(cfg, share)
        self.rollouts = Rollouts(share, self.writer, plan=self.plan)
        self.ahead = Ahead(cfg, self.prompts, self.rollouts, list)

    def step(self, step: int) -> list[Trajectory]:
        self.writer.version = step - 1
        written, version = self.ahead.take(step)
        ones = [
            t.scored({"a": np.ones(len(t))}, {"a": np.ones(len(t), dtype=bool)}, scored_at=1.0)
            for chunk in written.pending
            for t in chunk
        ]
        batch = self.backlog.batch(written, sorted(ones, key=lambda t: t.order))
        account(self.cfg, written.requests, batch, set(), version=version, older=True)
        return batch

    def save(self, folder: Path) -> None:
        file = folder / under_way.file_of(self.plan.rank)
        file.parent.mkdir(exist_ok=True)
        pa.parquet.write_table(self.backlog.table(), file)
        (folder / "prompts.json").write_text(json.dumps(self.ahead.prompts_state))

    @classmethod
    def gone_on(cls, cfg: Config, folder: Path, index: int, size: int, *, before: int) -> "Rank":
        rank = cls(cfg, index, size)
        rank.prompts.restore(json.loads((folder / "prompts.json").read_text()))
        left, responses = under_way.read(Checkpoint(folder, {"ranks": before}), rank.plan)
        rank.rollouts.restore(left)
        rank.backlog.restore(left, responses)
        rank.ahead = Ahead(cfg, rank.prompts, rank.rollouts, list)
        return rank


def seen(batches: list[list[Trajectory]]) -> list[list[tuple]]:
    """Which samples each step was trained on, and all that is known of them."""
    return [[(t.order, len(t), t.policy_version.tolist(), t.finish_reason) for t in batch] for batch in batches]


def test_a_small_run_by_hand(monkeypatch):
    """Two prompts a step and one besides, rounds of 8 tokens."""
    monkeypatch.setattr(sys.modules[__name__], "length_of", lambda r: [8, 10, 9, 38, 4, 3][r.ordinal])
    cfg = configured(
        **{"rollout.batch_size": 2, "rollout.n_samples_per_prompt": 1, "ppo.mini_batch_size": 2},
        **{"rollout.extra_prompts": 1, "run.steps": 3},
    )
    it = Rank(cfg)
    # Step 1 takes 0, 1, 2. Round 1: 0 is over. Round 2: 1 and 2 are, by ordinal; 0 and 1 make the batch.
    assert [t.order[0] for t in it.step(1)] == [0, 1]
    # Step 2 takes 3 and 4; 2 is ready, a round is written all the same, and 4 is over in it.
    assert [t.order[0] for t in it.step(2)] == [2, 4]
    # Step 3 takes 5, the last one: it is over in the first round; 3 has its fifth round then: 8 in step 2, 30 in four.
    last = it.step(3)
    assert [t.order[0] for t in last] == [3, 5]
    assert last[0].policy_version.tolist() == [1] * 8 + [2] * 30
    chunks = [[o for o, _ in chunk] for chunk in it.writer.chunks]
    assert chunks == [[0, 1, 2], [1, 2], [3, 4], [3, 5], [3], [3], [3]]


def test_where_a_batch_is_ready_already_one_round_is_written_all_the_same(monkeypatch):
    """Or what is long would stand still under every policy whose batch is full without it."""
    monkeypatch.setattr(sys.modules[__name__], "length_of", lambda r: [8, 3, 8, 5, 30, 7][r.ordinal])
    cfg = configured(
        **{"rollout.batch_size": 2, "rollout.n_samples_per_prompt": 1, "ppo.mini_batch_size": 2},
        **{"rollout.extra_prompts": 2, "run.steps": 3},
    )
    it = Rank(cfg)
    assert [[t.order[0] for t in it.step(step)] for step in (1, 2)] == [[0, 1], [2, 3]]
    last = it.step(3)
    assert [t.order[0] for t in last] == [4, 5]
    assert last[0].policy_version.tolist() == [1] * 8 + [2] * 22 and {*last[1].policy_version.tolist()} == {1}


def test_prompts_of_one_round_are_ready_by_ordinal():
    way = UnderWay().take([request(o) for o in (40, 9, 8, 3)]).after_round([])
    assert way.ready == (3, 8, 9, 40)
    assert UnderWay(ready=(40,), prompts={40: ()}).take([request(3)]).after_round([]).ready == (40, 3)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_every_sample_is_trained_on_once_and_each_rank_has_its_quota_in_every_step(n_ranks, staleness):
    cfg = configured(**{"rollout.workers": 3, "rollout.max_staleness": staleness, "run.save_every": 100})
    ranks = [Rank(cfg, i, n_ranks) for i in range(n_ranks)]
    assert sum(rank.plan.quota for rank in ranks) == 12
    trained, waited, whole_versions = [], 0, 0
    for step in range(1, 7):
        under = []
        for rank in ranks:
            batch = rank.step(step)
            assert len(batch) == 2 * rank.plan.quota and batch == sorted(batch, key=lambda t: t.order)
            for t in batch:
                assert len(t) == length_of(t.request) and t.component_rewards
                assert (np.diff(t.policy_version) >= 0).all() and t.policy_version.max() < step
                whole_versions += len({*t.policy_version.tolist()}) > 1
            trained += [t.order for t in batch]
            under.append(rank.backlog.means(batch, lambda x: x)["partial/waiting"])
        assert sum(under) == (0 if step == 6 else 14)
        waited += sum(under)
    assert sorted(trained) == [(o, k) for o in range(72) for k in range(2)]
    assert waited and whole_versions > 5
    assert all(rank.backlog.oldest(lambda x: [x]) is None for rank in ranks)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_whoever_goes_on_from_a_checkpoint_has_what_the_uninterrupted_run_had(tmp_path, stop, n_ranks, staleness):
    """Staleness with nothing in flight at the checkpoint, as the run that was never stopped has it too."""
    cfg = configured(**{"rollout.max_staleness": staleness, "run.save_every": stop})
    for i in range(n_ranks):
        one = Rank(cfg, i, n_ranks)
        want = [one.step(step) for step in range(1, 7)]
        it = Rank(cfg, i, n_ranks)
        for step in range(1, stop + 1):
            it.step(step)
        assert it.backlog.table().num_rows
        it.save(tmp_path)
    for i in range(n_ranks):
        one, again = Rank(cfg, i, n_ranks), Rank.gone_on(cfg, tmp_path, i, n_ranks, before=n_ranks)
        want = [one.step(step) for step in range(1, 7)]
        got = [again.step(step) for step in range(stop + 1, 7)]
        assert seen(got) == seen(want[stop:])
        assert again.writer.chunks == one.writer.chunks[-len(again.writer.chunks) :]


def test_an_early_end_goes_on_as_if_nothing_had_been_asked_for_ahead(tmp_path):
    """With `max_staleness` two later batches are written when `run.patience` ends the run after step 2: their rounds
    are in no checkpoint, and happen again."""
    cfg = configured(**{"rollout.max_staleness": 2, "run.save_every": 100})
    it = Rank(cfg)
    for step in (1, 2):
        it.step(step)
    it.save(tmp_path)
    again = Rank.gone_on(cfg, tmp_path, 0, 1, before=1)
    trained = [t.order for step in range(3, 7) for t in again.step(step)]
    assert len(trained) == len({*trained}) == 4 * 24 and max(trained) == (71, 1)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 3), (2, 1), (3, 2)])
def test_another_number_of_ranks_loses_nothing_and_fills_every_batch(tmp_path, before, after):
    cfg = configured(**{"rollout.workers": 3})
    trained = []
    for i in range(before):
        it = Rank(cfg, i, before)
        trained += [t.order for step in (1, 2) for t in it.step(step)]
        it.save(tmp_path)
    for i in range(after):
        again = Rank.gone_on(cfg, tmp_path, i, after, before=before)
        for step in range(3, 7):
            batch = again.step(step)
            assert len(batch) == 2 * again.plan.quota
            trained += [t.order for t in batch]
    assert sorted(trained) == [(o, k) for o in range(72) for k in range(2)]


@pytest.mark.parametrize(
    ("prompts", "extra", "chunk", "n_ranks"), [(256, 32, 32, 8), (64, 16, 64, 4), (64, 32, 48, 2), (4, 3, 2, 3)]
)
def test_prompts_and_those_besides_are_dealt_out_evenly_whatever_the_chunks(prompts, extra, chunk, n_ranks):
    """A rank without any besides would write until its longest response is over, in every step, and all wait for it."""
    plans = [
        RoundPlan(tokens=1, prompts_per_step=prompts, chunk_size=chunk, rank=r, n_ranks=n_ranks) for r in range(n_ranks)
    ]
    quotas = [plan.quota for plan in plans]
    assert sum(quotas) == prompts and max(quotas) - min(quotas) <= 1
    besides = [sum(plan.owner(place) == plan.rank for place in range(extra)) for plan in plans]
    assert sum(besides) == extra and max(besides) - min(besides) <= 1 <= min(besides)
    for step in range(3):  # each rank takes as many as it trains on
        taken = range(step * prompts + extra, (step + 1) * prompts + extra)
        assert [sum(plan.owner(o) == plan.rank for o in taken) for plan in plans] == quotas


def test_a_rank_without_prompts_besides_is_refused():
    with pytest.raises(UserError, match="rollout.extra_prompts = 2: of the 3 learner processes some would have none"):
        build.shares(configured(**{"rollout.extra_prompts": 2, "rollout.workers": 3}), 0, 3)


def test_prompts_of_which_samples_were_dropped_go_on_without_them(tmp_path):
    """No reward could be had for 0/1 and for all of prompt 1: a batch is so much smaller, and so it is after a
    checkpoint, where no row speaks of them."""
    way = UnderWay().take([request(o, k) for o in range(3) for k in range(2)])
    rest = [so_far(request(2, k), 1, np.zeros(1, dtype=np.int64)) for k in range(2)]
    way = way.after_round(rest)
    assert way.ready == (0, 1)
    over = replace(so_far(request(0), length_of(request(0)), np.zeros(8, dtype=np.int64)), finish_reason="stop")
    again = UnderWay.restored([over, *rest], way.ready)
    assert [r.sample_uid for r in again.writing] == [t.request.sample_uid for t in rest]
    requests, left = again.batch(2)
    assert [(r.ordinal, r.k) for r in requests] == [(0, 0)] and list(left.prompts) == [2] and left.ready == ()


def test_what_was_not_asked_for_or_comes_again_is_a_fault():
    t = so_far(request(0), length_of(request(0)), np.zeros(length_of(request(0)), dtype=np.int64))
    waiting = UnderWay().take([request(0)])
    backlog = Backlog()
    assert backlog.batch(Written(requests=[], pending=[], seconds=0, under_way=waiting), [t]) == []
    for scored in ([t], [so_far(request(5), 1, np.zeros(1, dtype=np.int64))]):
        with pytest.raises(InvariantFault, match="not asked for, or came before"):
            backlog.batch(Written(requests=[], pending=[], seconds=0, under_way=waiting), scored)
    assert backlog.batch(Written(requests=[request(0)], pending=[], seconds=0), []) == [t]


def test_tokens_of_a_newer_policy_are_a_fault_and_of_older_ones_in_rounds_none():
    cfg, r = configured(), request(3)
    t = so_far(r, 3, np.array([0, 2, 4]))
    account(cfg, [r], [t], set(), version=4, older=True)
    for version, older in ((3, True), (4, False)):
        with pytest.raises(InvariantFault, match="tokens were written by weights of version"):
            account(cfg, [r], [t], set(), version=version, older=older)


def test_a_sample_that_is_missing_is_a_fault_unless_it_was_dropped():
    cfg, asked = configured(), [request(3), request(4), request(5)]
    came = [so_far(r, 3, np.zeros(3, dtype=np.int64)) for r in asked[:2]]
    account(cfg, asked, came, {asked[2].sample_uid}, version=0)
    for dropped in (set(), {asked[1].sample_uid}):
        with pytest.raises(InvariantFault, match=f"1 of 3 samples were lost.*{asked[2].sample_uid}"):
            account(cfg, asked, came, dropped, version=0)
    with pytest.raises(InvariantFault, match="0 came back"):
        account(cfg, asked, [], {r.sample_uid for r in asked}, version=0)


def test_short_responses_that_are_trained_first_show_in_the_length_ratio():
    """Trained: 8 tokens. Waiting: 3 over with 9, 2 under way with 16 so far: mean of all (8 + 9 + 16) / 3 = 11."""
    short, over, under = (so_far(request(i), n, np.zeros(n, dtype=np.int64)) for i, n in ((0, 8), (2, 9), (3, 16)))
    way = UnderWay().take([request(2), request(3)]).after_round([under])
    backlog = Backlog(in_rounds=True)
    written = Written(requests=[request(0)], pending=[], seconds=0, rounds=2, under_way=way)
    trained = backlog.batch(written, [short, over])
    want = {"partial/waiting": 2, "partial/length_ratio": pytest.approx(8 / 11), "partial/rounds": 2}
    assert backlog.means(trained, lambda x: x) == want
    assert backlog.means(trained, lambda x: [2 * v for v in x])["partial/waiting"] == 4
    assert Backlog().means(trained, lambda x: x) == {} and Backlog().oldest(lambda x: 1 / 0) is None
    assert backlog.oldest(lambda mine: [None, mine, 9]) == 2


def test_dealing_to_as_many_ranks_leaves_everything_where_it_was():
    saved = [([], [4, 1]), ([], [3])]
    assert deal(saved, 2, 1, lambda i: 0) == ([], [3])
    assert deal(saved, 1, 0, lambda i: 0) == ([], [4, 1, 3])


def test_a_worker_goes_on_under_new_weights_and_tokens_keep_the_version_that_wrote_them():
    """Two rounds under version -1, as loaded, then new weights; the rest is what these write after what is there."""
    models = [tiny_models.make_model("gpt2", seed=seed) for seed in (1, 2)]
    filters = Filters(top_p=0.9)
    engines = [TransformersEngine(m, (0, 7), temperature=1.0, max_new_tokens=12, filters=filters) for m in models]
    worker = RolloutWorker("w", lambda: engines[0], tiny_models.make_tokenizer, threads=1, deterministic=False)
    asked = tiny_models.make_requests(6)

    def written(asked: list, begun: list | None = None, most: int | None = None) -> tuple[list, list]:
        over, receipt = worker.generate(asked, begun, most)
        assert receipt.places == [*range(len(asked))]
        return over, receipt.unfinished

    over, left = written(asked, None, 3)
    uids = [t.request.sample_uid for t in left]
    assert len(over) + len(left) == 6 and len(left) > 2 and all(len(t) == 3 for t in left)
    _, left = written([t.request for t in left], left, 2)
    manifest, buckets, digests = packed(named_tensors(engines[1].model), 4)
    probe = Probe(prompt_ids=np.array([[1, 2]]), response_ids=np.array([[3]]))
    worker.take_update(manifest, probe, digests, [None] * len(buckets), *buckets)
    begun = [Begun(response_ids=t.response_ids, logprobs=t.rollout_logprobs, kept=t.kept) for t in left]
    want = engines[1].generate([t.request for t in left], begun)
    over, none = written([t.request for t in left], left)
    assert none == [] and {t.request.sample_uid for t in over} <= {*uids} and len(over) > 2
    for t, g in zip(over, want, strict=True):
        assert t.response_ids.tolist() == g.response_ids.tolist() and t.finish_reason == g.finish_reason
        assert t.policy_version.tolist() == [-1] * 5 + [4] * (len(t) - 5)
        assert len(t.token_offsets) == len(t.kept) == len(t) and t.action_mask.all()


# ---------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"round_tokens": None}, "rollout.extra_prompts = 7: does nothing without rollout.round_tokens"),
        ({"round_tokens": 40}, "rollout.round_tokens = 40: does nothing: no response is longer than"),
        ({"extra_prompts": 13}, "rollout.extra_prompts = 13: is more than the 12 prompts of a step"),
        ({"stream_size": 2}, "rollout.stream_size = 2: does nothing with rollout.round_tokens"),
        ({"environment": "t.py:Tool"}, "rollout.round_tokens = 8: what an environment holds of a response"),
    ],
)
def test_what_does_not_go_together_is_refused(how, words):
    with pytest.raises(UserError, match=words):
        configured(**{f"rollout.{key}": value for key, value in how.items()})


def test_a_learner_process_without_workers_is_refused():
    cfg = configured(**{"rollout.workers": 2})
    build.shares(cfg, 1, 2)
    with pytest.raises(UserError, match=r"rollout.workers = 2: with rollout.round_tokens each of the 3 learner"):
        build.shares(cfg, 0, 3)
    build.shares(configured(**{"rollout.round_tokens": None, "rollout.extra_prompts": 0}), 2, 3)


def test_a_row_that_no_checkpoint_could_give_back_is_refused_at_the_start(tmp_path):
    tiny_models.save_model(tmp_path / "m")
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"], "raw": [b"x", b"y"]}), tmp_path / "p.parquet")
    (tmp_path / "r.py").write_text("def f(completions, raw, **_):\n    return [0.0 for _ in completions]\n")
    where = {"model.path": str(tmp_path / "m"), "data.path": str(tmp_path / "p.parquet")}
    where |= {"rewards.a.fn": f"{tmp_path}/r.py:f", "data.max_prompt_tokens": 20}
    with pytest.raises(UserError, match=r"rollout.round_tokens = 8: .*its column 'raw' holds what JSON cannot"):
        _read_input(configured(**where), Inline())
    _read_input(configured(**where, **{"rollout.round_tokens": None, "rollout.extra_prompts": 0}), Inline())
