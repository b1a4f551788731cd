"""Every command that README, AGENTS.md and docs/ show, run as it stands in a checkout; smaller where it takes long.

A command that no rule knows fails here, so that a page cannot promise what nobody ran.
"""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import browser
import documented
import tiny_models
from cards_run import ROOT, checkout
from documented import Command

HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"  # nothing is downloaded here: a small model of this kind stands in its place
SMALL = {
    "run.steps": "1",
    "data.eval_prompts": "4",
    "rollout.workers": "1",
    "rollout.batch_size": "16",
    "rollout.chunk_size": "8",
    "rollout.max_new_tokens": "16",
    "ppo.mini_batch_size": "8",
    "ppo.micro_batch_size": "8",
}
# What another test runs for real, where more stands around it than a command: the whole demo, a cluster, SLURM's tools.
RAY_JOB = "tests/e2e/test_submit.py::test_a_job_trains_on_a_cluster_that_was_there"
HTTP = "tests/e2e/test_reward_http.py"
ELSEWHERE = {
    r"bash launch/demo\.sh": "tests/e2e/test_learning.py::test_the_demo_learns_to_state_facts_and_to_stop",
    r"bash launch/vllm_venv\.sh": "tests/e2e/test_vllm.py::test_the_interpreter_has_what_a_worker_wants",
    r"tokenppo train .* --rollout\.engine vllm .*": (
        "tests/e2e/test_vllm.py::test_a_run_on_cards_trains_with_vllm_and_passes_its_own_checks"
    ),
    r"docker (build|run|cp) .*": "tests/e2e/test_docker_steps.py::test_the_cpu_image_can_be_made_and_is_well",
    r"tokenppo doctor.*": "tests/e2e/test_doctor.py::test_a_machine_that_is_well_in_words",
    r"docker compose .*": "tests/e2e/test_docker_steps.py::test_a_learner_and_its_server_run_as_compose_has_them",
    # These want a network, or install for minutes: what they make, or decide by, is tested.
    r"bash docker/lock\.sh": "tests/test_locks.py::test_an_image_that_trains_has_what_pyproject_asks_for",
    r"bash launch/lowest\.sh": "tests/test_locks.py::test_the_lowest_releases_are_bounds_of_pyproject",
    r"python docker/audit\.py": "tests/test_audit.py::test_a_vulnerability_is_named_with_what_mends_it",
    r"tokenppo sweep .*": (
        "tests/e2e/test_sweep.py::test_a_failing_trial_ends_no_other_and_a_larger_grid_trains_what_is_new"
    ),
    r"tokenppo serve-reward .*": f"{HTTP}::test_cards_are_rewarded_and_trained_over_http_as_in_process",
    r"tokenppo submit ray .*": RAY_JOB,
    r"python tests/test_submit\.py": "tests/test_submit.py::test_it_is_as_the_checked_in_one",
    r"python tests/test_submit_k8s\.py": (
        "tests/test_submit_k8s.py::test_the_manifest_for_two_nodes_is_the_one_in_the_checkout"
    ),
    r"tokenppo train .* --resources\.ray_address auto": RAY_JOB,
    r"tokenppo submit k8s .*": "tests/test_submit_k8s.py::test_a_documented_manifest_keeps_to_every_rule",
}
# Pattern -> what is run instead; groups as in re.sub. The first that matches the whole command counts.
RUN: dict[str, str | Callable[[str], str]] = {
    # The installation is what differs from the run that this is: --all and the files named are run by it.
    r"bash launch/test\.sh.*": "bash launch/test.sh tests/test_readme.py --collect-only -q",
    r"source (.*)": r"source \1 && tokenppo --help",
    r"(tokenppo train --help)": r"\1",
    r"(tokenppo report runs/demo) runs/calm (-o \S+)": r"\1 runs/demo \2",
    r"(tokenppo eval .*?) --require .*": r"\1 --require 'reward/total > -1000'",
    r"(tokenppo replay .*) --step \d+": r"\1 --step 1",
    r"(tokenppo submit slurm .* --dry-run)": r"\1 | bash -n",
    r"((?:tokenppo|python -m tokenppo|accelerate launch) .*)": lambda words: (
        small(words) if "train" in words else words
    ),
    r"(python benchmarks/cards_seeds\.py)": r"\1 --seeds 1 --steps 8",
    r"(python benchmarks/ppo_iteration\.py)(?: --steps 12( .*))?": r"\1 --steps 3 --turns 1\2",
    r"(python benchmarks/dense_vs_terminal\.py)(?: --quick)?": r"\1 --quick --updates 1 --batch 32 --arms dense",
    r"(python benchmarks/value_functions\.py) .*": (
        r"\1 --tasks cards --values shared --seeds 1 --steps 1 --json curves.json --png curves.png"
    ),
    r"(python benchmarks/ledger\.py)": r"\1 --steps 2 --fractions 1",
    r"(python benchmarks/memory_estimate\.py).*": r"\1 --only one",
    r"(python benchmarks/reward\.py)": r"\1 --only codec --rounds 1 --tokens 4096",
    r"(python benchmarks/rollout\.py) .*": (
        r"\1 --json out.json --sizes 1.1M --lengths equal --batch 4 --tokens 8 --turns 1"
    ),
    r"(python benchmarks/weight_sync\.py) .*": r"\1 --json out.json --quick",
    r"(python benchmarks/staleness\.py .* --only curves) (.*)": r"\1 --seeds 1 --steps 2 \2",
    r"(python benchmarks/rounds\.py) .*": r"\1 --json out.json --batch 4 --longest 16 --steps 1",
    r"(python benchmarks/ppo_vs_trl\.py) .*": r"\1 --json out.json --quick --tiers a --passive",
    r"(python benchmarks/mistakes\.py)": r"\1 --rows 2",
    r"(python benchmarks/learner\.py) .*": (
        r"\1 --device cpu --dtype float32 --sizes tiny --batch 4 --prompt 8 --response 16 --tokens 64 --rounds 1"
    ),
    r"(python examples/cards/make\.py --no-train .*)": r"\1",
    r"(python examples/calculator/make\.py)": r"\1 --steps 20",
    r"(python tests/e2e/report_screenshot\.py) .*": r"\1 runs/demo report.png",
    r"(tokenppo check-reward .*)": r"\1",
    r"(python -m core\.metrics)": r"\1",
    r"(python -m core\.\w+) > (docs/\w+\.md)": r"\1 | diff - \2",
}


