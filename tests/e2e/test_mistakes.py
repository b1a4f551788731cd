"""What users get wrong: one line each with key, value and remedy, exit 2, and nothing left behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

import tiny_models
from cards_run import ROOT
from core import config, faults
from core.faults import ProcessFault, UserError
from launch import cli, cluster, room, users_code, verbs

CONFIG = """
model: {path: model, dtype: float32}
data: {path: prompts.jsonl}
rollout: {batch_size: 8, chunk_size: 4, max_new_tokens: 8}
rewards: {mine: {fn: rewards.py:fine}}
ppo: {mini_batch_size: 4, micro_batch_size: 4}
log: {trackers: []}
run: {steps: 1, dir: runs}
"""
REWARDS = """
def fine(completions, **_):
    return [0.0] * len(completions)

def raises(completions, **_):
    raise RuntimeError("out of coffee")

def is_nan(completions, **_):
    return [float("nan")] * len(completions)

def too_long(completion_ids, **_):
    return [[0.0] * (len(ids) + 1) for ids in completion_ids]

def wants(completions, answer):
    return [0.0] * len(completions)

constant = 3
"""
BERT = json.dumps({"model_type": "bert", "architectures": ["BertForMaskedLM"]})
GPT2 = json.dumps({"model_type": "gpt2"})
# name: options, files to write first, what the line must say
MISTAKES: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "unknown key": (["--optim.lrr", "1"], {}, ["optim.lrr", "did you mean optim.lr"]),
    "unknown section": (["--optimizer.lr", "1"], {}, ["optimizer", "did you mean optim"]),
    "name of another library": (["--optim.learning_rate", "1"], {}, ["optim.lr"]),
    "out of range": (["--ppo.gamma", "1.5"], {}, ["ppo.gamma", "1.5", "less than or equal to 1"]),
    "not finite": (["--optim.lr", "nan"], {}, ["optim.lr", "nan", "finite"]),
    "infinite": (["--ppo.kl_coef", "inf"], {}, ["ppo.kl_coef", "inf", "finite"]),
    "negative": (["--optim.lr", "-1"], {}, ["optim.lr", "-1", "greater than or equal to 0"]),
    "no number": (["--run.steps", "many"], {}, ["run.steps", "many", "integer"]),
    "no choice": (["--model.dtype", "float16"], {}, ["model.dtype", "float16", "bfloat16"]),
    "not a list": (["--log.trackers", "neptune"], {}, ["log.trackers", "neptune"]),
    "option without dashes": (["steps=3"], {}, ["steps=3", "--section.key"]),
    "bad YAML": ([], {"config.yaml": "model: {path: model\n"}, ["config.yaml:2", "YAML"]),
    "key twice": ([], {"config.yaml": CONFIG + "run: {steps: 2}\n"}, ["config.yaml", "`run` appears twice"]),
    "no mapping": ([], {"config.yaml": "- a\n"}, ["config.yaml", "list"]),
    "batch that does not divide": (["--ppo.mini_batch_size", "3"], {}, ["ppo.mini_batch_size", "3", "[2, 4]"]),
    "samples that do not divide": (["--rollout.n_samples_per_prompt", "3"], {}, ["rollout.batch_size", "[6, 9]"]),
    "a share of a GPU on a CPU": (
        ["--resources.device", "cpu", "--rollout.gpus_per_worker", "0.5"],
        {},
        ["rollout.gpus_per_worker", "0.5", "does nothing on a CPU"],
    ),
    "missing model": (["--model.path", "./absent"], {}, ["model.path", "absent", "no such folder"]),
    "no causal LM": (["--model.path", "./t5"], {}, ["model.path", "t5", "no causal language model"]),
    "model folder without config": (["--model.path", "./empty"], {"empty/x": ""}, ["model.path", "empty"]),
    "unknown architecture": (
        ["--model.path", "./odd"],
        {"odd/config.json": '{"model_type": "zebra"}', "odd/tokenizer.json": "{}"},
        ["model.path", "odd"],
    ),
    "missing prompts": (["--data.path", "absent.jsonl"], {}, ["data.path", "absent.jsonl", "no such file"]),
    "empty prompts": ([], {"prompts.jsonl": "\n"}, ["data.path", "no rows"]),
    "broken line": ([], {"prompts.jsonl": '{"prompt": "a"}\n{"prompt": \n'}, ["prompts.jsonl:2", "JSON"]),
    "line that is a list": ([], {"prompts.jsonl": "[1]\n"}, ["prompts.jsonl:1", "list"]),
    "no prompt column": ([], {"prompts.jsonl": '{"text": "a"}\n'}, ["row 1", "`prompt`", "data.prompt_column"]),
    "prompt beyond the window": ([], {"prompts.jsonl": json.dumps({"prompt": "cat " * 400})}, ["row 1", "tokens"]),
    "response beyond the window": (["--rollout.max_new_tokens", "300"], {}, ["rollout.max_new_tokens", "300", "256"]),
    "no rewards file": (["--rewards.mine.fn", "absent.py:fn"], {}, ["rewards.mine.fn", "absent.py"]),
    "no reward function": (["--rewards.mine.fn", "rewards.py:absent"], {}, ["rewards.mine.fn", "absent"]),
    "no reward module": (["--rewards.mine.fn", "absent_module:fn"], {}, ["rewards.mine.fn", "absent_module"]),
    "reward that is a number": (["--rewards.mine.fn", "rewards.py:constant"], {}, ["rewards.mine.fn", "constant"]),
    "reward with a syntax error": (["--rewards.mine.fn", "b.py:f"], {"b.py": "def f(:\n"}, ["rewards.mine.fn", "b.py"]),
    "reward that wants a column": (["--rewards.mine.fn", "rewards.py:wants"], {}, ["rewards.mine.fn", "answer"]),
    "reward with wrong options": (["--rewards.mine.options", "[1]"], {}, ["rewards.mine.options"]),
    "no reward at all": (["--rewards.mine.weight", "0"], {}, ["rewards", "weight 0"]),
    "component name": (["--rewards.total.fn", "rewards.py:fine"], {}, ["rewards.total", "total"]),
    "run name that climbs": (["--run.name", "../x"], {}, ["run.name", "../x"]),
    "run name of 300": (["--run.name", "x" * 300], {}, ["run.name"]),
    "run folder that is a file": (["--run.dir", "rewards.py"], {}, ["run.dir", "rewards.py"]),
    "truth for a number": (
        [],
        {"config.yaml": CONFIG.replace("steps: 1", "steps: true")},
        ["run.steps", "true", "number"],
    ),
    "option without value": (["--run.steps"], {}, ["run.steps", "integer"]),
    "key that is a list": ([], {"config.yaml": "? [a]\n: 1\n"}, ["config.yaml:1", "key must be a word"]),
    "binary config": ([], {"config.yaml": "a: \x00\n"}, ["config.yaml", "YAML"]),
    "config that is a folder": (["--config", "model"], {}, ["--config model", "cannot be read"]),
    "betas out of range": (["--optim.betas", "[2, 0.5]"], {}, ["optim.betas", "2.0", "less than 1"]),
    "twenty digits": (["--rollout.batch_size", "1" + "0" * 19 + "1"], {}, ["ppo.mini_batch_size", "nearest"]),
    "masked model": (["--model.path", "./bert"], {"bert/config.json": BERT}, ["model.path", "BertForMaskedLM"]),
    "config.json that is none": (["--model.path", "./odd"], {"odd/config.json": "{"}, ["model.path", "config.json"]),
    "no tokenizer": (
        ["--model.path", "./odd"],
        {"odd/config.json": GPT2},
        ["model.path", "tokenizer", "save_pretrained"],
    ),
    "no weights": (
        ["--model.path", "./odd"],
        {"odd/config.json": GPT2, "odd/tokenizer.json": "{}"},
        ["model.path", "no weights", "model.safetensors"],
    ),
    "weights cut off": ([], {"model/model.safetensors": "CUT"}, ["model.path", "model.safetensors", "cut off"]),
    "weights that are none": ([], {"model/model.safetensors": "x" * 99}, ["model.path", "model.safetensors"]),
    "a shard that is not there": (
        ["--model.path", "./odd"],
        {
            "odd/config.json": GPT2,
            "odd/tokenizer.json": "{}",
            "odd/model.safetensors.index.json": '{"weight_map": {"a": "model-1-of-2.safetensors"}}',
        },
        ["model.path", "model-1-of-2.safetensors", "is not there"],
    ),
    "prompts that are a folder": (
        ["--data.path", "d.jsonl"],
        {"d.jsonl/x": ""},
        ["data.path", "d.jsonl", "no such file"],
    ),
    "Parquet that is none": (["--data.path", "p.parquet"], {"p.parquet": "x" * 99}, ["data.path", "no Parquet file"]),
    "a prompt that is a number": ([], {"prompts.jsonl": '{"prompt": 3}\n'}, ["data.path", "row 1", "`prompt`"]),
    "messages without a template": (
        [],
        {"prompts.jsonl": '{"prompt": [{"role": "user", "content": "a"}]}\n'},
        ["data.path", "row 1", "chat template"],
    ),
    "broken held-out line": (
        ["--data.eval_path", "e.jsonl"],
        {"e.jsonl": "x\n"},
        ["data.eval_path", "e.jsonl:1", "JSON"],
    ),
    "no prompts named": (["--data.path", "null"], {}, ["data.path", "is required", "data.mixture"]),
    "prompts and a mixture": (["--data.mixture", "{prompts.jsonl: 1}"], {}, ["data.mixture", "data.path", "take one"]),
    "a mixture with a missing file": (
        ["--data.path", "null", "--data.mixture", "{prompts.jsonl: 1, absent.jsonl: 1}"],
        {},
        ["data.mixture", "absent.jsonl", "no such file"],
    ),
    "a mixture with weight 0": (
        ["--data.path", "null", "--data.mixture", "{prompts.jsonl: 0}"],
        {},
        ["data.mixture", "prompts.jsonl", "greater than 0"],
    ),
    "a mixture with an empty file": (
        ["--data.path", "null", "--data.mixture", "{prompts.jsonl: 1, e.jsonl: 1}"],
        {"e.jsonl": "\n"},
        ["data.mixture", "e.jsonl", "no rows"],
    ),
    "balance without a column": (["--data.balance", "0.5"], {}, ["data.balance = 0.5", "data.balance_column"]),
    "balance by no column": (["--data.balance_column", "kind"], {}, ["data.balance_column = kind", "prompt"]),
    "balance out of range": (["--data.balance", "2"], {}, ["data.balance", "less than or equal to 1"]),
    "difficulty of no row": (["--data.difficulty_column", "level"], {}, ["data.difficulty_column = level", "row 1"]),
    "difficulty in words": (
        ["--data.difficulty_column", "level"],
        {"prompts.jsonl": '{"prompt": "a", "level": "hard"}\n'},
        ["data.difficulty_column = level", "row 1", "'hard'", "number"],
    ),
    "curriculum in the order of the file": (
        ["--data.difficulty_column", "level", "--data.shuffle", "false"],
        {},
        ["data.shuffle = false", "data.difficulty_column"],
    ),
    "curriculum of nothing": (
        ["--data.curriculum_epochs", "3"],
        {},
        ["data.curriculum_epochs", "difficulty_column", "measure_difficulty"],
    ),
    "one sample to skip by": (
        ["--data.skip_solved", "2"],
        {},
        ["data.skip_solved = 2", "rollout.n_samples_per_prompt"],
    ),
    "no augmentation file": (["--data.augment", "absent.py:f"], {}, ["data.augment", "absent.py", "no file"]),
    "no augmentation function": (["--data.augment", "rewards.py:absent"], {}, ["data.augment", "absent"]),
    "augmentation without a name": (["--data.augment", "rewards.py"], {}, ["data.augment", "path/file.py:fn"]),
    "augmentation that gives nothing": (
        ["--data.augment", "a.py:f"],
        {"a.py": "def f(row, rng):\n    pass\n"},
        ["data.augment", "prompt 0", "NoneType"],
    ),
    "two kinds of held-out prompts": (
        ["--data.eval_frac", "0.5", "--data.eval_path", "prompts.jsonl"],
        {},
        ["data.eval_frac = 0.5", "data.eval_path"],
    ),
    "a share that holds nothing out": (["--data.eval_frac", "1e-9"], {}, ["data.eval_frac", "none of the 2 rows"]),
    "reward whose import raises": (["--rewards.mine.fn", "b.py:f"], {"b.py": "1 / 0\n"}, ["rewards.mine.fn", "b.py:1"]),
    "run name that is empty": (["--run.name", ""], {}, ["run.name"]),
    "run folder that cannot be": (["--run.dir", "/proc/self/x"], {}, ["run.dir", "/proc", "give another"]),
    "address that is none": (["--resources.ray_address", "nowhere"], {}, ["resources.ray_address", "host:port"]),
    "too little shared memory": (["--resources.object_store_mb", "100000000"], {}, ["object_store_mb", "--shm-size"]),
    "too little disk": (["--run.keep_checkpoints", "10000000000"], {}, ["run.dir", "free", "run.keep_checkpoints"]),
    "no cuda": (["--resources.device", "cuda"], {}, ["resources.device", "cuda"]),
    "vLLM that is not there": (["--rollout.engine", "vllm"], {}, ["rollout.engine = vllm", "launch/vllm_venv.sh"]),
    "an interpreter that is not there": (["--rollout.python", "p"], {}, ["rollout.python", "no such interpreter"]),
    "an interpreter without vLLM": (
        ["--rollout.engine", "vllm", "--rollout.python", sys.executable],
        {},
        ["rollout.python", "has no vllm", "launch/vllm_venv.sh"],
    ),
    "sleep of the embedded engine": (["--rollout.sleep", "true"], {}, ["rollout.sleep = true", "rollout.engine"]),
    "a secret in an option": (
        ["--rewards.mine.options.api_key", "hunter2"],
        {},
        ["rewards.mine.options.api_key", "is a secret by its name", "environment or a file"],
    ),
    "a token for a reward server": (
        ["--rewards.mine.fn", "http://127.0.0.1:1", "--rewards.mine.options.token", "hunter2"],
        {},
        ["rewards.mine.options.token", "is a secret by its name", "token_file"],
    ),
    "no accelerate file": (["--accelerate", "zero9"], {}, ["--accelerate zero9", "zero2"]),
    "processes without a file": (["--num-processes", "2"], {}, ["--num-processes 2", "--accelerate"]),
}
# Of the other verbs: the whole line, what the answer must say.
NO_RUN = ["RUN = nowhere", "there is no run in this folder"]
VERB_MISTAKES: dict[str, list[str]] = {
    "sampel runs/x": ["sampel", "did you mean sample"],
    "check-reward absent.py:f": ["absent.py", "there is no file", "there is rewards.py"],
    "check-reward rewards.py:fine --options [1]": ["--options [1]", "mapping"],
    "submit slurm --config config.yaml --nodes 0": ["--nodes 0", "at least 1"],
    "submit slurm --config config.yaml --optim.lrr 1": ["optim.lrr", "did you mean optim.lr"],
    "submit ray --config config.yaml": ["--address", "http://127.0.0.1:8265"],
    "submit ray --config config.yaml --time 1:00:00": ["--time", "is for tokenppo submit slurm"],
    "submit k8s --config config.yaml": ["--image"],
    "submit moon --config config.yaml": ["invalid choice", "slurm"],
    "doctor --config absent.yaml": ["--config absent.yaml", "no such file"],
    "doctor --jsn": ["--jsn", "did you mean --json"],
    "watch nowhere": NO_RUN,
    "sweep --config config.yaml --grid optim.lr -o s": ["--grid optim.lr", "KEY=VALUE"],
    "sweep --config config.yaml --grid optim.lrr=1,2 -o s": ["optim.lrr", "did you mean optim.lr"],
    "sweep --config absent.yaml --grid optim.lr=1,2 -o s": ["--config absent.yaml", "no such file"],
    "sample nowhere": NO_RUN,
    "eval nowhere": ["POLICY = nowhere", "there is no such folder"],
    "eval model": ["data.eval_path", "no held-out prompts", "--data"],
    "eval model --prompts 0": ["data.eval_prompts = 0", "greater than or equal to 1"],
    "reweight nowhere": NO_RUN,
    "report nowhere": NO_RUN,
    "replay nowhere --step 1": NO_RUN,
    "replay nowhere --step x": ["--step", "invalid int value", "replay --help"],
    "export nowhere out": NO_RUN,
    "serve-reward --config absent.yaml": ["--config absent.yaml", "no such file"],
    "serve-reward --config config.yaml --host 0.0.0.0": ["--host 0.0.0.0", "a token is wanted", "--token-file"],
    "serve-reward --config config.yaml --port 70000": ["--port 70000", "1 to 65535"],
    "serve-reward --config config.yaml --token-file absent": ["--token-file absent", "cannot be read"],
    "health runs --stale-s soon": ["--stale-s", "invalid float value", "health --help"],
}


def make_task(folder: Path) -> None:
    tiny_models.save_model(folder / "model", "gpt2")

    tiny_models.make_tokenizer().save_pretrained(folder / "t5")
    (folder / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 32, "vocab_size": 99}))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat sat"}\n{"prompt": "the dog ran"}\n')
    (folder / "config.yaml").write_text(CONFIG)


@pytest.fixture
def task(tmp_path) -> Path:
    make_task(tmp_path)
    return tmp_path


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


def prepared(task: Path, name: str) -> tuple[list[str], list[str]]:
    options, files, words = MISTAKES[name]
    for path, text in files.items():
        (task / path).parent.mkdir(exist_ok=True)
        if text == "CUT":
            (task / path).write_bytes((task / path).read_bytes()[:-9])
        else:
            (task / path).write_text(text)
    return ["train", "--config", "config.yaml", *options], words


def says(err: str, words: list[str]) -> None:
    lines = err.splitlines()
    assert lines and all(line.startswith("tokenppo: ") for line in lines), err
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], f"{word!r} is not in: {lines[0]}"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm")
@pytest.mark.parametrize("name", MISTAKES)
def test_dry_run_finds_it_and_says_one_line(name, task, monkeypatch, capfd):
    argv, words = prepared(task, name)
    monkeypatch.chdir(task)
    before, children = listing(task), psutil.Process().children(recursive=True)
    capfd.readouterr()
    assert cli.main([*argv, "--dry-run"]) == 2
    out, err = capfd.readouterr()
    says(err, words)
    assert out == "" and listing(task) == before
    assert not left_behind(children)


def left_behind(before: list[psutil.Process]) -> list[psutil.Process]:
    """Children of this process that were not there before and do not end by themselves."""
    new = [child for child in psutil.Process().children(recursive=True) if child not in before]
    return psutil.wait_procs(new, timeout=5)[1]


def command(task: Path, *argv: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-P", "-m", "tokenppo", *argv]
    environment = os.environ | {"HOME": str(task / "home"), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(line, cwd=task, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MISTAKES if "little" not in n])
def test_the_command_itself_starts_nothing(name, task):
    """Without --dry-run, as a process of its own: the same line, and neither a run folder nor a process is left."""
    argv, words = prepared(task, name)
    (task / "home").mkdir()
    before = listing(task)
    done = command(task, *argv)
    assert done.returncode == 2, done.stdout + done.stderr
    says(done.stderr, words)
    assert done.stdout == "" and listing(task) == before
    assert not left_behind([])


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_the_dry_run_as_a_process_of_its_own(name, task):
    """Nothing on stderr but the line: no library says anything beside it."""
    argv, words = prepared(task, name)
    (task / "home").mkdir()
    before = listing(task)
    done = command(task, *argv, "--dry-run")
    assert done.returncode == 2, done.stdout + done.stderr
    says(done.stderr, words)
    assert done.stdout == "" and listing(task) == before


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Nothing is written there, so that one does for all."""
    folder = tmp_path_factory.mktemp("verbs")
    make_task(folder)
    (folder / "home").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("line", VERB_MISTAKES)
