"""What each check of `tokenppo doctor` says of what it saw: of what is well, and of each way in which it is not.

That the checks really look is held by tests/e2e/test_doctor.py.
"""

from pathlib import Path

import pytest

from core.faults import ProcessFault
from launch.doctor import devices, network, ranks, software, storage
from launch.doctor.devices import Driver, Gpu
from launch.doctor.finding import Finding
from launch.doctor.network import Cluster, Ports, Token
from launch.doctor.software import Software
from launch.doctor.storage import Clock, Disk, Locks
from launch.memory import GIB

MIB = 2**20


def words(findings: list[Finding]) -> list[tuple[str, str]]:
    """Status and what was seen; each but an ok has a remedy, each is one line."""
    assert findings
    for f in findings:
        assert bool(f.remedy) == (f.status != "ok"), f
        assert f.seen and "\n" not in f.seen + f.remedy
    return [(f.status, f.seen) for f in findings]


def one(findings: list[Finding]) -> tuple[str, str]:
    (said,) = words(findings)
    return said


# ------------------------------------------------------------------------------------------------------------ software


def test_packages_against_their_bounds():
    wanted = [
        "numpy>=2",
        "Ray[default]>=2.60; python_version > '3'",
        "peft>=0.21; extra == 'lora'",
        "old>=1; os_name=='x'",
    ]
    assert one(software.judge_versions(wanted, {"numpy": "2.1", "ray": "2.60.0"}))[0] == "ok"
    assert one(software.judge_versions(wanted, {"ray": "2.60.0"})) == ("FAIL", "numpy is not installed")
    low = software.judge_versions(wanted, {"numpy": "2.1", "ray": "2.59.1", "peft": "0.20"})
    assert [status for status, _ in words(low)] == ["warn", "warn"] and "ray 2.59.1" in low[0].seen.lower()
    assert low[1].remedy == "pip install 'peft>=0.21'"
    assert one(software.judge_versions(["torch>=2.11"], {"torch": "2.13.0+cpu"}))[0] == "ok"


def test_what_pyproject_wants_is_installed_here():
    """The environment that these tests run in is one that the doctor calls well."""
    wanted = software.requirements()
    assert any(r.startswith("torch>=") for r in wanted) and any("extra" in r for r in wanted)
    found = software.installed({"torch", "no-such-package"})
    assert set(found) == {"torch"}


WELL = Software(versions={"ray": "2.60.0", "transformers": "5.23.0", "torch": "2.13.0+cpu"})


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"versions": WELL.versions | {"vllm": "0.32"}}, "warn", "vllm wants transformers below 5.20"),
        ({"versions": WELL.versions | {"vllm": "0.32"}, "vllm_here": True}, "FAIL", "vllm wants transformers"),
        ({"tools": frozenset({"g++"})}, "warn", "g\\+\\+ or ninja is not on PATH"),
        ({"tools": frozenset(), "offload": True}, "FAIL", "DeepSpeed on a CPU compiles"),
        ({"torch_cuda": "13.0", "driver_cuda": "12.8", "gpus": 1}, "FAIL", "later CUDA than the driver"),
        ({"gpus": 1, "driver_cuda": "13.0"}, "warn", "torch is built for the CPU alone"),
        ({"versions": WELL.versions | {"ray": "2.52.1"}}, "warn", "Ray before 2.60"),
        ({"versions": WELL.versions | {"torchvision": "0.26.0"}}, "warn", "torchvision"),
    ],
)
def test_a_bad_combination_is_known(change, status, said):
    import re

    assert software.judge_combinations(WELL) == []
    (found,) = software.judge_combinations(Software(**(WELL.__dict__ | change)))
    assert found.status == status and re.search(said, found.seen) and found.remedy


def test_each_combination_has_a_date_and_a_source():
    assert all(c.since.startswith("2026-") and "," in c.since for c in software.COMBINATIONS)


@pytest.mark.parametrize(
    ("built", "driver", "bad"), [("12.8", "13.0", 0), ("12.9", "12.4", 0), ("13.0", "12.9", 1), (None, "13.0", 0)]
)
def test_a_driver_runs_what_is_built_for_its_major_release_or_an_earlier_one(built, driver, bad):
    found = software.judge_combinations(Software(**(WELL.__dict__ | {"torch_cuda": built, "driver_cuda": driver})))
    assert len(found) == bad


def test_the_cuda_of_torch_is_read_without_importing_it():
    import torch

    assert software.torch_cuda() == torch.version.cuda


