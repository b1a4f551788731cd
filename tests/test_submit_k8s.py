"""`tokenppo submit k8s`: manifests keep to their schemas and to our rules, and whatever a value holds, it stays one.

tests/rendered/k8s_two_nodes.yaml is made anew, to be read through, by: python tests/test_submit_k8s.py
"""

import contextlib
import dataclasses
import fcntl
import io
import re
import shlex
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import documented
from core.faults import Fault, ProcessFault, UserError
from launch import arguments, cli, run_folder
from launch.submit import kubernetes, pause, render
from launch.submit.job import Job
from launch.submit.kubernetes import Kubernetes, manifest, resource_name
from manifest_rules import problems, templates

ROOT = Path(__file__).parents[1]
RENDERED = ROOT / "tests" / "rendered" / "k8s_two_nodes.yaml"
IMAGE = "registry.example/tokenppo:cuda"
TWO_NODES = f"submit k8s --config configs/cards.yaml --nodes 2 --gpus-per-node 8 --image {IMAGE} --namespace research"
TWO_NODES += " --secret tokenppo-keys --rollout.placement apart --rollout.workers 8 --run.name first --dry-run"
EVIL = [
    *(
        "$(HOSTNAME)",
        "$$(HOSTNAME)",
        "$HOME",
        "`id`",
        "a'b\"c",
        "two\nlines",
        "{{ job }}",
        "{% raw %}",
        "#no",
        "- x: y",
    ),
    *(
        "é \N{PILE OF POO}",
        "\u2028 \x85",
        "\x01\x7f\ufeff",
        "",
        " ",
        "\\n",
        "$",
        "a$",
        "$$",
        "%{x}",
        "&a *b !c",
        "null",
        "1",
    ),
]
VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40) | st.sampled_from(EVIL)


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def job(nodes: int = 1, *words: str, gpus: int = 0, config: str | None = "configs/cards.yaml") -> Job:
    _, overrides, written = arguments.take_overrides(list(words))
    return Job.of(config, overrides, written, nodes=nodes, gpus=gpus, cpus=8, learner_nodes=1)


def made(nodes: int = 1, *words: str, gpus: int = 0, **given: object) -> str:
    return manifest(job(nodes, *words, gpus=gpus), Kubernetes(image=IMAGE, **given))


def documents(text: str) -> dict[str, dict]:
    return {each["kind"]: each for each in yaml.safe_load_all(text) if each is not None}


def container(text: str) -> dict:
    """Of the pod that has the learner."""
    found = documents(text)
    return templates(found.get("Job") or found["RayJob"])[0]["spec"]["containers"][0]


