"""Plans held in a real Ray of two nodes that claim GPUs: Ray deals them out and counts them, nobody uses them."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group

import tiny_models
from cards_run import Run
from core.config import load
from core.faults import ProcessFault, UserError
from core.schema import Config
from launch import build, cluster, ray_auth, reservation
from launch.reservation import Seats, reserve, seats_of_run
from trainer.ranks import Ranks

pytestmark = pytest.mark.slow

GPUS = (4, 2)  # of the two nodes
AT_ONCE_S = 3.0
OTHER_JOB = """
import os, sys
os.environ["RAY_AUTH_MODE"] = "token"
import ray
ray.init(address=sys.argv[1], logging_level="WARNING")
group = ray.util.placement_group([{"GPU": 3}], name="theirs")
assert group.wait(60)
print("holds", flush=True)
sys.stdin.read()
"""
OTHER_RANK = """
import os, pickle, sys
os.environ["RAY_AUTH_MODE"] = "token"
import ray
seats = pickle.loads(bytes.fromhex(sys.argv[2]))
ray.init(address=sys.argv[1], logging_level="WARNING")
@ray.remote(num_cpus=0)
class Where:
    def gpus(self):
        return ray.get_gpu_ids()
print(ray.get(Where.options(**seats.worker(1)).remote().gpus.remote(), timeout=60))
"""


class Nodes:
    """The cluster, and what it is known by."""

    def __init__(self) -> None:
        memory = {"object_store_memory": 100 * 2**20, "num_cpus": 2}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_gpus": GPUS[0], **memory})
        self.second = self.cluster.add_node(num_gpus=GPUS[1], **memory)
        self.address = self.cluster.address
        self.a, self.b = self.cluster.head_node.node_id, self.second.node_id


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    cluster.prepare_environment()
    ray_auth.private_token(make=True)
    enable_token_auth_by_default()  # as ray.init does it for a Ray that it starts; a Cluster does not
    started = Nodes()
    try:
        with cluster.ray_session(configured(Path("nowhere"), resources__ray_address=started.address)):
            yield started
    finally:
        started.cluster.shutdown()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("placement")
    tiny_models.save_model(folder / "model", "gpt2")
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "the cat {i}"}}\n' for i in range(8)))
    (folder / "r.py").write_text(
        "def brief(completion_ids, **_):\n    return [-0.1 * len(x) for x in completion_ids]\n"
    )
    return folder


def configured(task: Path, **overrides: object) -> Config:
    values = {
        "model.path": str(task / "model"),
        "model.dtype": "float32",
        "data.path": str(task / "prompts.jsonl"),
        "rewards.brief.fn": f"{task}/r.py:brief",
        "rollout.batch_size": 8,
        "rollout.chunk_size": 2,
        "rollout.max_new_tokens": 6,
        "rollout.timeout_s": 90,
        "ppo.mini_batch_size": 8,
        "run.name": "mine",
    }
    return load(None, values | {name.replace("__", "."): value for name, value in overrides.items()})


@contextmanager
def given_back() -> Iterator[None]:
    """A block whose reservations end with it, as with a run."""
    try:
        yield
    finally:
        for name, state in groups().items():
            if name.startswith("tokenppo-mine-") and state != "REMOVED":
                remove_placement_group(ray.util.get_placement_group(name))
        wait_for(lambda: sum(free().values()) == sum(GPUS))


@contextmanager
def reserved(cfg: Config, learners: list[tuple[str, str]], ranks: int = 1) -> Iterator[Seats]:
    """The seats of a run whose learners compute on those GPUs."""
    with given_back():
        yield reserve(cfg, "cuda", learners, ranks)


def free() -> dict[str, float]:
    return reservation._gpus(reservation._places())[1]


def wait_for(what, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, f"free: {free()}, groups: {groups()}"
        time.sleep(0.05)


def groups() -> dict[str, str]:
    """Name -> state of every group; of those of one name the last that was made."""
    return {group["name"]: group["state"] for group in sorted(placement_group_table().values(), key=_alive_last)}


def _alive_last(group: dict) -> bool:
    return group["state"] != "REMOVED"


def where(actor) -> tuple[str, list[str], str | None]:
    """Node, GPUs by Ray's count, and what CUDA would see, of a real actor."""

    def look(self) -> tuple[str, list[str], str | None]:
        gpus = [str(gpu) for gpu in ray.get_gpu_ids()]
        return ray.get_runtime_context().get_node_id(), gpus, os.environ.get("CUDA_VISIBLE_DEVICES")

    return ray.get(actor.__ray_call__.remote(look), timeout=60)


