"""`tokenppo doctor` as a whole: does a configuration fit, deadlines, lines, JSON, exit codes, the page.

What its single checks say is in tests/test_doctor_checks.py.
"""

import argparse
import json
import os
import threading
from pathlib import Path

import pytest

from core.config import load
from core.faults import UserError
from launch import memory, placement
from launch.doctor import examination, fit, network
from launch.doctor.finding import Check, Finding, Situation, fail, fail_of_config, ok, warn
from launch.memory import GIB, ModelShape, Sharding
from test_doctor_checks import one

ROOT = Path(__file__).parents[1]


# ----------------------------------------------------------------------------------------------------------------- fit

SHAPE = ModelShape(
    parameters=500_000_000,
    trunk=400_000_000,
    layers=24,
    hidden=1024,
    inner=4096,
    query=1024,
    key=256,
    vocabulary=50_000,
)


def configured(**settings: object) -> object:
    given = {"model.path": "m", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f", "rollout.workers": 2}
    return load(None, given | {name.replace("__", "."): value for name, value in settings.items()})


def judge(room_gib: float, cfg: object = None, sharding: Sharding | None = None, **machine: object) -> list[Finding]:
    host = fit.Machine(host=room_gib * GIB, **machine)
    return fit.judge_fit(cfg or configured(), SHAPE, sharding or Sharding(), host)


def test_a_run_fits_or_not_or_with_short_prompts_only():
    (place,) = fit.places(configured(), SHAPE, Sharding(), fit.Machine(host=1.0))
    sizes = place.certain / GIB, place.most / GIB
    assert sizes[0] < sizes[1]
    for room, status in ((sizes[1] * 1.01, "ok"), (sum(sizes) / 2, "warn"), (sizes[0] * 0.99, "FAIL")):
        assert one(judge(room))[0] == status
    assert judge(sizes[0] * 0.99)[0].exit_code == 2


def test_everybody_on_the_host_is_counted():
    def certain(**settings: object) -> float:
        (place,) = fit.places(configured(**settings), SHAPE, Sharding(), fit.Machine(host=1.0))
        return place.certain

    worker = 2 * 500_000_000 + memory.ACTOR_PROCESS
    assert certain(rollout__workers=5) - certain(rollout__workers=2) == pytest.approx(3 * worker)
    servers = certain(resources__reward_servers=3) - certain()
    assert servers == pytest.approx(2 * memory.ACTOR_PROCESS)
    assert certain(resources__ray_address="a:1") < certain() - 2 * worker, "they are elsewhere"


def test_remedies_were_tried():
    (found,) = judge(32.0, configured(ppo__micro_batch_size=64, data__max_prompt_tokens=512))
    assert found.status == "warn" and found.remedy.startswith("one of: --ppo.micro_batch_size 8")
    assert "max_prompt_tokens" not in found.remedy, "not enough by itself"
    smaller = configured(ppo__micro_batch_size=8, data__max_prompt_tokens=512)
    (place,) = fit.places(smaller, SHAPE, Sharding(), fit.Machine(host=32 * GIB))
    assert place.most <= place.room
    (found,) = judge(7.0)
    assert found.status == "FAIL" and "--model.lora_rank 16" in found.remedy
    assert judge(0.5)[0].remedy.startswith("a smaller model")


def test_a_gpu_that_is_shared():
    cfg = configured()
    wanted = placement.Wanted.of(cfg, "cuda", ("here",), 1)
    seats = placement.plan(wanted, {"here": 1})
    found = fit.places(cfg, SHAPE, Sharding(), fit.Machine(host=64 * GIB, gpus=(80 * GIB,), seats=seats))
    host, gpu = found
    one_learner, worker = (f(cfg, SHAPE, *a, "cuda") for f, a in ((memory.learner, (Sharding(),)), (memory.worker, ())))
    assert gpu.certain == pytest.approx(one_learner.states + 2 * worker.weights + 3 * fit.CUDA_CONTEXT)
    assert gpu.most - gpu.certain == pytest.approx(
        one_learner.activations + one_learner.logits + 2 * (worker.cache + worker.scratch)
    )
    assert host.certain > one_learner.host


def test_vllm_beside_a_learner_wants_a_smaller_share():
    def found(share: float) -> list[Finding]:
        cfg = configured(rollout__engine="vllm", rollout__gpu_memory=share, rollout__workers=1, ppo__micro_batch_size=2)
        seats = placement.plan(placement.Wanted.of(cfg, "cuda", ("here",), 1), {"here": 1})
        return judge(64, cfg, gpus=(40 * GIB,), seats=seats)

    assert found(0.4)[0].status == "ok" and found(0.9)[0].status == "FAIL"


def test_zero3_is_offered_where_there_are_gpus_for_it():
    shape = ModelShape(**(SHAPE.__dict__ | {"parameters": 7_000_000_000, "trunk": 7_000_000_000}))
    cfg = configured(model__reference="reward_server", rollout__placement="apart")
    seats = placement.plan(placement.Wanted.of(cfg, "cuda", ("here",), 1), {"here": 8})
    machine = fit.Machine(host=999 * GIB, gpus=(80 * GIB,) * 8, seats=seats)
    first, *_ = fit.judge_fit(cfg, shape, Sharding(), machine)
    assert first.status == "FAIL" and "--accelerate zero3 --num-processes 8" in first.remedy


# --------------------------------------------------------------------------------------------------------- as a whole


def check(name: str, *findings: Finding, **more: object) -> Check:
    return Check(name=name, looks_at="", says="", look=lambda _: list(findings), **more)


def situation(tmp_path: Path) -> Situation:
    return Situation(cfg=configured(run__dir=str(tmp_path)), whole=False, sharding=Sharding())


def test_findings_come_in_the_order_of_the_checks(tmp_path):
    checks = [check("b", ok("1")), check("a", warn("2", "r"), ok("3"), imports_torch=True), check("c", ok("4"))]
    found = list(examination.examine(situation(tmp_path), checks))
    assert [(name, f.seen) for name, f in found] == [("b", "1"), ("a", "2"), ("a", "3"), ("c", "4")]


def test_a_check_that_hangs_is_a_finding_and_the_others_are_heard(tmp_path, monkeypatch):
    release = threading.Event()
    hangs = Check(name="hangs", looks_at="", says="", look=lambda _: release.wait(60) and [], deadline_s=0.2)
    monkeypatch.setattr(examination.devices, "busy", lambda: False)
    found = dict(examination.examine(situation(tmp_path), [hangs, check("well", ok("x"))]))
    release.set()
    assert found["hangs"].status == "FAIL" and "no answer within 0 s" in found["hangs"].seen
    assert found["well"].status == "ok"
    assert examination.judge_late(9, busy=True).status == "warn"


def test_a_check_that_raises_hides_nothing(tmp_path):
    def broken(_: Situation) -> list[Finding]:
        raise KeyError("x")

    def refused(_: Situation) -> list[Finding]:
        raise UserError("model.path = m: there is no such folder; give one")

    checks = [Check(name=n, looks_at="", says="", look=f) for n, f in (("broken", broken), ("refused", refused))]
    found = dict(examination.examine(situation(tmp_path), checks))
    assert "KeyError" in found["broken"].seen and found["broken"].status == "warn"
    assert found["refused"] == Finding(
        status="FAIL", seen="model.path = m: there is no such folder", remedy="give one", exit_code=2
    )


def test_the_exit_code_is_that_of_the_worst():
    assert examination.exit_code([("a", ok("")), ("b", warn("", ""))]) == 0
    assert examination.exit_code([("a", fail_of_config("", ""))]) == 2
    assert examination.exit_code([("a", fail_of_config("", "")), ("b", fail("", "")), ("c", ok(""))]) == 3


def test_lines_are_aligned_and_wrap_under_themselves_on_a_terminal(monkeypatch):
    plain = examination.line("disk", warn("slow " * 30, "another"))
    assert plain.startswith("warn  disk           slow") and "\n" not in plain and plain.endswith("; another")
    monkeypatch.setattr(examination.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(examination.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((80, 24)))
    monkeypatch.setenv("NO_COLOR", "1")
    first, *rest = examination.line("disk", warn("slow " * 30, "another")).splitlines()
    column = first.index("slow")
    assert (
        rest
        and max(len(row) for row in [first, *rest]) > 70
        and all(row[:column].isspace() and row[column] != " " and len(row) <= 80 for row in rest)
    )
    monkeypatch.delenv("NO_COLOR")
    assert "\033[33mwarn\033[0m" in examination.line("disk", warn("slow", "another"))


def test_json_has_every_finding_and_the_summary():
    found = [("a", ok("x")), ("b", fail("y", "z"))]
    said = json.loads(json.dumps(examination.as_json(found)))
    assert said["checks"][1] == {"name": "b", "status": "FAIL", "seen": "y", "remedy": "z"}
    assert said["summary"] == {"ok": 1, "warn": 0, "FAIL": 1, "exit_code": 3}
    assert examination.summary(found, whole=True) == "1 ok, 0 warn, 1 FAIL: this run would stop (exit 3)"


def arguments(**given: object) -> argparse.Namespace:
    empty = {"config": None, "accelerate": None, "num_processes": None, "reward": [], "json": False, "overrides": {}}
    return argparse.Namespace(**empty | given)


def test_what_is_typed_after_train_works_after_doctor():
    found = examination.situation_of(arguments(config=str(ROOT / "configs" / "cards.yaml"), accelerate="zero2"))
    assert found.whole and found.cfg.run.name == "cards" and found.sharding == Sharding(kind="zero2", ranks=2)
    alone = examination.situation_of(arguments(overrides={"run.dir": "elsewhere"}))
    assert not alone.whole and Path(alone.cfg.run.dir).name == "elsewhere"
    with pytest.raises(UserError, match="data.path"):
        examination.situation_of(arguments(overrides={"model.path": "m"}))
    with pytest.raises(UserError, match="num-processes"):
        examination.situation_of(arguments(accelerate="ddp", num_processes="0"))


def test_names_and_the_page():
    names = [check.name for check in examination.CHECKS]
    assert len(set(names)) == len(names)
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert examination.table() in page, f"docs/doctor.md wants this table:\n{examination.table()}"


def test_no_key_is_in_what_is_said(monkeypatch, tmp_path):
    canary = "c4n4ry" * 7
    for name in ("WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, canary)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    given = Situation(cfg=configured(log__trackers=["wandb"]), whole=False, sharding=Sharding())
    for look in (network.look_at_wandb, network.look_at_hub, network.look_at_ray):
        assert canary not in str(look(given))