def test_a_lock_that_a_compiler_left(tmp_path):
    assert one(software.judge_compilers([], []))[0] == "ok"
    assert "being compiled" in one(software.judge_compilers([], [tmp_path / "lock"]))[1]
    status, said = one(software.judge_compilers([tmp_path / "lock"], []))
    assert status == "warn" and str(tmp_path / "lock") in said


def test_what_cannot_be_compiled():
    assert one([software.judge_compiled("decode steps", None)]) == ("ok", "decode steps on a CPU are compiled")
    status, said = one([software.judge_compiled("draws of tokens", "there is no g++ on PATH")])
    assert status == "warn" and "twenty times as long (there is no g++ on PATH)" in said


def test_locks_are_looked_at_and_left(tmp_path):
    from launch import compiled_ops

    left, held = (tmp_path / name / "lock" for name in ("left", "held"))
    for lock in (left, held):
        lock.parent.mkdir()
        lock.touch()
    with open(held):
        assert compiled_ops.locks(tmp_path) == ([left], [held])
    assert left.exists() and held.exists()


# ------------------------------------------------------------------------------------------------------------- devices

BANNER = "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0  |"
ROWS = (
    "0, NVIDIA H100 80GB HBM3, 81559, 1, Disabled, 580.65.06\n1, NVIDIA H100 80GB HBM3, 81559, 1, Disabled, 580.65.06\n"
)


def test_what_the_driver_says_is_read():
    found = devices.parse_driver(BANNER, ROWS)
    assert (found.version, found.cuda, len(found.gpus)) == ("580.65.06", "13.0", 2)
    assert found.gpus[0] == Gpu("NVIDIA H100 80GB HBM3", 81559 * MIB, MIB, False)
    assert devices.parse_driver(BANNER, "0, GB10, [N/A], [N/A], [N/A], 580.1").gpus[0].total == 0


def test_gpus():
    found = devices.parse_driver(BANNER, ROWS)
    assert one(devices.judge_gpus(Driver(), 0, None, wanted=False)) == ("ok", "none: models run on the CPU")
    assert one(devices.judge_gpus(Driver(), 0, None, wanted=True))[0] == "FAIL"
    status, said = one(devices.judge_gpus(found, 2, None, wanted=False))
    assert status == "ok" and "2 x NVIDIA H100" in said and "80 GiB each; torch sees 2" in said
    assert one(devices.judge_gpus(found, 1, "0", wanted=True))[0] == "ok", "CUDA_VISIBLE_DEVICES leaves one"
    assert one(devices.judge_gpus(found, 1, None, wanted=True))[0] == "warn"
    assert one(devices.judge_gpus(found, 0, None, wanted=True))[0] == "FAIL"
    assert one(devices.judge_gpus(found, 0, None, wanted=False))[0] == "warn"
    assert one(devices.judge_gpus(found, None, None, wanted=False))[0] == "FAIL"
    assert one(devices.judge_gpus(Driver(error="Driver/library version mismatch"), 0, None, False))[0] == "FAIL"
    cut = devices.parse_driver(BANNER, ROWS.replace("Disabled", "Enabled", 1))
    assert "1 in MIG mode" in one(devices.judge_gpus(cut, 2, None, wanted=False))[1]
    taken = devices.parse_driver(BANNER, ROWS.replace("81559, 1,", "81559, 40000,", 1))
    assert "39.1 of 80 GiB are taken" in one(devices.judge_gpus(taken, 2, None, wanted=False))[1]


def test_memory():
    assert [one(devices.judge_memory(16 * GIB, n * GIB))[0] for n in (8, 3, 1)] == ["ok", "warn", "FAIL"]


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    assert devices.cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert devices.cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("4000\n")
    assert devices.cgroup_memory(tmp_path) == (4000, 1000)
    monkeypatch.setattr(devices, "cgroup_memory", lambda: (4000.0, 1000.0))
    assert devices.memory_here() == (4000, 3000)


def test_limits():
    assert one(devices.judge_limits((20000, 20000), None))[0] == "ok"
    assert one(devices.judge_limits((1024, 65536), None)) == (
        "warn",
        "1024 open files are allowed: few for many workers",
    )
    assert devices.judge_limits((1024, 65536), None)[0].remedy == "ulimit -n 65536"
    assert one(devices.judge_limits((256, 256), None))[0] == "FAIL"
    assert [one(devices.judge_limits((20000, 20000), n))[0] for n in (9000, 2000, 100)] == ["ok", "warn", "FAIL"]


# ------------------------------------------------------------------------------------------------------------- storage


