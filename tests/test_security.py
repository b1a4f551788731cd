"""What SECURITY.md promises, as far as it shows without a process: the rest is in tests/e2e/test_security.py."""

import ast
import base64
import gzip
import hashlib
import io
import os
import re
import string
import zipfile
from pathlib import Path

import canaries
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_layers import SOURCES, imports

import tiny_models
from core import config
from core.faults import RewardFault, UserError
from core.plain_text import one_line
from core.secret_names import is_secret
from launch import cli, ray_auth, run_folder, verbs
from launch.heat_map import heat_map
from launch.tensorboard_tracker import folder_name
from trainer import checkpoint
from trainer.model import load_causal_lm
from trainer.panel import View, panel

ROOT = Path(__file__).parents[1]
LEAST = {"model.path": "m", "data.path": "d.jsonl", "rewards.mine.fn": "r.py:f"}
HOSTILE = ["\x1b[2J", "\x1b]0;owned\x07", "\r", "\x9b31m", "\b\b", "\x00", "\u202e", "\x1b]52;c;ZWNobw==\x07", "a\nb"]
NAMES = ["", ".", "..", "-x", "/", "a/../..", "../x", "a\n", "a\x00b", "~", "é", "CON"]
TEXTS = st.text(max_size=40) | st.sampled_from(NAMES)


# -------------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "key",
    [
        "rewards.mine.options.api_key",
        "rewards.mine.options.apiKey",
        "rewards.mine.options.password",
        "rewards.mine.options.auth-token",
        "rewards.mine.options.headers.Authorization",
        "rollout.environment_options.client_secret",
        "log.wandb_api_key",
        "wandb.api_key",
        "hf_token",
    ],
)
def test_a_key_that_is_a_secrets_is_refused_and_its_value_is_not_repeated(key):
    with pytest.raises(UserError, match="is a secret by its name.*environment or a file") as refused:
        config.load(None, LEAST | {key: "hunter2"})
    assert key in str(refused.value) and "hunter2" not in str(refused.value)


def test_a_secret_in_a_file_and_inside_a_list_is_refused_too(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {path: m}\ndata: {path: d.jsonl}\nrewards: {a: {fn: 'r.py:f', options: {servers: [{password: 3}]}}}\n"
    )
    for read in (config.load, config.load_rewards):
        with pytest.raises(UserError, match=r"rewards\.a\.options\.servers\.0\.password: is a secret"):
            read(tmp_path / "c.yaml")


@pytest.mark.parametrize("fn", ["http://h:1", "https://h", "openrlhf:http://h:5000/get_reward"])
def test_a_reward_server_takes_its_token_from_a_file_or_the_environment_alone(fn):
    with pytest.raises(UserError, match=r"rewards\.mine\.options\.token: is a secret.*token_file"):
        config.load(None, LEAST | {"rewards.mine.fn": fn, "rewards.mine.options.token": "hunter2"})
    assert config.load(None, LEAST | {"rewards.mine.fn": fn, "rewards.mine.options.token_file": "~/t"})


def test_what_only_sounds_like_a_secret_passes():
    fine = {"stop_token": "<|im_end|>", "key": "answer", "max_tokens": 3, "token": "</s>", "token_file": "t"}
    for name, value in (fine | {"api_key": None, "password": "", "sort_key": "the_name_of_a_column"}).items():
        assert not is_secret(name, value), name
    assert config.load(None, LEAST | {"rewards.mine.options": fine}).rewards["mine"].options == fine
    assert is_secret("token", "hf_abcdefghij0123456789") and not any(is_secret(k, "x") for k in config.leaf_keys())


def test_no_option_of_any_verb_takes_a_secret():
    """Command lines are everybody's to read."""
    names_one = {("submit", "secret")}  # of an object of Kubernetes, which keeps what is in it
    for verb in verbs.VERBS:
        for action in verb.parser()._actions:
            if (verb.name, action.dest) in names_one:
                continue
            assert not any(is_secret(name, "x") for name in (action.dest, *action.option_strings)), verb.name