def seated(options: dict) -> object:
    """An actor in a worker's place, where only the place matters."""

    class Nobody: ...

    return ray.remote(Nobody).options(num_cpus=0, **options).remote()


def test_workers_and_rewards_beside_their_learners_write_score_and_are_replaced_there(nodes, task):
    """Two learners in the order that Ray would not choose: worker 0 belongs on GPU 1."""
    cfg = configured(task, rollout__workers=2, resources__reward_gpus=0.25)
    with reserved(cfg, [(nodes.a, "1"), (nodes.a, "0")], ranks=2) as seats:
        assert (
            len(seats.plan.lines) == 1 and "learner 1 + worker 1 (0.75) + reward server 1 (0.25)" in seats.plan.lines[0]
        )
        assert sum(free().values()) == sum(GPUS) - 2
        tokenizer = build.load_tokenizer(cfg.model.path)
        prompts, _ = build.prompt_streams(cfg, tokenizer)
        notes: list[str] = []
        workers = build.rollouts(cfg, tokenizer, "cpu", notes.append, seats=seats)
        rewards = build.reward_client(cfg, None, notes.append, rank=1, seats=seats)
        slots = workers._group._slots
        try:
            rewards.wait_ready()
            workers.wait_ready()
            assert [where(slot.actor) for slot in slots] == [(nodes.a, ["1"], "1"), (nodes.a, ["0"], "0")]
            assert where(rewards._servers[0]) == (nodes.a, ["0"], "0")
            psutil.Process(workers.pids["worker-0"]).kill()
            psutil.Process(ray.get(rewards._servers[0].hello.remote())).kill()
            pending, _ = workers.start(prompts.take(8, 1), rewards.submit).result()
            assert len(rewards.collect(pending)) == 8
            workers.wait_ready()
            assert workers.counters["worker_lost"] == rewards.counters["worker_lost"] == 1, notes
            assert where(slots[0].actor) == (nodes.a, ["1"], "1") and slots[0].incarnation == 1
            assert where(rewards._servers[0]) == (nodes.a, ["0"], "0")
        finally:
            workers.close()
            rewards.close()


def test_apart_on_two_nodes_nobody_gets_the_gpu_of_a_learner(nodes, task):
    cfg = configured(task, rollout__workers=4, rollout__placement="apart")
    with reserved(cfg, [(nodes.a, "0"), (nodes.a, "1")], ranks=2) as seats:
        actors = [seated(seats.worker(number)) for number in range(4)]
        found = [where(actor)[:2] for actor in actors]
        assert sorted(found) == sorted([(nodes.a, ["2"]), (nodes.a, ["3"]), (nodes.b, ["0"]), (nodes.b, ["1"])])
        assert sum(free().values()) == 0
        # Another driver, as every rank but the first is: the same GPU, once its holder is gone.
        ray.kill(actors[1])
        command = [sys.executable, "-c", OTHER_RANK, nodes.address, pickle.dumps(seats).hex()]
        environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[1])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == f"[{found[1][1][0]}]", done.stderr
    assert groups()["tokenppo-mine-learners"] == groups()["tokenppo-mine-others"] == "REMOVED"


def test_a_worker_on_several_gpus_beside_as_many_learners(nodes, task):
    cfg = configured(task, rollout__engine="vllm", rollout__tensor_parallel_size=2, rollout__workers=1)
    with reserved(cfg, [(nodes.a, "0"), (nodes.a, "1"), (nodes.b, "0")], ranks=3) as seats:
        node, gpus, visible = where(seated(seats.worker(0)))
        assert (node, sorted(gpus)) == (nodes.a, ["0", "1"]) and sorted(visible.split(",")) == ["0", "1"]


def test_shares_of_one_gpu_without_learners_as_in_an_evaluation(nodes, task):
    cfg = configured(task, rollout__workers=3, rollout__gpus_per_worker=0.3)
    with reserved(cfg, []) as seats:
        found = [where(seated(seats.worker(number)))[:2] for number in range(3)]
        assert len({(node, *gpus) for node, gpus in found}) == 1
        assert round(sum(free().values()), 4) == sum(GPUS) - 0.9


def test_what_the_cluster_does_not_have_is_an_error_at_once(nodes, task):
    cfg = configured(task, rollout__workers=6, rollout__gpus_per_worker=1, rollout__placement="apart")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"7 GPUs wanted in all: there is no room on 6 GPUs .*rollout.workers <= 5"):
        reserve(cfg, "cuda", [(nodes.a, "0")], 1)
    assert time.monotonic() - started < AT_ONCE_S
    assert sum(free().values()) == sum(GPUS)


