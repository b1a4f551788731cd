"""What `tokenppo submit` makes: scripts as the checked-in ones, hostile values that stay values, and refusals."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.faults import ProcessFault, UserError
from launch import verbs
from launch.submit import command, ray_job, slurm
from launch.submit.job import Job

ROOT = Path(__file__).parents[1]
CARDS = str(ROOT / "configs" / "cards.yaml")
RENDERED = Path(__file__).parent / "rendered"
FOUR_GPUS = ["--nodes", "3", "--gpus-per-node", "4", "--cpus-per-node", "32", "--rollout.workers", "4"]
# Name of the file -> what was said to make it.
EXAMPLES = {
    "slurm_cpu.sh": ["slurm", "--nodes", "2", "--run.name", "first"],
    "slurm_gpu.sh": ["slurm", *FOUR_GPUS, "--rollout.placement", "apart", "--rollout.gpus_per_worker", "1",
                     "--sbatch", "partition=gpu", "--accelerate", "zero3"],
    "slurm_parted.sh": ["slurm", *FOUR_GPUS, "--rollout.placement", "apart", "--rollout.gpus_per_worker", "1",
                        "--rollout-nodes", "1", "--rollout-sbatch", "partition=small", "--container", "lab/tokenppo:1",
                        "--mount", "/shared:/shared"],
    "slurm_apptainer.sh": ["slurm", "--gpus-per-node", "1", "--container", "/images/tokenppo.sif",
                           "--container-runtime", "apptainer", "--mount", "/shared:/shared"],
    "ray_job.json": ["ray", "--nodes", "2", "--run.name", "first"],
}  # fmt: skip


def made(capsys, *words: str) -> str:
    """The standard output of `tokenppo submit ... --dry-run`."""
    capsys.readouterr()
    options = [*words, "--config", CARDS, "--run.dir", "/shared/runs", "--dry-run"]
    options += ["--python", "/venv/bin/python"] if words[0] == "slurm" else []
    verb, args = verbs.parse(["submit", *options])
    assert verb.do(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def anywhere(text: str) -> str:
    """Without the folder of this checkout, which may be any: /tokenppo is no part of /images/tokenppo.sif."""
    return re.sub(rf"(?<![\w./-]){re.escape(str(ROOT))}(?![\w.-])", "CHECKOUT", text)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_is_as_the_checked_in_one(name, capsys):
    """Made anew by `python tests/test_submit.py`; look at the difference before it is committed."""
    assert anywhere(made(capsys, *EXAMPLES[name])) == (RENDERED / name).read_text()


def requests(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def node_words(script: str) -> list[str]:
    """The words of each node's command, as bash reads them."""
    assigned = [line for line in script.splitlines() if re.match(r"node\+?=\(", line)]
    return [word for line in assigned for word in shlex.split(line[line.index("(") + 1 : -1])]


def test_the_requests_come_before_the_first_command_and_say_the_plan(capsys):
    script = made(capsys, *EXAMPLES["slurm_gpu.sh"])
    lines = script.splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#SBATCH")) < first
    assert {"--nodes=3", "--gpus-per-node=4", "--ntasks-per-node=1", "--requeue", "--partition=gpu"} <= {
        *requests(script)
    }
    # Four workers with a GPU each, apart: one node of three is theirs.
    assert "# 8 learner processes on the first 2; 4 rollout workers in all" in lines
    assert "# node 2: worker 0 | worker 1 | worker 2 | worker 3" in lines
    assert "sleep" not in script


def test_learners_sit_on_all_nodes_where_workers_sit_beside_them(capsys):
    words = node_words(made(capsys, "slurm", *FOUR_GPUS))
    at = words.index("--learner-nodes")
    assert words[at + 1] == "3" and words[words.index("--ranks-per-node") + 1] == "4"
    assert words[words.index("--accelerate") + 1] == "ddp"


@given(st.text(min_size=1).filter(lambda text: "\0" not in text and not text.startswith("--")))
def test_whatever_a_value_holds_it_stays_one_word(value):
    job = Job.of(CARDS, {}, ["--data.note", value], nodes=1, gpus=0, cpus=1)
    words = shlex.split(slurm.script(job, slurm.Slurm()).partition("\nnode+=(--config ")[2].partition(")\n\n# Each")[0])
    assert words[-2:] == ["--data.note", value]
    sent = ray_job.entrypoint(Job.of(CARDS, {"run.dir": "/r"}, ["--x", value], nodes=1, gpus=0, cpus=1), None)
    assert shlex.split(sent)[-6:-4] == ["--x", value]


@given(st.text())
def test_an_option_of_sbatch_is_one_line_or_refused(value):
    job = Job.of(CARDS, {}, [], nodes=1, gpus=0, cpus=1)
    try:
        script = slurm.script(job, slurm.Slurm(options=(f"partition={value}",)))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert f"--partition={value}" in requests(script)
    assert len(requests(script)) == len(requests(slurm.script(job, slurm.Slurm()))) + 1


