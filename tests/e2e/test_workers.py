"""Rollout workers and the reward server as real actors: what they write does not depend on how many they are."""

import time

import numpy as np
import psutil
import pytest
import ray

import tiny_models
from core.config import load
from core.faults import RewardFault
from core.trajectory import Trajectory
from launch import build, cluster

pytestmark = pytest.mark.slow
SLOW = """
import time
from pathlib import Path

class Slow:
    def __init__(self, go_on):
        self.go_on, self.calls = Path(go_on), 0

    def step(self, turns, row):
        self.calls += 1
        while self.calls > 12 and not self.go_on.exists():
            time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    tiny_models.save_model(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "the cat {i}", "n": {i}}}\n' for i in range(24)))
    (folder / "r.py").write_text(
        "def length(completion_ids, **_):\n    return [[1.0] * len(i) for i in completion_ids]\n"
    )
    cfg = load(
        None,
        {
            "model.path": str(folder / "model"),
            "model.dtype": "float32",
            "data.path": str(folder / "prompts.jsonl"),
            "rewards.length.fn": f"{folder}/r.py:length",
            "rollout.batch_size": 48,
            "rollout.n_samples_per_prompt": 2,
            "rollout.max_new_tokens": 16,
            "rollout.chunk_size": 8,
            "ppo.mini_batch_size": 48,
            "run.deterministic": True,
        },
    )
    cluster.prepare_environment()
    with cluster.ray_session(cfg):
        yield cfg


def written(cfg, n_workers: int) -> list[Trajectory]:
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"workers": n_workers})})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group = build.rollouts(cfg, tokenizer, "cpu", print)
    rewards = build.reward_client(cfg, None, print)
    try:
        rewards.wait_ready()
        group.wait_ready()
        assert len(set(group.pids.values())) == n_workers
        return rewards.collect(group.start(prompts.take(24, 2), rewards.submit).result()[0])
    finally:
        group.close()
        rewards.close()


@pytest.fixture(scope="module")
def by_one(cfg) -> list[Trajectory]:
    return written(cfg, 1)


@pytest.mark.parametrize("n_workers", [2, 4])
def test_the_same_bits_from_any_number_of_workers(cfg, by_one, n_workers):
    got = written(cfg, n_workers)
    assert [t.order for t in got] == [t.order for t in by_one] == [(i, k) for i in range(24) for k in range(2)]
    for a, b in zip(by_one, got, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.rollout_logprobs.tobytes() == b.rollout_logprobs.tobytes()
        assert a.request.sample_uid == b.request.sample_uid


def test_filters_stop_strings_and_what_was_kept_on_their_way(cfg, by_one):
    """Through workers and reward server, which has the reference: the same ids and sets from any number of workers, and
    log-probs of both over one set, which are equal where both models are."""
    settings = {"top_p": 0.9, "stop_strings": ["a"]}
    cfg = cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update=settings)})
    cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"reference": "reward_server"})})
    tokenizer = build.load_tokenizer(cfg.model.path)
    one, two = written(cfg, 1), written(cfg, 2)
    for a, b in zip(one, two, strict=True):
        assert a.response_ids.tolist() == b.response_ids.tolist()
        assert a.kept.ids.tolist() == b.kept.ids.tolist() and a.kept.starts.tolist() == b.kept.starts.tolist()
        assert len(a.kept) == len(a) and a.kept.hold(a.response_ids, a.action_mask)
        np.testing.assert_allclose(a.ref_logprobs, a.rollout_logprobs, atol=1e-5)
        text = tokenizer.decode(a.response_ids, skip_special_tokens=True)
        said = tokenizer.decode(a.response_ids[:-1], skip_special_tokens=True)
        assert "a" not in said and ("a" not in text or a.finish_reason == "stop")
    assert sum("a" in tokenizer.decode(t.response_ids) for t in one) > 5
    assert all(t.kept is None for t in by_one)
    assert any(len(t.kept.ids) > len(t) for t in one)


def test_replicas_that_join_chunks_score_the_same(cfg, by_one):
    resources = cfg.resources.model_copy(update={"reward_servers": 2, "reward_batch_size": 16})
    cfg = cfg.model_copy(update={"resources": resources})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group, rewards = build.rollouts(cfg, tokenizer, "cpu", print), build.reward_client(cfg, None, print)
    try:
        assert len(set(rewards.wait_ready())) == 2
        got = rewards.collect(group.start(prompts.take(24, 2), rewards.submit).result()[0])
    finally:
        group.close()
        rewards.close()
    for a, b in zip(by_one, got, strict=True):
        assert a.component_rewards["length"].tobytes() == b.component_rewards["length"].tobytes()


def test_one_sample_that_makes_a_component_raise_costs_that_sample_alone(cfg, tmp_path):
    """The call fails for its whole chunk; tried again alone, the innocent are scored."""
    (tmp_path / "r.py").write_text("def inverse(n, **_):\n    return [1 / (x - 5) for x in n]\n")
    component = cfg.rewards["length"].model_copy(update={"fn": f"{tmp_path}/r.py:inverse"})
    run = cfg.run.model_copy(update={"max_dropped_frac": 0.05})
    notes: list[str] = []
    cfg = cfg.model_copy(update={"rewards": {"inverse": component}, "run": run})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group, rewards = build.rollouts(cfg, tokenizer, "cpu", print), build.reward_client(cfg, None, notes.append)
    try:
        got = rewards.collect(group.start(prompts.take(24, 2), rewards.submit).result()[0])
    finally:
        group.close()
        rewards.close()
    assert len(got) == 46 and not [t for t in got if t.request.columns["n"] == 5]
    assert rewards.counters == {"scores_retried": 8, "samples_dropped": 2}  # a chunk is 4 prompts x 2 samples
    assert len(rewards.dropped) == 2 and not rewards.dropped & {t.request.sample_uid for t in got}
    assert all("ZeroDivisionError" in note for note in notes)
    assert notes[0].startswith("8 samples have no reward yet") and notes[1].startswith("2 samples dropped")


def test_a_finished_chunk_is_scored_while_the_next_is_not_yet_written(cfg, tmp_path):
    """No clock decides: the second chunk is held back until the first one was scored. A client that waits for all
    chunks before it sends one would never see the second."""
    (tmp_path / "r.py").write_text(
        "from pathlib import Path\n"
        "def seen(n, **_):\n"
        "    Path(__file__).with_name(f'scored-{min(n)}').touch()\n"
        "    return [0.0] * len(n)\n"
    )
    component = cfg.rewards["length"].model_copy(update={"fn": f"{tmp_path}/r.py:seen"})
    cfg = cfg.model_copy(update={"rewards": {"seen": component}})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group, rewards = build.rollouts(cfg, tokenizer, "cpu", print), build.reward_client(cfg, None, print)

    def one_after_the_other(chunks):
        yield next(chunks)
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("scored-*")):
            assert time.monotonic() < deadline, "the first chunk was not scored before the second was handed over"
            time.sleep(0.02)
        yield from chunks

    try:
        requests = prompts.take(8, 2)
        pending, _ = group.start(requests, lambda chunks: rewards.submit(one_after_the_other(chunks))).result()
        assert len(rewards.collect(pending)) == 16
    finally:
        group.close()
        rewards.close()


def test_an_answer_that_is_not_per_completion_fails_and_is_not_tried_alone(cfg, tmp_path):
    """One entry for one completion would fit: asked about samples one by one, a wrong function would look right."""
    (tmp_path / "r.py").write_text("def one(completions, **_):\n    return [1.0]\n")
    component = cfg.rewards["length"].model_copy(update={"fn": f"{tmp_path}/r.py:one"})
    cfg = cfg.model_copy(update={"rewards": {"one": component}})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group, rewards = build.rollouts(cfg, tokenizer, "cpu", print), build.reward_client(cfg, None, print)
    try:
        with pytest.raises(RewardFault, match="answered 1 entries for 8 completions"):
            rewards.collect(group.start(prompts.take(24, 2), rewards.submit).result()[0])
    finally:
        group.close()
        rewards.close()
    assert rewards.counters["scores_retried"] == 0


def test_trajectories_are_whole(by_one):
    assert len({t.request.sample_uid for t in by_one}) == 48
    for t in by_one:
        n = len(t)
        assert t.component_rewards["length"].sum() == n and t.component_mask["length"].all()
        assert t.token_offsets.shape == (n, 2) and t.action_mask.all() and (t.policy_version == -1).all()
        assert t.request.columns["n"] in range(24) and t.request.columns["prompt"].startswith("the cat")
        assert t.scored_at >= t.finished_at > 0
    assert len({tuple(t.response_ids.tolist()) for t in by_one}) > 40  # samples of one prompt differ
    assert ray.is_initialized()


def test_workers_that_free_their_devices_after_a_call_write_the_next(cfg):
    """Only vLLM has something to free, on a GPU; that all are asked, waited for and go on is the same everywhere."""
    rollout = cfg.rollout.model_copy(update={"sleep": True, "workers": 2})
    cfg = cfg.model_copy(update={"rollout": rollout})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    group = build._group(cfg, tokenizer, "cpu", print, [0, 1])
    try:
        group.wait_ready()
        for attempt in range(2):
            chunks = [prompts.take(4, 2), prompts.take(4, 2)]
            written = [ray.get(ref, timeout=60) for _, ref, _ in group.generate(chunks)]
            assert [len(trajectories) for trajectories in written] == [8, 8]
            assert group.counters["worker_lost"] == attempt
            if not attempt:  # it is found dead when it is given its next chunk
                ray.kill(group._slots[0].actor)
    finally:
        group.close()


def test_parts_of_a_chunk_are_scored_while_it_is_written_and_a_lost_worker_costs_what_is_missing(cfg, by_one, tmp_path):
    """One worker, one chunk, and an environment that holds it up after a few responses. After two parts were scored the
    worker is killed: another one writes the rest, nothing twice, and no token is another."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "r.py").write_text(
        "from pathlib import Path\n"
        "def seen(n, **_):\n"
        f"    Path({str(tmp_path)!r}, 'scored-' + '-'.join(map(str, n))).touch()\n"
        "    return [1.0] * len(n)\n"
    )
    settings = {"workers": 1, "chunk_size": 48, "stream_size": 2, "environment": f"{tmp_path}/slow.py:Slow"}
    settings |= {"environment_options": {"go_on": str(tmp_path / "go")}, "environment_timeout_s": 120}
    rollout = cfg.rollout.model_copy(update=settings)
    component = cfg.rewards["length"].model_copy(update={"fn": f"{tmp_path}/r.py:seen"})
    cfg = cfg.model_copy(update={"rollout": rollout, "rewards": {"seen": component}})
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    notes: list[str] = []
    group, rewards = build.rollouts(cfg, tokenizer, "cpu", notes.append), build.reward_client(cfg, None, print)
    handed_on = []

    def killed_after_two(parts):
        for part in parts:
            handed_on.append(part)
            yield part
            if len(handed_on) == 2:
                deadline = time.monotonic() + 120
                while len(list(tmp_path.glob("scored-*"))) < 2:
                    assert time.monotonic() < deadline, "two parts were not scored before the others were written"
                    time.sleep(0.02)
                psutil.Process(group.pids["worker-0"]).kill()
                (tmp_path / "go").touch()

    try:
        group.wait_ready()
        pending, _ = group.start(prompts.take(24, 2), lambda parts: rewards.submit(killed_after_two(parts))).result()
        got = rewards.collect(pending)
    finally:
        group.close()
        rewards.close()
    assert len(handed_on) > 3 and group.counters["worker_lost"] == 1
    again = group.counters["prompts_redispatched"]
    assert 0 < again < 48 and rewards.counters["duplicates_dropped"] == 0
    assert sum(t.request.attempt == 1 for t in got) == again
    for a, b in zip(by_one, got, strict=True):
        assert a.request.sample_uid == b.request.sample_uid and a.response_ids.tobytes() == b.response_ids.tobytes()
