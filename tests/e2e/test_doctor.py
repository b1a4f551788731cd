"""`tokenppo doctor` as a user types it: a machine that is well, and four ways in which one is not.

One process looks at everything at once where findings do not touch each other: most of the time goes into imports.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import tiny_models
from launch.doctor import network

ROOT = Path(__file__).parents[2]
CANARY = "c4n4ry" * 7


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A home of its own: no token, no login, no compiled extension; a model and prompts."""
    place = tmp_path_factory.mktemp("home")
    tiny_models.save_model(place / "model")
    (place / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "the dog"}\n')
    (place / "mine.py").write_text("def fn(completions, **_):\n    return [0.0 for _ in completions]\n")
    return place


def doctor(home: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "HF_", "TORCH_EXTENSIONS"))}
    command = [sys.executable, "-m", "tokenppo", "doctor", *options]
    env = kept | {"HOME": str(home), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=400)


def statuses(done: subprocess.CompletedProcess) -> dict[str, tuple[str, str, str]]:
    said = json.loads(done.stdout)
    assert said["summary"]["exit_code"] == done.returncode
    worst = sorted(said["checks"], key=lambda c: ("ok", "warn", "FAIL").index(c["status"]))
    return {c["name"]: (c["status"], c["seen"], c["remedy"]) for c in worst}


@pytest.mark.slow
def test_a_machine_that_is_well_in_words(home):
    done = doctor(home, "--config", str(ROOT / "configs" / "cards.yaml"), "--run.dir", str(home / "runs"))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    names = {row[6:].split("  ")[0].strip(): row for row in lines}
    assert {"packages", "disk", "file locks", "Ray", "ranks", "config", "fit"} <= set(names), done.stdout
    assert all(row.startswith(("ok    ", "warn  ")) for row in lines), done.stdout
    assert "two processes add up: gloo" in names["ranks"] and "0.28 M parameters" in names["config"]
    assert last.endswith("nothing here keeps this run from training") and "0 FAIL" in last
    assert not [p for p in home.iterdir() if p.name.startswith(".tokenppo-") or p.name == "runs"], "it leaves no trace"


@pytest.mark.slow
def test_what_is_wrong_is_found_and_no_secret_is_said(home):
    """A lock that a compiler left, a token that all can read, a model that does not fit, a Ray that is not there."""
    lock = home / ".cache" / "torch_extensions" / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(CANARY)
    token.chmod(0o644)
    large = home / "large"  # its configuration alone is read before it is known not to fit
    large.mkdir()
    for file in (home / "model").iterdir():
        (large / file.name).write_bytes(file.read_bytes())
    config = json.loads((large / "config.json").read_text())
    grown = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 120}
    (large / "config.json").write_text(json.dumps(config | grown))
    with socket.socket() as held:  # bound, and nobody listens
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
        done = doctor(
            home,
            *("--json", "--resources.ray_address", address, "--log.trackers", "[wandb]"),
            *("--model.path", str(large), "--data.path", "prompts.jsonl", "--rewards.mine.fn", "mine.py:fn"),
            XDG_CACHE_HOME=str(home / ".cache"),
            WANDB_API_KEY=CANARY,
            WANDB_BASE_URL="http://127.0.0.1:1",
            HF_TOKEN=CANARY,
        )
    assert done.returncode == 3 and CANARY not in done.stdout + done.stderr, done.stdout + done.stderr
    found = statuses(done)
    assert found["compilers"][0] == "warn" and str(lock) in found["compilers"][1] and lock.exists()
    assert found["Ray"][0] == "FAIL" and f"{address}: no answer" in found["Ray"][1]
    readable = [c for c in json.loads(done.stdout)["checks"] if c["name"] == "Ray" and "0644" in c["seen"]]
    assert readable and readable[0]["remedy"].startswith(f"chmod 600 {token}")
    assert found["W&B"][:2] == ("warn", "logged in, but the server does not answer")
    status, seen, remedy = found["fit"]
    assert status == "FAIL" and "learner" in seen and remedy.startswith(("a smaller model", "one of", "together"))
    token.unlink()


@pytest.mark.slow
def test_a_cluster_with_a_token_is_told_from_one_that_wants_another(tmp_path):
    """A real Ray; what its GCS says to a token, to another one, and to none."""
    port, place = _free_port(), tempfile.TemporaryDirectory(prefix="ray-")  # its sockets want short paths
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a1" * 32, "RAY_worker_niceness": "0"}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}"]
    command += ["--include-dashboard=false", "--num-cpus=0", "--disable-usage-stats", f"--temp-dir={place.name}"]
    command += ["--object-store-memory=80000000"]
    with open(tmp_path / "out", "wb") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        address, right = f"127.0.0.1:{port}", network.Token(value="a1" * 32)
        until = time.monotonic() + 120
        while network.ask_ray(address, right).with_token != "ok":
            assert head.poll() is None and time.monotonic() < until, (tmp_path / "out").read_text()
        well, wrong, none = (
            network.judge_ray(token, network.ask_ray(address, token), None)[0]
            for token in (right, network.Token(value="b2" * 32), network.Token())
        )
        assert well.status == "ok" and "takes this token" in well.seen
        assert wrong.status == "FAIL" and "not its own" in wrong.seen
        assert none.status == "FAIL" and "wants a token" in none.seen
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        place.cleanup()


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]