def test_what_another_job_holds_is_an_error_that_names_it(nodes, task):
    cfg = configured(task, rollout__workers=4, rollout__gpus_per_worker=1, rollout__placement="apart")
    command = [sys.executable, "-c", OTHER_JOB, nodes.address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "holds\n"
        started = time.monotonic()
        with pytest.raises(ProcessFault, match=r"only 3 are free .*has given the others to theirs \(3\)"):
            reserve(cfg, "cuda", [(nodes.b, "0")], 1)
        assert time.monotonic() - started < AT_ONCE_S + reservation.FREED_S
        other.kill()
    with reserved(cfg, [(nodes.b, "0")]) as seats:  # it ended a moment ago, and Ray may not have noticed
        assert len(seats.plan.workers) == 4


def test_a_learner_on_a_gpu_that_ray_gave_away_is_told_so(nodes, task):
    cfg = configured(task, rollout__workers=1)
    with (
        pytest.raises(UserError, match=r"rank 0 computes on GPU 3 .*CUDA_VISIBLE_DEVICES=0,"),
        reserved(cfg, [(nodes.a, "3")]),
    ):
        pass


def test_a_rank_says_where_it_computes(nodes, task, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    notes: list[str] = []
    with given_back():
        device = SimpleNamespace(type="cuda", index=0)
        seats = seats_of_run(configured(task, rollout__workers=2), Ranks(), device, notes.append)
        here = ray.get_runtime_context().get_node_id()
        assert where(seated(seats.worker(1)))[:2] == (here, ["0"])
    (line,) = notes
    assert line.startswith("GPUs of ") and line.endswith(": learner 0 + workers 0, 1 (0.5 each)")


def test_free_gpus_in_pieces_are_an_error_at_the_deadline(nodes, task, monkeypatch):
    """Ray's count of what is free on a node adds them up: 0.4 of one GPU and 0.4 of another have no room for 0.5."""
    monkeypatch.setattr(reservation, "READY_S", 2.0)
    cfg = configured(task, resources__reward_gpus=0.5, resources__reward_placement="apart")
    label = {reservation.NODE: nodes.b}
    theirs = ray.util.placement_group([{"GPU": 0.6}] * 2, bundle_label_selector=[label] * 2)
    assert theirs.wait(60)
    with given_back():
        try:
            all_of_a = [(nodes.a, str(gpu)) for gpu in range(4)]
            words = "within 2 s.*what is free is in pieces.*a placement group without a name \\(1.2\\)"
            with pytest.raises(ProcessFault, match=words):
                reserve(cfg, "cuda", all_of_a, 1)
        finally:
            remove_placement_group(theirs)


def run_with_rewards_on_gpus(nodes: Nodes, task: Path, folder: Path, *options: str) -> Run:
    values = configured(task, resources__reward_gpus=0.5, resources__ray_address=nodes.address)
    keys = ("model.path", "model.dtype", "data.path", "rewards.brief.fn", "rollout.batch_size", "rollout.chunk_size")
    keys += ("rollout.max_new_tokens", "ppo.mini_batch_size", "resources.reward_gpus", "resources.ray_address")
    given: list[str] = []
    tree = values.model_dump(mode="json")
    for key in keys:
        leaf = tree
        for part in key.split("."):
            leaf = leaf[part]
        given += [f"--{key}", str(leaf)]
    return Run(folder, *given, "--rollout.workers", "1", "--log.trackers", "[]", *options, config=None)


def test_two_ranks_train_and_give_back_what_they_held(nodes, task, tmp_path):
    run = run_with_rewards_on_gpus(nodes, task, tmp_path / "two", "--run.steps", "2", "--accelerate", "ddp")
    assert run.end(240) == 0, run.words()
    assert "reward servers 0, 1 (0.5 each)" in run.words(), run.words()
    wait_for(lambda: groups()["tokenppo-two-others"] == "REMOVED" and sum(free().values()) == sum(GPUS))


def test_a_killed_run_holds_nothing(nodes, task, tmp_path):
    run = run_with_rewards_on_gpus(nodes, task, tmp_path / "killed", "--run.steps", "100000")
    run.wait_for(lambda: run.rows())
    assert groups()["tokenppo-killed-others"] == "CREATED" and sum(free().values()) == sum(GPUS) - 0.5
    os.kill(run.pids()["learner"], signal.SIGKILL)
    wait_for(lambda: groups()["tokenppo-killed-others"] == "REMOVED" and sum(free().values()) == sum(GPUS))
    assert run.end(60) != 0


def test_too_much_for_the_cluster_is_exit_2_before_anything_is_loaded(nodes, task, tmp_path):
    run = run_with_rewards_on_gpus(nodes, task, tmp_path / "much", "--resources.reward_servers", "13")
    assert run.end(120) == 2, run.words()
    assert "resources.reward_gpus = 0.5 for 13 reward servers, 7 GPUs wanted in all" in run.words().splitlines()[-1]
    assert json.loads((tmp_path / "much" / "summary.json").read_text())["exit"] == 2


def test_a_worker_whose_node_is_gone_ends_the_run_by_name(nodes, task):
    """The last test here: it takes the second node away."""
    cfg = configured(task, rollout__workers=1, rollout__gpus_per_worker=1, rollout__placement="apart")
    seats = reserve(cfg, "cuda", [(nodes.b, "0")], 1)
    tokenizer = build.load_tokenizer(cfg.model.path)
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    workers = build.rollouts(cfg, tokenizer, "cpu", print, seats=seats)
    try:
        workers.wait_ready()
        assert where(workers._group._slots[0].actor)[:2] == (nodes.b, ["1"])
        nodes.cluster.remove_node(nodes.second)
        started = time.monotonic()
        with pytest.raises(ProcessFault, match=r"worker-0 has its GPU on node .*lost that node"):
            list(workers._group.generate([prompts.take(2, 1)]))
        assert time.monotonic() - started < cfg.rollout.timeout_s
    finally:
        workers.close()


def test_workers_on_cpus_leave_with_their_node_wait_for_one_and_move_to_one_that_joins(nodes, task):
    """Apart from the learner, on two nodes. The test before this one took the second node away; this makes its own."""
    for node in list(nodes.cluster.worker_nodes):
        nodes.cluster.remove_node(node)
    memory = {"object_store_memory": 100 * 2**20, "num_cpus": 2}
    others = {node.node_id: node for node in (nodes.cluster.add_node(**memory) for _ in range(2))}
    options = {"rollout__placement": "apart", "resources__device": "cpu", "resources__ray_address": nodes.address}
    cfg = configured(task, rollout__workers=2, **options)
    seats = reserve(cfg, "cpu", [], 1, (nodes.a,))
    tokenizer, notes = build.load_tokenizer(cfg.model.path), []
    prompts, _ = build.prompt_streams(cfg, tokenizer)
    workers = build.rollouts(cfg, tokenizer, "cpu", notes.append, seats=seats)
    group = workers._group
    large = {"blob": "x" * 300_000}  # so that what is written stays in the store of the worker's node
    chunks = [[replace(r, columns=r.columns | large) for r in prompts.take(2, 1)] for _ in range(4)]

    def all_written() -> None:
        done = []
        for number, written, _ in group.generate(chunks):
            assert ray.wait([written], timeout=0)[0], "it is not here yet, and its node may be lost"
            done.append(number)
        assert sorted(done) == [0, 1, 2, 3]

    try:
        workers.wait_ready()
        first, second = (where(slot.actor)[0] for slot in group._slots)
        assert {first, second} == set(others)
        nodes.cluster.remove_node(others[second])
        all_written()
        workers.wait_ready()
        assert [where(slot.actor)[0] for slot in group._slots] == [first, first] and group.counters["worker_lost"] == 1
        third = nodes.cluster.add_node(**memory)
        all_written()
        workers.wait_ready()
        assert [where(slot.actor)[0] for slot in group._slots] == [first, third.node_id], notes
        assert group.counters["worker_lost"] == 1 and "worker-1.1 moves" in "\n".join(notes)
        nodes.cluster.remove_node(others[first])
        nodes.cluster.remove_node(third)
        with ThreadPoolExecutor() as threads:
            writing = threads.submit(all_written)
            wait_for(lambda: "\n".join(notes).count("waits for one to join") == 2)
            fourth = nodes.cluster.add_node(**memory)
            writing.result(120)
        workers.wait_ready()
        assert {where(slot.actor)[0] for slot in group._slots} == {fourth.node_id}
        nodes.cluster.remove_node(fourth)
        group._timeout_s = 2.0
        with pytest.raises(ProcessFault, match=r"on node .*, which .*; no other node may have it, and none has joined"):
            list(group.generate(chunks))
    finally:
        workers.close()
