"""Export: a folder that others load, with a card; all or nothing; and the upload, against a small hub on loopback."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from core.config import load, to_yaml
from core.faults import StorageFault, UserError
from launch import export, run_folder
from policy_reading import policy_of
from trainer import checkpoint
from trainer.engine_weights import whole_policy

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder as training leaves it, of another model in final than in best."""
    settings = {
        "model.path": "/srv/secret-place/base",
        "data.path": "/srv/secret-place/p.jsonl",
        "data.eval_path": "/srv/secret-place/e.jsonl",
        "run.dir": str(tmp_path / "runs"),
        "run.name": "polite",
        "optim.lr": 3e-5,
        "rewards.polite.fn": "/srv/secret-place/rewards.py:polite",
        "rewards.polite.weight": 0.5,
        "rewards.judge.fn": "/srv/secret-place/rewards.py:judge",
        "rewards.judge.weight": 0,
        "rewards.judge.options": {"sort_key": "sk-12345", "scale": 2},
    }
    cfg = load(None, settings)
    folder = cfg.run.folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(cfg))
    for part, seed in (("final", 1), ("best", 2)):
        policy = policy_of(tiny_models.make_model("gpt2", seed=seed))
        checkpoint.save_pretrained(
            policy, whole_policy(policy), tiny_models.make_tokenizer(), folder / part, step=8 if seed == 1 else 6
        )
    evals = {
        "before": {"reward/total": 0.25, "judge": 0.5, "step": 0},
        "best": {"reward/total": 0.875, "judge": 0.75, "step": 6},
        "after": {"reward/total": 0.8125, "judge": None, "step": 8},
    }
    run_folder.write_summary(
        folder, {"eval": evals, "steps": 8, "exit": 0, "versions": {"torch": "2.99"}, "stopped": "patience", "limit": 2}
    )
    return folder


@pytest.mark.parametrize("weights", ["final", "best"])
def test_the_exported_folder_loads_to_the_very_weights_with_tokenizer_and_generation_config(run, tmp_path, weights):
    words = export.export_run(run, tmp_path / "out", weights=weights)
    assert words.startswith(f"{tmp_path / 'out'}: {weights} weights of polite") and "README.md" in words
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    expected = tiny_models.make_model("gpt2", seed={"final": 1, "best": 2}[weights])
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert model.generation_config.eos_token_id == [0, 7]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("the cat") == tiny_models.make_tokenizer().encode(
        "the cat"
    )
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "value_head.safetensors", "README.md", "generation_config.json"} <= names
    assert "manifest.json" not in names
    assert not list(tmp_path.glob(".out*"))


def test_the_card_has_the_figures_the_rewards_and_only_settings_that_are_no_defaults(run, tmp_path):
    export.export_run(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tokenppo", "ppo", "rlhf"],
    }  # a base model that is a folder is no id of the hub
    assert "| mean over held-out prompts | before (step 0) | best (step 6) | after (step 8) |" in body
    assert "| `reward/total` | 0.25 | 0.875 | 0.8125 |" in body and "| `judge` | 0.5 | 0.75 |  |" in body
    assert "| `polite` | `rewards.py:polite` | 0.5 |  |" in body
    assert "| `optim.lr` | `3e-05` |" in body and "`ppo.gamma`" not in body and "`run.dir`" not in body
    assert "`base` trained with token-level PPO" in body and "stopped by run.patience = 2" in body
    assert "Weights after step 8 of 8" in body and "torch 2.99" in body
    assert "secret-place" not in text and "sk-12345" not in text


def test_a_base_model_of_the_hub_is_named_as_such(run):
    cfg = load(run / "config.yaml", {"model.path": "owner/base"})
    text = export.card(cfg, run_folder.read_summary(run), "best", "me/polite")
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "owner/base"
    assert "# me/polite" in text and 'name = "me/polite"' in text
    assert "Weights after step 6 (the best evaluation by `reward/total`) of 8" in text


def test_damaged_weights_are_not_exported_and_nothing_is_left(run, tmp_path):
    file = run / "final" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16  # which safetensors reads without a word
    file.write_bytes(data)
    with pytest.raises(StorageFault, match=r"final is damaged \(model.safetensors holds other bytes"):
        export.export_run(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_a_copy_that_goes_wrong_is_found_and_nothing_is_left(run, tmp_path, monkeypatch):
    copytree = export.shutil.copytree

    def worse(source, target):
        copytree(source, target)
        (Path(target) / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(export.shutil, "copytree", worse)
    with pytest.raises(StorageFault, match="could not be written whole"):
        export.export_run(run, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


def test_what_cannot_be_exported_is_one_line(run, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    refusals = [
        ((tmp_path, tmp_path / "out"), {}, r"RUN = .*no config.yaml"),
        ((run, run), {}, r"OUT = .*exists already"),
        ((run, tmp_path / "out"), {"push": "polite"}, r"--push polite: wants owner/name"),
        ((run, tmp_path / "out"), {"push": "me/polite"}, r"--push me/polite: no login .*HF_TOKEN"),
    ]
    for args, options, words in refusals:
        with pytest.raises(UserError, match=words):
            export.export_run(*args, **options)
    (run / "best").rename(run / "elsewhere")
    with pytest.raises(UserError, match=r"--weights best: .*held-out"):
        export.export_run(run, tmp_path / "out", weights="best")
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files asks for. `files` is what was committed."""

    token = "hf_right"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.answer({"error": "Invalid user token"}, 401)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.url}/me/polite", "id": "me/polite"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/main" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.server.url}/me/polite/commit/1", "commitOid": "1" * 40})
        return self.answer({"errors": [], "warnings": []})  # validation of the card

    def do_GET(self) -> None:
        self.answer({"id": "me/polite", "sha": "0" * 40, "siblings": []})

    def answer(self, content: dict, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.created, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def exported(run: Path, out: Path, endpoint: str, token: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-m", "tokenppo", "export", str(run), str(out), "--push", "me/polite"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_upload_has_every_file_byte_for_byte_in_a_private_repository(run, tmp_path, hub):
    done = exported(run, tmp_path / "out", hub.url, "hf_right")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == f"{hub.url}/me/polite/commit/1", done.stderr
    assert hub.created[0]["name"] == "polite" and hub.created[0]["organization"] == "me"
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}


@pytest.mark.slow
def test_a_login_that_is_refused_and_a_hub_that_is_not_there_are_one_line_each(run, tmp_path, hub):
    refused = exported(run, tmp_path / "one", hub.url, "hf_wrong")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # taken, and nobody listens
        unreachable = exported(run, tmp_path / "two", f"http://127.0.0.1:{nobody.getsockname()[1]}", "hf_right")
    for done, code, words in (
        (refused, 2, r"--push me/polite: the hub refuses this login \(401\)"),
        (unreachable, 3, r"--push me/polite: no answer from the hub"),
    ):
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("tokenppo: ")]
        assert done.returncode == code and re.search(words, line), done.stderr
        assert "is whole; when that is mended: hf upload me/polite" in line and "Traceback" not in done.stderr
    assert (tmp_path / "one" / "README.md").exists() and (tmp_path / "two" / "README.md").exists()