def test_what_is_planted_is_found_in_every_kind_of_file(tmp_path):
    """The scanner of tests/e2e/test_security.py: it would show nothing if it saw nothing."""
    canary = "c" + hashlib.sha256(b"a canary").hexdigest()[:39]
    raw = canary.encode()
    page = io.BytesIO()
    with zipfile.ZipFile(page, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("inner.gz", gzip.compress(b"x" * 99 + raw))
    zstd = pa.BufferOutputStream()
    with pa.CompressedOutputStream(zstd, "zstd") as stream:
        stream.write(b"y" * 99 + raw)
    (tmp_path / "deep" / ".hidden").mkdir(parents=True)
    planted = {
        "a.log": b"token=" + raw,
        "deep/.hidden/b.json": b'{"k": "' + raw + b'"}',
        "c.gz": gzip.compress(raw),
        "d.zip": page.getvalue(),
        "e.zst": zstd.getvalue().to_pybytes(),
        "f.hex": raw.hex().encode(),
        "g.utf16": canary.encode("utf-16-le"),
        **{f"h{n}.b64": base64.b64encode(b"?" * n + raw + b"!") for n in range(5)},
    }
    for name, data in planted.items():
        (tmp_path / name).write_bytes(data)
    table = pa.table({"text": ["z" * 99, canary], "n": [1, 2]}).replace_schema_metadata({"who": "nobody"})
    pyarrow.parquet.write_table(table, tmp_path / "i.parquet", compression="zstd")
    hidden = pa.table({"n": [1]}).replace_schema_metadata({"who": canary})
    pyarrow.parquet.write_table(hidden, tmp_path / "j.parquet")
    torch.save({"state": torch.zeros(3), "who": canary}, tmp_path / "k.bin")
    wandb_log(tmp_path / "run-l.wandb", canary)
    assert raw not in (tmp_path / "run-l.wandb").read_bytes(), "it lies across the end of a block"
    found = canaries.hits({"it": canary}, canaries.files(tmp_path))
    for name in [*planted, "i.parquet", "j.parquet", "k.bin", "run-l.wandb"]:
        assert any(f" {tmp_path / name}" in hit for hit in found), f"nothing was seen in {name}: {found}"
    assert not canaries.hits({"another": canary[::-1]}, canaries.files(tmp_path))


def wandb_log(path: Path, canary: str) -> None:
    """A file as W&B's client writes it, with the canary across the end of its first block of 32 KiB."""
    import zlib

    import wandb_file
    from wandb.proto import wandb_internal_pb2 as pb

    record = pb.Record(num=1)
    record.output.line = "." * (wandb_file.BLOCK - 60) + canary + "." * 99
    data, out = record.SerializeToString(), bytearray(wandb_file.IDENT.pack(b":W&B", 0xBEE1, 0))
    room = wandb_file.BLOCK - len(out) - wandb_file.HEAD.size
    for kind, piece in ((wandb_file.FIRST, data[:room]), (wandb_file.LAST, data[room:])):
        out += wandb_file.HEAD.pack(zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
    path.write_bytes(out)


# ---------------------------------------------------------------------------------------------------------- paths


@given(TEXTS)
def test_no_run_name_leaves_the_folder_of_runs(name):
    folder = Path("/some/where/runs")
    try:
        cfg = config.load(None, LEAST | {"run.dir": str(folder), "run.name": name})
    except UserError as refused:
        assert "run.name" in str(refused)
        return
    assert cfg.run.folder.resolve().parent == folder and cfg.run.name == name
    assert set(name) <= set(string.ascii_letters + string.digits + "._-") and name[0] not in ".-"


@given(TEXTS)
def test_no_project_leaves_the_run_folder(project):
    inside = Path("/runs/r") / folder_name(project)
    assert inside.resolve().parent == Path("/runs/r") and "\x00" not in inside.name


def test_a_run_folder_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "gone").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "gone"):
        cfg = config.load(None, LEAST | {"run.dir": str(tmp_path / "runs"), "run.name": name})
        for look in (lambda cfg: run_folder.opened(cfg).__enter__(), run_folder.examine):
            with pytest.raises(UserError, match=rf"run.name = {name}: .* is a link to .*--run.dir"):
                look(cfg)
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "nowhere").exists()


def written(place: Path, names: dict[str, bytes]) -> Path:
    """A folder whose manifest, which proves itself, names these files with their true sizes and digests."""
    place.mkdir(exist_ok=True)
    files = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in names.items()}
    content = {"format": checkpoint.FORMAT, "step": 1, "files": files}
    (place / "manifest.json").write_text(checkpoint._manifest(content))
    return place