def test_disks(tmp_path):
    good = {"place": tmp_path, "free": 50 * GIB, "mib_s": 500.0, "fsync_s": 0.002}
    assert one(storage.judge_disk(Disk(**good)))[0] == "ok"
    assert one(storage.judge_disk(Disk(**good | {"free": GIB})))[0] == "warn"
    assert one(storage.judge_disk(Disk(**good | {"free": GIB / 10})))[0] == "FAIL"
    assert "slow" in one(storage.judge_disk(Disk(**good | {"mib_s": 5.0})))[1]
    assert "slow" in one(storage.judge_disk(Disk(**good | {"fsync_s": 0.5})))[1]
    assert one(storage.judge_disk(Disk(**good | {"error": "Read-only file system"})))[0] == "FAIL"


def test_a_disk_is_measured_by_writing_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "WRITTEN", MIB)
    found = storage.measure_disk(tmp_path)
    assert found.error is None and found.mib_s > 0 and found.fsync_s > 0 and not list(tmp_path.iterdir())
    assert storage.measure_disk(Path("/proc")).error, "which refuses root, too"


def test_locks_of_file_systems(tmp_path):
    here = storage.try_locks(tmp_path)
    assert one(storage.judge_locks(here))[0] == "ok" and not list(tmp_path.iterdir())
    for broken in ("flock", "exclusive", "replaces"):
        assert one(storage.judge_locks(Locks(**(here.__dict__ | {broken: False}))))[0] == "FAIL"
    assert one(storage.judge_locks(storage.try_locks(Path("/proc"))))[0] == "FAIL"


def test_a_file_system_whose_locks_do_nothing_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.fcntl, "flock", lambda *_: None)  # as a mount with nolock has it
    assert not storage.try_locks(tmp_path).flock


def test_clocks():
    now = {"now": 1.8e9, "file": 1.8e9 + 0.01, "sources": 1.79e9, "synchronised": True}
    assert one(storage.judge_clock(Clock(**now), False))[0] == "ok"
    assert one(storage.judge_clock(Clock(**now | {"now": 0.0}), False))[0] == "FAIL"
    status, said = one(storage.judge_clock(Clock(**now | {"file": 1.8e9 - 60}), False))
    assert status == "warn" and "-60 s" in said
    alone, several = (one(storage.judge_clock(Clock(**now | {"synchronised": False}), x))[0] for x in (False, True))
    assert (alone, several) == ("ok", "warn")
    assert one(storage.judge_clock(Clock(**now | {"file": None, "synchronised": None}), False))[0] == "ok"


def test_shared_memory():
    want = 512 * MIB
    assert [one(storage.judge_shared(x * MIB, want, True))[0] for x in (2048, 600, 64)] == ["ok", "warn", "FAIL"]
    assert one(storage.judge_shared(64 * MIB, want, starts_ray=False))[0] == "ok", "the cluster has its own"
    assert one(storage.judge_shared(None, want, True))[0] == "ok"


# ------------------------------------------------------------------------------------------------------------- network


def test_ports(tmp_path):
    good = {"low": 32768, "high": 60999, "taken": 10}
    assert one(network.judge_ports(Ports(**good), 60, False))[0] == "ok"
    assert one(network.judge_ports(Ports(**good | {"taken": 28_000}), 60, False))[0] == "warn"
    assert one(network.judge_ports(Ports(**good | {"taken": 28_200}), 60, False))[0] == "FAIL"
    assert one(network.judge_ports(Ports(**good, loopback="Permission denied"), 60, False))[0] == "FAIL"
    named = Ports(**good, host_name="the name of this machine, x, has no address")
    assert [one(network.judge_ports(named, 60, several))[0] for several in (False, True)] == ["ok", "warn"]


def test_sockets_are_counted_by_their_local_port(tmp_path):
    (tmp_path / "sys/net/ipv4").mkdir(parents=True)
    (tmp_path / "sys/net/ipv4/ip_local_port_range").write_text("32768\t32777\n")
    (tmp_path / "net").mkdir()
    rows = ["  sl  local_address rem_address", " 0: 0100007F:8000 00000000:0000 0A", " 1: 0100007F:8000 0:0 01"]
    (tmp_path / "net/tcp").write_text("\n".join([*rows, " 2: 00000000:0016 0:0 0A"]) + "\n")
    found = network.read_ports(tmp_path)
    assert (found.low, found.high, found.taken, found.loopback) == (32768, 32777, 1, None)