WRONG = {
    "more learner nodes than nodes": (["slurm", "--learner-nodes", "2"], "--learner-nodes 2: of 1 node; give 1 to 1"),
    "no node": (["slurm", "--nodes", "0"], "--nodes 0: wants a whole number of at least 1"),
    "no core": (["slurm", "--cpus-per-node", "0"], "--cpus-per-node 0"),
    "time": (["slurm", "--time", "tomorrow"], "--time tomorrow: wants what sbatch takes"),
    "no time to save": (["slurm", "--save-before", "0"], "--save-before 0: wants seconds"),
    "all nodes for rollouts": (
        ["slurm", "--nodes", "2", "--rollout-nodes", "2"],
        "--rollout-nodes 2: are some of the 2",
    ),
    "their options without them": (
        ["slurm", "--rollout-sbatch", "qos=x"],
        "--rollout-sbatch: goes with --rollout-nodes",
    ),
    "an option of ours": (["slurm", "--sbatch", "nodes=4"], "--sbatch nodes=4: nodes is set from the other options"),
    "an option with a space": (["slurm", "--sbatch", "comment=a b"], "--sbatch 'comment=a b': wants KEY=VALUE"),
    "an option on two lines": (["slurm", "--sbatch", "qos=a\n#SBATCH -N9"], "wants KEY=VALUE"),
    "a mount without a container": (["slurm", "--mount", "/a:/b"], "--mount: goes with --container"),
    "an accelerate file for one": (
        ["slurm", "--nodes", "2", "--gpus-per-node", "1", "--accelerate", "gpu", "--rollout.workers", "2"],
        "--accelerate gpu: is for one learner process and there are 2",
    ),
    "no such accelerate file": (["slurm", "--accelerate", "zero9"], "--accelerate zero9: there is no such file"),
    "another Ray": (["slurm", "--resources.ray_address", "a:1"], "resources.ray_address: the job brings a Ray"),
    "too few GPUs": (
        ["slurm", "--gpus-per-node", "1", "--rollout.placement", "apart", "--rollout.gpus_per_worker", "1"],
        "there is no room on 1 GPU",
    ),
    "cuda without GPUs": (["slurm", "--resources.device", "cuda"], "the nodes were asked for without GPUs"),
    "an option of another launcher": (["slurm", "--address", "http://x"], "--address: is for tokenppo submit ray"),
    "an option of slurm": (["ray", "--time", "1:00"], "--time: is for tokenppo submit slurm"),
    "no address": (["ray"], "--address: wants the address of the cluster's dashboard"),
    "what is no address": (
        ["ray", "--address", "localhost"],
        "--address localhost: wants the address of the dashboard",
    ),
    "no such folder": (["ray", "--working-dir", "/absent/x"], "--working-dir /absent/x: there is no such folder"),
    "a key that is none": (["slurm", "--run.stepps", "1"], "run.stepps"),
    "a file that is not there": (["slurm", "--rewards.quality.fn", "absent.py:f"], "there is no file"),
}


@pytest.mark.parametrize(("words", "line"), WRONG.values(), ids=WRONG)
def test_what_cannot_work_is_one_line(words, line, capsys):
    verb, args = verbs.parse(["submit", *words, "--config", CARDS, "--run.dir", "/shared/runs"])
    with pytest.raises(UserError) as refused:
        verb.do(args)
    assert line in str(refused.value) and "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


def test_a_ray_job_names_its_files_as_the_cluster_has_them():
    here = shlex.split(ray_job.entrypoint(Job.of(CARDS, {"run.dir": "runs"}, [], nodes=1, gpus=0, cpus=1), None))
    assert here[here.index("--run.dir") + 1] == str(Path("runs").absolute())
    job = Job.of(CARDS, {"run.dir": "/r"}, [], nodes=1, gpus=0, cpus=1)
    with pytest.raises(UserError, match="which alone goes along"):
        ray_job.entrypoint(job, ROOT / "launch")
    assert ray_job.entrypoint(job, ROOT).startswith("tokenppo train --config configs/cards.yaml")


def test_a_cluster_where_nobody_listens_is_named():
    with pytest.raises(ProcessFault, match="--address http://127.0.0.1:9: no answer"):
        ray_job.refuse_unanswered("http://127.0.0.1:9")


def test_each_option_belongs_to_a_launcher_or_to_all():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    groups = {
        group.title.removeprefix("of "): group for group in parser._action_groups if group.title.startswith("of ")
    }
    for launcher, group in groups.items():
        assert {a.dest for a in group._group_actions} == {n for n, who in command.ONLY.items() if who == (launcher,)}


if __name__ == "__main__":
    import contextlib
    import io

    class Captured:
        """As pytest's capsys, for `made`."""

        def __init__(self) -> None:
            self.out = io.StringIO()

        def readouterr(self) -> tuple[str, str]:
            text = self.out.getvalue()
            self.out.seek(0), self.out.truncate()
            return text, ""

    for file, words in EXAMPLES.items():
        captured = Captured()
        with contextlib.redirect_stdout(captured.out):
            text = made(captured, *words)
        (RENDERED / file).write_text(anywhere(text))
    print(json.dumps(sorted(EXAMPLES)))