def test_a_mistake_with_another_verb_is_one_line_too(line, place):
    before = listing(place)
    done = command(place, *line.split())
    assert done.returncode == 2, done.stdout + done.stderr
    says(done.stderr, VERB_MISTAKES[line])
    assert done.stdout == "" and listing(place) == before


SLOW_TO_IMPORT = """
import os, pathlib, time
pathlib.Path("pid").write_text(str(os.getpid()))
print("hello")
time.sleep(600)
"""


@pytest.mark.slow
def test_a_component_that_takes_long_to_import_is_left_to_the_learner(task, monkeypatch, capfd):
    monkeypatch.chdir(task)
    monkeypatch.setattr(users_code, "PATIENCE_S", 1.0)
    (task / "slow.py").write_text(SLOW_TO_IMPORT)
    users_code.check_apart(config.load(Path("config.yaml"), {"rewards.mine.fn": "slow.py:f"}), None)
    assert not psutil.pid_exists(int((task / "pid").read_text()))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_component_whose_import_kills_its_process_is_left_to_the_learner(task, monkeypatch):
    monkeypatch.chdir(task)
    (task / "dies.py").write_text("import os\nos._exit(3)\n")
    users_code.check_apart(config.load(Path("config.yaml"), {"rewards.mine.fn": "dies.py:f"}), None)
    with pytest.raises(UserError, match="absent"):  # and what answers is heard
        users_code.check_apart(config.load(Path("config.yaml"), {"rewards.mine.fn": "rewards.py:absent"}), None)