def test_tokens_are_found_where_ray_finds_them(tmp_path):
    assert network.find_token({"RAY_AUTH_TOKEN": "a"}, tmp_path).value == "a"
    assert network.find_token({}, tmp_path) == Token(file=tmp_path / ".ray" / "auth_token")
    file = tmp_path / "token"
    assert network.find_token({"RAY_AUTH_TOKEN_PATH": str(file)}, tmp_path).missing
    file.write_text("secret\n")
    file.chmod(0o644)
    found = network.find_token({"RAY_AUTH_TOKEN_PATH": str(file)}, tmp_path)
    assert (found.value, found.mode, found.missing) == ("secret", 0o644, False) and "secret" not in repr(found)


PRIVATE = Token(value="t", file=Path("f"), mode=0o600)


@pytest.mark.parametrize(
    ("token", "cluster", "mode", "status", "said"),
    [
        (PRIVATE, None, None, "ok", "starts its own"),
        (Token(value="t", file=Path("f"), mode=0o644), None, None, "warn", "mode 0644"),
        (PRIVATE, None, "disabled", "warn", "RAY_AUTH_MODE is disabled"),
        (PRIVATE, Cluster(address="a:1", with_token="ok", without_token="denied"), None, "ok", "takes this token"),
        (PRIVATE, Cluster(address="a:1", with_token="ok", without_token="ok"), None, "warn", "without a token"),
        (PRIVATE, Cluster(address="a:1", with_token="denied", without_token="denied"), None, "FAIL", "not its own"),
        (Token(), Cluster(address="a:1", with_token="denied", without_token="denied"), None, "FAIL", "there is none"),
        (Token(missing=True), Cluster(address="a:1", with_token="denied"), None, "FAIL", "RAY_AUTH_TOKEN_PATH"),
        (PRIVATE, Cluster(address="a:1", with_token="unimplemented"), None, "warn", "not as Ray does"),
        (PRIVATE, Cluster(address="a:1", unreachable=ProcessFault("no answer; start one")), None, "FAIL", "no answer"),
    ],
)
def test_ray(token, cluster, mode, status, said):
    found = network.judge_ray(token, cluster, mode)
    assert one(found)[0] == status and said in found[0].seen


def test_an_address_that_is_none_is_a_mistake_of_the_configuration():
    found = network.judge_ray(PRIVATE, network.ask_ray("somewhere", PRIVATE), None)
    assert one(found)[0] == "FAIL" and found[0].exit_code == 2


def test_no_ray_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    found = network.judge_ray(PRIVATE, network.ask_ray("auto", PRIVATE), None)
    assert "no Ray was started" in one(found)[1] and "ray start --head" in found[0].remedy
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / network.CURRENT).write_text("1.2.3.4:6379")
    assert network.current_address() == "1.2.3.4:6379"


@pytest.mark.parametrize(
    ("given", "status", "said"),
    [
        ((True, "", True, True), "ok", "logged in, the server answers"),
        ((True, "", True, False), "warn", "does not answer"),
        ((True, "", False, False), "warn", "no login"),
        ((False, "", False, False), "ok", "no login (log.trackers has no wandb)"),
        ((True, "offline", False, False), "ok", "offline by WANDB_MODE"),
        ((True, "disabled", True, True), "ok", "disabled by WANDB_MODE"),
    ],
)
def test_wandb(given, status, said):
    found = one(network.judge_wandb(*given))
    assert found[0] == status and said in found[1]


def test_the_hub():
    def judge(**changes: object) -> tuple[str, str]:
        given = {"host": "h", "offline": False, "proxy": False, "reachable": True, "token": True, "cached": 3}
        return one(network.judge_hub(**given | changes))

    assert judge() == ("ok", "h: answers, with a login")
    assert judge(reachable=False)[0] == "warn" and "3 models and datasets" in judge(reachable=False)[1]
    assert "offline" in judge(offline=True, reachable=False)[1] and "proxy" in judge(proxy=True, reachable=False)[1]


# --------------------------------------------------------------------------------------------------------------- ranks


def test_sums_of_two_processes():
    def judge(gpus: int = 0, busy: bool = False, **sum_: object) -> tuple[str, str]:
        return one(
            ranks.judge_sums([ranks.Sum(**{"backend": "gloo", "right": True, "mib_s": 900.0} | sum_)], gpus, busy)
        )

    assert judge() == ("ok", "two processes add up: gloo 900 MiB/s")
    assert judge(gpus=1)[1].endswith("NCCL wants two GPUs")
    assert judge(mib_s=3.0)[0] == "warn"
    assert judge(right=False)[0] == "FAIL"
    assert judge(error="Connection refused")[0] == "FAIL"
    assert (judge(late=True)[0], judge(late=True, busy=True)[0]) == ("FAIL", "warn")
    assert judge(backend="nccl", error="unhandled system error")[0] == "FAIL"