@given(TEXTS)
def test_a_manifest_names_nothing_outside_its_checkpoint(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("m")
    (root / "x").write_bytes(b"data")
    place = written(root / "step-1", {name: b"data"})
    assert checkpoint.damage_of(place) and checkpoint.damage_of(place, only=False)


def test_a_manifest_of_what_lies_elsewhere_is_damage(tmp_path):
    """With the right size and digest, by any way out: up, from the root, through a link to a file or a folder."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"data")
    for name in ("../outside/x", str(outside / "x"), "link", "folder/x", "sub/../../outside/x"):
        place = written(tmp_path / "step-1", {name: b"data"})
        (place / "sub").mkdir(exist_ok=True)
        for link, target in (("link", outside / "x"), ("folder", outside)):
            if name.startswith(link):
                (place / link).symlink_to(target)
        assert checkpoint.damage_of(place, only=False), name
        assert checkpoint.damage_of(place), name
        for link in ("link", "folder"):
            (place / link).unlink(missing_ok=True)
    (written(tmp_path / "step-1", {"y": b"data"}) / "y").write_bytes(b"data")
    assert checkpoint.damage_of(tmp_path / "step-1") is None, "what lies in it is fine"


# ------------------------------------------------------------------------------------------------------- terminals


@given(st.text())
def test_a_line_has_no_effect_on_a_terminal(text):
    line = one_line(text)
    assert line.isprintable() and len(line.splitlines()) <= 1
    assert line == text or not text.isprintable()


def quiet(text: str) -> bool:
    return not any(c in text for c in "\x1b\x07\x08\x9b\x00\r\u202e\x7f")


@pytest.mark.parametrize("evil", HOSTILE, ids=ascii)
def test_what_models_and_servers_write_reaches_the_terminal_as_text(evil, monkeypatch, capfd):
    def raises(argv):
        raise RewardFault(f"rewards.mine: the server says {evil} and more")

    monkeypatch.setattr(cli, "train", raises)
    assert cli.main(["train"]) == RewardFault.exit_code
    assert quiet(capfd.readouterr().err)

    said = io.StringIO()
    console = Console(file=said, width=100, color_system=None)
    offsets = np.array([[i, i + 1] for i in range(len(evil))])
    console.print(heat_map(evil, offsets, np.zeros(len(evil)), 1.0))
    view = View(title=evil, total_steps=2)
    row = {f"reward/{evil}/raw": 1.0, f"reward/{evil}/weighted": 1.0, f"eval/{evil}": 1.0, f"faults/{evil}": 1.0}
    monkeypatch.setattr("trainer.panel.lookup", lambda name: type("Metric", (), {"unit": "nats"}))
    view.add(1, row | {"time/total": 1.0, "reward/total": 1.0}, wrote_at=0.0)
    clock = type("Clock", (), {"stack": ["rollout"], "since": 0.0})
    console.print(panel(view, clock, width=100, height=40))
    assert quiet(said.getvalue()) and "step 1/2" in said.getvalue()


# --------------------------------------------------------------------------------------------------- files and code


@pytest.mark.parametrize(
    "path",
    [p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("core", "reward_server", "rollout", "trainer")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_nothing_is_unpickled(path):
    """But for the question of a rollout worker to the environment that it started, which no answer of it is."""
    found = imports(path) & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    if path.relative_to(ROOT).as_posix() == "rollout/environment.py":
        tree = ast.parse(path.read_text())
        loads = {
            outer.name
            for outer in tree.body
            for node in ast.walk(outer)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("pickle.loads", "pickle.load")
        }
        assert found == {"pickle"} and loads == {"serve"}, "only the child reads pickle, from its parent"
    else:
        assert not found, f"{found}: what comes over a socket or from a file must not be code"


@pytest.mark.parametrize("folder", ["core", "reward_server", "rollout", "trainer", "launch", "examples", "benchmarks"])
def test_torch_load_reads_weights_only_and_no_model_brings_code(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if ast.unparse(node.func).endswith("torch.load"):
                    assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
                assert given.get("trust_remote_code", "False") == "False", f"{path}:{node.lineno}"


class Bomb:
    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_model_that_is_a_pickle_is_not_run(tmp_path):
    folder = tiny_models.save_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unpickl|unsupported"):
        load_causal_lm(str(folder), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_nothing_here_listens_everywhere():
    for path in (p for p in (ROOT / "launch").rglob("*") if p.is_file() and p.suffix != ".pyc"):
        assert not re.search(r"0\.0\.0\.0|\[::\]|INADDR_ANY", path.read_text()), path


# ------------------------------------------------------------------------------------------------- the token of Ray


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_token_is_its_owners_alone_whatever_the_umask(home):
    before = os.umask(0)
    try:
        ray_auth.private_token(make=True)
    finally:
        os.umask(before)
    file = home / ".ray" / "auth_token"
    assert (mode(file), mode(file.parent)) == (0o600, 0o700) and len(file.read_text()) == 64
    ray_auth.private_token(make=True)
    assert len({file.read_text()}) == 1


def test_a_token_that_others_may_read_is_tightened_once_and_told(home, capsys):
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o755)
    file.write_text("t" * 64)
    file.chmod(0o644)
    ray_auth.private_token(make=False)
    assert (mode(file), mode(file.parent), file.read_text()) == (0o600, 0o700, "t" * 64)
    assert "others could read the token of Ray" in capsys.readouterr().err
    ray_auth.private_token(make=False)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user, which root alone may")
def test_a_token_of_another_user_is_refused(home):
    file = home / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700)
    file.write_text("t" * 64)
    file.chmod(0o600)
    os.chown(file, 4321, 4321)
    with pytest.raises(UserError, match="belongs to another user; name another file in RAY_AUTH_TOKEN_PATH"):
        ray_auth.private_token(make=True)


def test_a_ray_of_ones_own_without_a_token_is_refused_unless_one_says_so(home, monkeypatch):
    cfg = config.load(None, LEAST)
    ray_auth.refuse_unset(cfg)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="RAY_AUTH_MODE = disabled: .* runs code as its user.*--resources.insecure"):
        ray_auth.refuse_unset(cfg)
    ray_auth.refuse_unset(config.load(None, LEAST | {"resources.insecure": "true"}))


# ------------------------------------------------------------------------------------------------------- the page


def test_every_claim_of_the_page_names_a_test_that_is_there():
    page = (ROOT / "SECURITY.md").read_text()
    tables = re.findall(r"\| what we do \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(tables) >= 5 and len(rows) >= 25
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row.split("|")[-2])
        assert named, f"no test is named: {row}"
        for file, name in named:
            assert (ROOT / file).is_file(), file
            assert not name or f"def {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"