STARTS_A_SERVER = """
import multiprocessing, pathlib, subprocess
multiprocessing.set_start_method("spawn")
server = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path("pid").write_text(str(server.pid))
def f(completions, **_):
    return [0.0] * len(completions)
"""


LOOK = """
import ctypes, pathlib, sys
import psutil
from core import config
from launch import users_code
users_code.check_apart(config.load(pathlib.Path("config.yaml"), {"rewards.mine.fn": sys.argv[1]}), None)
assert not psutil.Process().children(recursive=True)
adopts = ctypes.c_int(-1)
if sys.platform == "linux":  # what this process starts later is not reaped by anybody else
    ctypes.CDLL(None).prctl(37, ctypes.byref(adopts))
    assert adopts.value == 0
"""


@pytest.mark.slow
def test_what_a_component_starts_when_it_is_imported_ends_with_the_look_at_it(task):
    """The learner and the reward server import it again, and would find its port taken."""
    (task / "starts.py").write_text(STARTS_A_SERVER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-P", "-c", LOOK, "starts.py:f"]
    done = subprocess.run(line, cwd=task, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not psutil.pid_exists(int((task / "pid").read_text()))


@pytest.mark.slow
def test_a_killed_command_takes_the_look_with_it(task):
    (task / "slow.py").write_text(SLOW_TO_IMPORT)
    (task / "home").mkdir()
    line = [
        sys.executable,
        "-P",
        "-m",
        "tokenppo",
        "train",
        "--config",
        "config.yaml",
        "--rewards.mine.fn",
        "slow.py:f",
    ]
    environment = os.environ | {"HOME": str(task / "home"), "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(line, cwd=task, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not ((task / "pid").exists() and (task / "pid").read_text()):
        assert started.poll() is None
    look = psutil.Process(int((task / "pid").read_text()))
    started.kill()
    started.wait()
    look.wait(timeout=10)  # raises TimeoutExpired where it goes on


def test_held_out_prompts_that_are_trained_on_are_told_before_the_start(task, monkeypatch, capfd):
    monkeypatch.chdir(task)
    (task / "held.jsonl").write_text('{"prompt": "the cat sat"}\n{"prompt": "the mat sat"}\n')
    assert cli.main(["train", "--config", "config.yaml", "--data.eval_path", "held.jsonl", "--dry-run"]) == 0
    told = [line for line in capfd.readouterr().out.splitlines() if "training prompts too" in line]
    assert len(told) == 1 and told[0].startswith("warning: 1 of 2 held-out prompts")


def test_an_address_where_nobody_listens_is_another_code(task, monkeypatch, capfd):
    monkeypatch.chdir(task)
    argv = ["train", "--config", "config.yaml", "--resources.ray_address", "127.0.0.1:1"]
    before = listing(task)
    for line in (argv, [*argv, "--dry-run"]):
        capfd.readouterr()
        assert cli.main(line) == ProcessFault.exit_code
        says(capfd.readouterr().err, ["resources.ray_address = 127.0.0.1:1", "no answer", "ray start --head"])
    assert listing(task) == before


def test_a_hub_out_of_reach_is_known_before_its_client_is_asked(monkeypatch):
    """The client would try each file six times: 49 s for a model id, measured."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    values = {"model.path": "nobody/nothing", "data.path": "/p.jsonl", "rewards.a.fn": "/r.py:f"}
    cluster.prepare_hub(config.load(None, values))
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"
    cluster.prepare_hub(config.load(None, values | {"model.path": "/a/folder"}))
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_disk_that_is_too_small_is_refused_less_what_is_there_already(task, monkeypatch):
    cfg = config.load(task / "config.yaml")
    needed = room.written_bytes(cfg, 1000)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="run.dir = .*free; make room, lower run.keep_checkpoints"):
        room.refuse_too_little_disk(cfg, 1000)
    (cfg.run.folder / "final").mkdir(parents=True)
    (cfg.run.folder / "final" / "model.safetensors").write_bytes(b"x")
    room.refuse_too_little_disk(cfg, 1000)


def test_the_page_has_the_codes_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line for line in faults.__doc__.splitlines() if re.match(r"\| \d", line)]
    codes = {int(line.split("|")[1]): line.split("|")[3].strip() for line in rows}
    shown = re.findall(r"^\| (\d+) \| (.*?) \|", page, re.M)
    assert {int(code): text for code, text in shown} == codes
    assert {fault.exit_code for fault in faults.Fault.__subclasses__()} <= set(codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fn", "words"),
    [
        ("raises", "out of coffee"),
        pytest.param("is_nan", "nan", marks=pytest.mark.long(seconds=70)),
        pytest.param("too_long", "9", marks=pytest.mark.long(seconds=70)),
    ],
)
def test_a_reward_that_fails_while_it_runs_ends_with_4(fn, words, task):
    done = command(task, "train", "--config", "config.yaml", "--rewards.mine.fn", f"rewards.py:{fn}")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tokenppo: ") and "mine" in last and words in last, done.stderr
    assert not list((task / "runs").rglob("final"))


def test_a_right_configuration_passes(task, monkeypatch, capsys):
    monkeypatch.chdir(task)
    assert cli.main(["train", "--config", "config.yaml", "--dry-run"]) == 0
    assert "mini-batches" in capsys.readouterr().out and not (task / "runs").exists()


def test_a_tokenizer_without_a_pad_token_works(task, monkeypatch):
    monkeypatch.chdir(task)
    assert PreTrainedTokenizerFast.from_pretrained(task / "model").pad_token is None
    assert cli.main(["train", "--config", "config.yaml", "--dry-run"]) == 0


def test_at_least_sixty_and_each_verb_has_one():
    assert len(MISTAKES) >= 60
    assert {verb.name for verb in verbs.VERBS} <= {line.split()[0] for line in VERB_MISTAKES}