def expanded(text: str) -> str:
    """As Kubernetes reads command, args, env and probes in a pod that has every variable: $(NAME) is its value."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda found: "$" if found[1] == "$" else f"<value of {found[2]}>", text)


def said(line: str, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    code = cli.main(shlex.split(line))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_manifest_for_two_nodes_is_the_one_in_the_checkout(capsys):
    code, out, err = said(TWO_NODES, capsys)
    assert (code, err) == (0, "") and out == RENDERED.read_text()
    assert problems(out) == []


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("given", [{}, {"namespace": "a", "secret": "keys", "volume_claim": "mine", "memory": "9G"}])
def test_every_manifest_keeps_to_schemas_and_rules(nodes, given):
    text = made(nodes, **given)
    found = documents(text)
    assert problems(text) == []
    assert list(found) == ["ConfigMap", "NetworkPolicy", "Job" if nodes == 1 else "RayJob"]
    assert {each["metadata"].get("namespace") for each in found.values()} == {given.get("namespace")}
    assert [each.get("secretRef") for each in container(text).get("envFrom", [])] == (
        [{"name": "keys"}] if given else []
    )
    assert found["ConfigMap"]["data"]["config.yaml"] == (ROOT / "configs" / "cards.yaml").read_text()


@pytest.mark.parametrize(
    "command", [c.text for c in documented.commands() if c.text.startswith("tokenppo submit k8s ")]
)
def test_a_documented_manifest_keeps_to_every_rule(command, capsys):
    line = command.removeprefix("tokenppo ").removesuffix(" --dry-run")
    code, out, err = said(f"{line} --dry-run", capsys)
    assert (code, err) == (0, "") and problems(out) == []


ONE, TWO = ("Job", 1), ("RayJob", 2)


@pytest.mark.parametrize(
    ("kind", "old", "new", "word"),
    [
        (ONE, "backoffLimit:", "backofLimit:", "backofLimit"),
        (TWO, "backoffLimit:", "backofLimit:", "backofLimit"),
        (TWO, "authOptions:", "authOption:", "authOption"),
        (TWO, "headGroupSpec:", "headGroup:", "headGroup"),
        (TWO, "groupName: nodes", "name: nodes", "groupName"),
        (TWO, 'num-cpus: "8"', "num-cpus: 8", "not of type 'string'"),
        (TWO, "replicas: 1", 'replicas: "1"', "not of type 'integer'"),
        (ONE, "completions: 1", "completions: one", "not of type 'integer'"),
        (ONE, "image:", "images:", "images"),
        (ONE, "- name: tokenppo\n", "- nam: tokenppo\n", "nam"),
        (ONE, "mountPath: /dev/shm", "path: /dev/shm", "path"),
        (ONE, "  initialDelaySeconds: 60", "  initialDelay: 60", "initialDelay"),
        (ONE, "automountServiceAccountToken: false", 'automountServiceAccountToken: "no"', "boolean"),
        (ONE, "restartPolicy: Never", "restartPolicy: Nevr", "there is no Nevr"),
        (ONE, "restartPolicy: Never", "restartPolicy: OnFailure", "wants Never"),
        (ONE, "action: FailJob", "action: Fail", "there is no Fail"),
        (ONE, "action: FailJob", "action: Ignore", "podFailurePolicy"),
        (ONE, "values: [8]", "values: [9]", "podFailurePolicy"),
        (ONE, "type: DisruptionTarget", "type: Ready", "DisruptionTarget"),
        (ONE, "podReplacementPolicy: Failed", "suspend: false", "podReplacementPolicy"),
        (ONE, "policyTypes: [Ingress]", "policyTypes: [Ingres]", "Ingres"),
        (ONE, "matchLabels: {tokenppo/job: tokenppo-cards}", "matchLabels: {tokenppo/job: x}", "none selects"),
        (ONE, "runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
        (ONE, "drop: [ALL]", "drop: [NET_RAW]", "capability"),
        (ONE, "allowPrivilegeEscalation: false", "privileged: true", "escalation"),
        (ONE, "type: RuntimeDefault", "type: Unconfined", "seccomp"),
        (ONE, "medium: Memory, sizeLimit: 768Mi", "medium: Memory, sizeLimit: 64Gi", "/dev/shm"),
        (ONE, 'limits: {cpu: 8, memory: "32Gi"}', 'limits: {cpu: 8, memory: "33Gi"}', "resources"),
        (ONE, "- name: shm\n              mountPath", "- name: shn\n              mountPath", "no volume shn"),
        (ONE, "subPath: config.yaml", "subPath: other.yaml", "no other.yaml"),
        (ONE, "terminationGracePeriodSeconds: 330", "terminationGracePeriodSeconds: 60", "less than"),
        (ONE, "kind: Job", "kind: Jobb", "no schema of kind Jobb"),
        (ONE, "apiVersion: batch/v1", "apiVersion: batch/v2", "batch/v2"),
        (ONE, "name: tokenppo-cards\n", "name: tokenppo_cards\n", "name"),
        (TWO, "authOptions: {mode: token}", "authOptions: {mode: disabled}", "authOptions"),
        (TWO, '"2.60.0"', '"2.51.0"', "2.52.0"),
        (TWO, "{name: RAY_AUTH_MODE, value: token}", "{name: HF_TOKEN, value: hf_1}", "HF_TOKEN is a secret"),
        (TWO, "submissionMode: HTTPMode", "submissionMode: K8sJobMode", "shell"),
        (TWO, "submissionMode: HTTPMode", "submissionMode: HttpMode", "HttpMode"),
        (TWO, "shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "shutdown"),
        (TWO, '- "--ask-nothing"', '- "--ask"', "preStop"),
        (TWO, "readinessProbe:", "startup:", "startup"),
    ],
)
def test_a_wrong_manifest_is_refused(kind, old, new, word):
    text = made(kind[1])
    assert old in text
    found = problems(text.replace(old, new))
    assert any(word in problem for problem in found), found


@settings(deadline=None, max_examples=25)
@given(words=st.lists(VALUES, max_size=5))
def test_words_reach_the_program_as_they_were_written(words):
    one = job()
    text = manifest(dataclasses.replace(one, words=tuple(words)), Kubernetes(image=IMAGE))
    train = ["tokenppo", "train", "--config", "/app/configs/cards.yaml", *words, "--run.dir", "/app/runs"]
    assert [*map(expanded, container(text)["args"])] == train
    text = manifest(dataclasses.replace(one, words=tuple(words), nodes=2), Kubernetes(image=IMAGE))
    entrypoint = documents(text)["RayJob"]["spec"]["entrypoint"]
    rest = ["--resources.ray_address", "auto", "--resources.nodes", "2"]
    assert shlex.split(entrypoint) == ["cd", "/app", "&&", *train, *rest]


@pytest.mark.slow
def test_a_shell_reads_the_entrypoint_as_it_was_written():
    text = manifest(dataclasses.replace(job(), words=tuple(EVIL), nodes=2), Kubernetes(image=IMAGE))
    entrypoint = documents(text)["RayJob"]["spec"]["entrypoint"]
    script = f'cd() {{ :; }}; tokenppo() {{ printf "%s\\0" "$@"; }}; {entrypoint}'
    out = subprocess.run(["bash", "-c", script], capture_output=True, check=True, timeout=30).stdout
    assert out.decode().split("\0")[3 : 3 + len(EVIL)] == EVIL


@settings(deadline=None)
@given(text=VALUES | st.text(st.sampled_from("a \n\t#:-|>'\"\x85\u2028é\N{PILE OF POO}$"), max_size=30))
def test_a_text_is_the_same_in_every_style_of_yaml(text):
    assert yaml.safe_load(render.scalar(text)) == text
    written = text.rstrip() + "\n"  # as the text of a configuration is
    inside = render.within(render.block(written), 2, first=False)
    assert yaml.safe_load(f"a:\n  config.yaml: {inside}\n  b: 1\n") == {"a": {"config.yaml": written, "b": 1}}


@pytest.mark.parametrize(
    "name", ["a b", "$(HOME) `id`", "qu'o\"te", "line\nbreak", "{{ x }}", "é \N{PILE OF POO}", "\u2028"]
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_names_of_files_and_folders_stay_names(name, nodes, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / name / "r.py").write_text("def fn(**_): ...\n")
    (tmp_path / name / "p.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / name / "c.yaml").write_text("model: {path: a/b}\nrewards: {r: {fn: r.py:fn}}\ndata: {path: p.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    text = manifest(
        job(nodes, "--run.dir", f"/{name}", config=f"{name}/c.yaml"), Kubernetes(image=IMAGE, save_before=7)
    )
    assert problems(text) == []
    pod = container(text)
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["volumeMounts"]}
    assert mounts == {"runs": f"/{name}", "shm": "/dev/shm", "config": f"/app/{name}/c.yaml"}
    # Kubernetes expands nothing in a hook.
    hook = ["python", "-P", "-m", "launch.submit.pause", f"/{name}/run", "--wait-s", "7"]
    assert pod["lifecycle"]["preStop"]["exec"]["command"] == hook
    words = ["--config", f"/app/{name}/c.yaml", "--run.dir", f"/{name}", "--run.dir", f"/{name}"]
    if nodes == 1:
        assert [*map(expanded, pod["args"])] == ["tokenppo", "train", *words]
        probe = [*map(expanded, pod["livenessProbe"]["exec"]["command"])]
        assert probe == ["tokenppo", "health", f"/{name}/run", "--stale-s", "3600"]
    else:
        entrypoint = shlex.split(documents(text)["RayJob"]["spec"]["entrypoint"])
        assert entrypoint[3 : 5 + len(words)] == ["tokenppo", "train", *words]
    comments = [line for line in text.splitlines() if line.startswith("# in the image: ")]
    assert [yaml.safe_load(line.removeprefix("# in the image: ")) for line in comments] == [
        f"/app/{name}/p.jsonl",
        f"/app/{name}/r.py",
    ]


def test_the_words_of_a_hook_are_those_of_the_program(tmp_path):
    command = container(made())["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:4] == ["python", "-P", "-m", "launch.submit.pause"] and pause.main(command[4:]) == 0


def test_gpus_get_a_learner_process_each():
    text = made(1, gpus=4)
    pod = container(text)
    assert pod["args"][-4:] == ["--accelerate", "ddp", "--num-processes", "4"]
    assert pod["resources"]["limits"]["nvidia.com/gpu"] == pod["resources"]["requests"]["nvidia.com/gpu"] == 4
    pods = templates(documents(made(3, "--rollout.placement", "apart", "--rollout.workers", "8", gpus=4))["RayJob"])
    assert [each["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for each in pods] == [4, 4]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("first", "tokenppo-first"),
        ("Big_Run.1", r"tokenppo-big-run-1-[0-9a-f]{6}"),
        ("big-run-1", "tokenppo-big-run-1"),
        ("x" * 128, r"tokenppo-x{31}-[0-9a-f]{6}"),
        ("9", "tokenppo-9"),
        ("a-", r"tokenppo-a-[0-9a-f]{6}"),
    ],
)
def test_a_run_has_a_name_that_kubernetes_takes(run, name):
    assert re.fullmatch(name, resource_name(run)) and len(resource_name(run)) <= 47


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "--image: wants"),
        ("--image 'a b'", "--image 'a b': wants the name of an image"),
        ("--image i --namespace A_b", "--namespace 'A_b': wants the name of a namespace"),
        ("--image i --secret x/y", "--secret 'x/y': wants the name of a Secret"),
        ("--image i --volume-claim -x", "--volume-claim"),
        ("--image i --memory 32G1", "--memory 32G1: wants a quantity"),
        ("--image i --memory 700Mi", "--memory 700Mi: shared memory is part of it"),
        ("--image i --save-before 0", "--save-before 0: wants seconds"),
        ("--image i --time 1:00", "--time: is for tokenppo submit slurm"),
        ("--image i --run.dir .", "run.dir = "),
        ("--image i --run.dir /", "run.dir = /: the volume"),
        ("--image i --run.dir /a:b", "run.dir = /a:b: the volume"),
        ("--image i --nodes 2 --gpus-per-node 8", "--nodes 2: learners sit on the first node"),
        ("--image i --run.name 'a b'", "run.name = a b"),
        ("--image i --data.eval_path /etc/hostname", "data.eval_path = /etc/hostname: the pods have"),
        (f"--image i --data.eval_path {ROOT}/README.md", "write it relative to the current folder"),
    ],
)
def test_what_cannot_work_is_one_line(line, words, capsys):
    code, out, err = said(f"submit k8s --config configs/cards.yaml --dry-run {line}", capsys)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1, err


def test_a_configuration_from_elsewhere_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, err = said(f"submit k8s --config {ROOT}/configs/cards.yaml --image i --dry-run", capsys)
    assert code == 2 and "current folder" in err and err.count("\n") == 1
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    (tmp_path / "c.yaml").write_text((ROOT / "configs" / "cards.yaml").read_text().replace("../", f"{ROOT}/"))
    code, _, err = said("submit k8s --config ../c.yaml --image i --dry-run", capsys)
    assert code == 2 and "current folder" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="UTF-8"):
        monkeypatch.chdir(ROOT)
        manifest(dataclasses.replace(job(), words=("\udc80",)), Kubernetes(image=IMAGE))


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A stand-in on PATH, where it is alone: what a cluster answers is up to the test."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def answers(script: str) -> Path:
        file = tmp_path / "kubectl"
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return tmp_path

    return answers


SEND = f"submit k8s --config configs/cards.yaml --image {IMAGE}"


def test_what_is_sent_is_what_a_dry_run_prints(kubectl, capsys):
    _, shown, _ = said(f"{SEND} --dry-run", capsys)
    folder = kubectl('echo "$*" > "${0%/*}/argv"; /bin/cat > "${0%/*}/stdin"; echo job.batch/tokenppo-cards created')
    code, out, err = said(SEND, capsys)
    assert (code, out) == (0, "job.batch/tokenppo-cards created\n") and "2 rollout workers" in err
    assert (folder / "argv").read_text() == "apply --filename -\n" and (folder / "stdin").read_text() == shown


@pytest.mark.slow
def test_a_kubectl_that_is_absent_refuses_or_hangs_is_one_line(kubectl, capsys, monkeypatch):
    code, out, err = said(SEND, capsys)
    assert (code, out) == (2, "") and "there is no kubectl on PATH" in err
    kubectl("/bin/cat > /dev/null; echo 'error: no' >&2; echo 'such cluster' >&2; exit 1")
    code, out, err = said(SEND, capsys)
    assert (code, out) == (2, "") and err.endswith("tokenppo: submit k8s: kubectl refuses: error: no such cluster\n")
    kubectl("exec /bin/sleep 60")
    monkeypatch.setattr(kubernetes, "APPLY_S", 0.3)
    code, out, err = said(SEND, capsys)
    assert code == 3 and "did not answer within 0.3 s" in err


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "config.yaml").write_text("")
    return tmp_path


def test_a_pause_waits_until_the_run_lets_go_of_its_folder(run, monkeypatch):
    monkeypatch.setattr(pause, "LOOK_S", 0.01)
    assert pause.main([str(run / "none"), "--wait-s", "60"]) == 0
    assert pause.main([str(run), "--wait-s", "60"]) == 0 and not (run / run_folder.PAUSE).exists()
    codes: list[int] = []
    with open(run / "config.yaml") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: codes.append(pause.main([str(run), "--wait-s", "60"])))
        thread.start()
        deadline = time.monotonic() + 30
        while not (run / run_folder.PAUSE).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert pause.main([str(run), "--wait-s", "0", "--ask-nothing"]) == ProcessFault.exit_code
        assert codes == [] and (run / run_folder.PAUSE).exists()
        (run / run_folder.PAUSE).unlink()  # as the run does once it has saved
        assert pause.main([str(run), "--wait-s", "0", "--ask-nothing"]) == ProcessFault.exit_code
        assert not (run / run_folder.PAUSE).exists()
    thread.join(30)
    assert codes == [0]


def test_a_pause_that_comes_to_nothing_is_taken_back(run, capsys):
    with open(run / "config.yaml") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert pause.main([str(run), "--wait-s", "0"]) == ProcessFault.exit_code
    assert not (run / run_folder.PAUSE).exists() and "has not saved" in capsys.readouterr().err


SKYPILOT = ROOT / "launch" / "templates" / "skypilot.yaml"
SKY_FIELDS = {  # of SkyPilot's reference of the YAML, those that we use
    **{"name": str, "num_nodes": int, "workdir": str, "resources": dict, "volumes": dict, "envs": dict},
    **{"setup": str, "run": str},
}


@pytest.mark.slow
def test_the_skypilot_file_starts_a_node_of_the_job_on_each_machine(tmp_path):
    text = SKYPILOT.read_text()
    task = yaml.safe_load(text)
    assert {key: type(value) for key, value in task.items()} == SKY_FIELDS
    assert set(task["resources"]) <= {"accelerators", "cpus", "memory", "disk_size", "infra", "image_id"}
    assert task["envs"]["RUNS"] in task["volumes"] and not re.search("TOKEN|KEY|SECRET", str(task["envs"]))
    for script in (task["setup"], task["run"]):
        assert script.startswith("set -euo pipefail\n") and "sleep" not in script
        subprocess.run(["bash", "-n", "-c", script], check=True, timeout=30)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text('python() { printf "%s\\0" "$@"; }\nexec() { "$@"; }\n')
    environment = {key: str(value) for key, value in task["envs"].items()} | {"RUN_NAME": "a b $(id)"}
    environment |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    environment |= {"SKYPILOT_TASK_ID": "sky-1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    words = done.stdout.split("\0")[:-1]
    assert words[:5] == ["-P", "-m", "launch.submit.node", "--meet", "/runs/.meet/sky-a b $(id)-sky-1"]
    cut = words.index("--")
    assert words[5:cut] == shlex.split(
        "--node 1 --nodes 2 --learner-nodes 2 --ranks-per-node 8 --gpus 8 --accelerate ddp"
    )
    arguments.accelerate_file(task["envs"]["ACCELERATE"])
    train = arguments.parse(words[cut + 1 :])
    assert train.overrides == {"run.name": "a b $(id)", "run.dir": "/runs"}
    assert train.config == Path("configs/cards.yaml") and train.config.is_file()
    with pytest.raises(Fault, match="run.name"):
        train.load()


def test_ray_is_told_the_version_that_is_installed_at_least():
    assert f'"ray[default]>={kubernetes.RAY_VERSION.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()


if __name__ == "__main__":
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.chdir(ROOT):
        sys.path[:0] = [str(ROOT)]
        assert cli.main(shlex.split(TWO_NODES)) == 0
    RENDERED.write_text(out.getvalue())