def small(train: str) -> str:
    """A training command with values that end it in seconds; what it says itself about them is left out."""
    for key in SMALL:
        train = re.sub(rf" --{re.escape(key)} \S+", "", train)
    return " ".join([train.replace(HUB_ID, "./qwen"), *(f"--{key} {value}" for key, value in SMALL.items())])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkout with the files that pages let their readers write."""
    place = checkout(tmp_path_factory.mktemp("commands") / "tokenppo")
    for page, word in ((ROOT / "README.md", "no_shouting"), (ROOT / "docs" / "first_reward.md", "no_orders")):
        (code,) = [block for block in documented.blocks(page, "python") if word in block]
        name = re.match(r"# (\S+)\n", code)[1]
        (place / name).write_text(code)
    (said,) = documented.blocks(ROOT / "docs" / "first_reward.md", "json")
    (place / "said.jsonl").write_text(said)
    (place / "prompts.jsonl").write_text('{"prompt": "Ask for salt."}\n{"prompt": "Ask for bread."}\n')
    tiny_models.save_model(place / "qwen", "qwen2-tied")
    return place


def shell(line: str, folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}", "WANDB_MODE": "offline"}
    line = line.replace("/shared/runs", str(folder / "runs"))
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


# Benchmarks are tools of ours, and one installs another trainer. What the others do, tests do with more around it:
# test_many_learners.py, test_command.py, test_eval.py.
LAST = (
    r"python benchmarks/\w+\.py.*|accelerate launch .*|.* --accelerate zero2 .*|tokenppo eval .* --(samples|require) .*"
)


def parameter(command: Command) -> object:
    seconds = 200 if "ppo_vs_trl" in command.text else 70
    marks = [pytest.mark.long(seconds=seconds)] if re.fullmatch(LAST, command.text) else []
    return pytest.param(command, marks=marks, id=f"{command.page}: {command.text[:80]}")


DONE: set[str] = set()  # lines that worked: commands that differ in size alone are shortened to one
HERE = [c for c in documented.commands() if not any(re.fullmatch(pattern, c.text) for pattern in ELSEWHERE)]


def shortened(command: Command) -> str:
    for pattern, line in RUN.items():
        if re.fullmatch(pattern, command.text):
            return line(command.text) if callable(line) else re.sub(pattern, line, command.text)
    pytest.fail(f"no rule in {Path(__file__).name} runs `{command.text}` of {command.page}")


@pytest.mark.slow
@pytest.mark.timeout(1000)  # the first run of a comparison installs what it is compared with
@pytest.mark.parametrize("command", [parameter(command) for command in HERE])
def test_a_documented_command_works(command: Command, folder):
    line = shortened(command)
    if "report_screenshot" in line and browser.chromium() is None:
        pytest.skip(browser.ABSENT)
    if "runs/demo" in line and not (folder / "runs" / "demo").exists():
        demo = shell(small("tokenppo train --config configs/cards.yaml --run.name demo"), folder)
        assert demo.returncode == 0, demo.stdout + demo.stderr
    if "reweight runs/recorded" in line:
        assert (folder / "runs" / "recorded" / "ledger").is_dir(), "the command that makes this run comes before it"
    if "replay runs/exact" in line and not (folder / "runs" / "exact").exists():
        (train,) = [c.text for c in HERE if "train" in c.text and "--run.name exact " in c.text]
        exact = shell(small(train), folder)
        assert exact.returncode == 0, exact.stdout + exact.stderr
    if "configs/calculator.yaml" in line and not (folder / "runs" / "calculator-task").exists():
        task = shell("python examples/calculator/make.py --steps 20", folder)
        assert task.returncode == 0, task.stdout + task.stderr
    done = shell(line, folder)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    DONE.add(line)


@pytest.mark.slow
def test_the_script_of_the_readme_trains(folder):
    (code,) = [block for block in documented.blocks(ROOT / "README.md", "python") if "tokenppo.train(" in block]
    small = {key: int(value) for key, value in SMALL.items()}

    def section(section: str, /, **more: object) -> str:
        return (
            f"{section}={ {k.partition('.')[2]: v for k, v in small.items() if k.startswith(f'{section}.')} | more!r}"
        )

    text = code.replace(HUB_ID, "./qwen")
    for written, instead in (
        ('rollout={"batch_size": 64}', f"{section('rollout')}, {section('ppo')}, {section('data')}"),
        ('run={"name": "polite"}', section("run", name="polite")),
    ):
        assert text.count(written) == 1, written
        text = text.replace(written, instead)
    (folder / "from_the_readme.py").write_text(text)
    done = shell("python from_the_readme.py", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'after'" in done.stdout and "runs" in done.stdout.splitlines()[-1], done.stdout


@pytest.mark.slow
def test_the_programs_of_the_page_on_the_ledger_run(folder):
    if not (folder / "runs" / "recorded").exists():
        (line,) = [c.text for c in documented.commands() if "--run.name recorded" in c.text]
        made = shell(small(line), folder)
        assert made.returncode == 0, made.stdout + made.stderr
    programs = documented.blocks(ROOT / "docs" / "ledger.md", "python")
    assert len(programs) == 2
    for place, program in enumerate(programs):
        (folder / f"of_the_ledger_{place}.py").write_text(program)
        done = shell(f"python of_the_ledger_{place}.py", folder)
        assert done.returncode == 0 and done.stdout.strip(), done.stdout + done.stderr


def test_each_documented_command_has_a_rule_and_each_rule_a_command():
    for command in HERE:
        assert shortened(command)
    texts = [command.text for command in documented.commands()]
    for pattern in [*ELSEWHERE, *RUN]:
        assert any(re.fullmatch(pattern, text) for text in texts), f"no page has a command like {pattern}"
    for test in ELSEWHERE.values():
        file, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / file).read_text(), f"there is no {test}"
