"""What a manifest of ours must keep to, checked on its text: a host without a cluster can refuse a bad one.

Job, ConfigMap, NetworkPolicy and the pods in a RayJob are held against Kubernetes' own schemas (k8s_schemas/trim.py
says from where). The RayJob itself is held against RAY_JOB: the fields that we write, with types and requirements as in
KubeRay's API reference (ray.io/v1, 1.5.1 and later). Then come rules of the API server that no schema has, and ours.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from launch.submit.kubernetes import bytes_of

DEFINITIONS = json.loads((Path(__file__).parent / "k8s_schemas" / "schemas.json").read_text())["definitions"]
COUNT = {"type": "integer", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
PODS = {"$ref": "#/definitions/io.k8s.api.core.v1.PodTemplateSpec"}


def _object(required: tuple[str, ...], **fields: dict) -> dict:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


RAY_JOB = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata={"$ref": "#/definitions/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
    spec=_object(
        ("entrypoint", "rayClusterSpec"),
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        entrypoint={"type": "string", "minLength": 1},
        metadata=TEXTS,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=_object(
            ("headGroupSpec",),
            rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
            authOptions=_object((), mode={"enum": ["disabled", "token"]}),
            headGroupSpec=_object(("template",), rayStartParams=TEXTS, template=PODS),
            workerGroupSpecs={
                "type": "array",
                "items": _object(
                    ("groupName", "minReplicas", "maxReplicas", "template"),
                    groupName={"type": "string"},
                    replicas=COUNT,
                    minReplicas=COUNT,
                    maxReplicas=COUNT,
                    rayStartParams=TEXTS,
                    template=PODS,
                ),
            },
        ),
    ),
)
KINDS = {
    "RayJob": RAY_JOB,
    "Job": {"$ref": "#/definitions/io.k8s.api.batch.v1.Job"},
    "ConfigMap": {"$ref": "#/definitions/io.k8s.api.core.v1.ConfigMap"},
    "NetworkPolicy": {"$ref": "#/definitions/io.k8s.api.networking.v1.NetworkPolicy"},
}
# Words that the schemas leave open and the API server does not.
WORDS = {
    "restartPolicy": {"Always", "OnFailure", "Never"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "action": {"FailJob", "FailIndex", "Ignore", "Count"},
    "operator": {"In", "NotIn"},
    "policyTypes": {"Ingress", "Egress"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "medium": {"Memory"},
}
NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY")


def problems(text: str) -> list[str]:
    """One line for each thing that is wrong; none: the documents keep to every rule."""
    try:
        documents = [each for each in yaml.safe_load_all(text) if each is not None]
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    return [f"{each.get('kind')}: {problem}" for each in documents for problem in _of_one(each, documents)]


def _of_one(document: dict, documents: list[dict]) -> Iterator[str]:
    kind = document.get("kind")
    if kind not in KINDS:
        yield f"there is no schema of kind {kind}"
        return
    validator = jsonschema.Draft7Validator(KINDS[kind] | {"definitions": DEFINITIONS})
    wrong = [f"{'.'.join(map(str, error.path))}: {error.message[:300]}" for error in validator.iter_errors(document)]
    wrong += [f"{key} is missing" for key in ("apiVersion", "metadata") if key not in document]
    if wrong:
        yield from wrong
        return
    yield from _words(document)
    name = document["metadata"].get("name", "")
    if not NAME.fullmatch(name) or len(name) > (47 if kind == "RayJob" else 63):
        yield f"name: {name!r} is none"
    if kind == "Job":
        yield from _job(document["spec"])
    if kind == "RayJob":
        yield from _ray_job(document["spec"])
    for template in templates(document):
        yield from _pod(template, documents)


def templates(document: dict) -> list[dict]:
    """The pod templates of a Job (one) or a RayJob (the head's first)."""
    spec = document.get("spec", {})
    if document["kind"] == "Job":
        return [spec["template"]]
    if document["kind"] == "RayJob":
        cluster = spec["rayClusterSpec"]
        return [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return []


def _words(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _words(each)
    elif isinstance(node, dict):
        for key, value in node.items():
            for word in value if isinstance(value, list) else [value]:
                if key in WORDS and isinstance(word, str) and word not in WORDS[key]:
                    yield f"{key}: there is no {word}"
            yield from _words(value)


def _job(spec: dict) -> Iterator[str]:
    pod, rules = spec["template"]["spec"], spec.get("podFailurePolicy", {}).get("rules", [])
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy: a podFailurePolicy wants Never"
    done: dict[int | str, str] = {}
    for rule in rules:
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
        if (codes is None) == (conditions is None):
            yield "podFailurePolicy: a rule wants one of onExitCodes and onPodConditions"
            continue
        if codes:
            if codes.get("containerName") not in [each["name"] for each in pod["containers"]]:
                yield f"podFailurePolicy: there is no container {codes.get('containerName')}"
            if codes["operator"] != "In" or 0 in codes["values"] or codes["values"] != sorted(set(codes["values"])):
                yield "podFailurePolicy: wants sorted exit codes, without 0"
        for each in codes["values"] if codes else [condition["type"] for condition in conditions]:
            done.setdefault(each, rule["action"])
    wanted = {2: "FailJob", 8: "Ignore", "DisruptionTarget": "Ignore"}
    if wrong := [each for each, action in wanted.items() if done.get(each) != action]:
        yield f"podFailurePolicy: {wrong} want {[wanted[each] for each in wrong]}"
    if spec.get("podReplacementPolicy") != "Failed":
        yield "podReplacementPolicy: two pods could be in one run folder"


def _ray_job(spec: dict) -> Iterator[str]:
    cluster = spec["rayClusterSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions: whoever reaches a Ray without tokens runs code on it"
    if tuple(map(int, cluster.get("rayVersion", "0").split("."))) < (2, 52, 0):
        yield "rayVersion: tokens want 2.52.0"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes: the cluster would stay"
    if spec.get("submissionMode") != "HTTPMode":
        yield "submissionMode: a second shell would read the entrypoint"
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        if {"name": "RAY_AUTH_MODE", "value": "token"} not in container.get("env", []):
            yield "env: a KubeRay that knows no authOptions would start Ray without tokens"
        if not {"livenessProbe", "readinessProbe"} <= set(container):
            yield "probes: KubeRay's own want wget in the image"


def _pod(template: dict, documents: list[dict]) -> Iterator[str]:
    spec, labels = template["spec"], template["metadata"]["labels"]
    of_pod = spec.get("securityContext", {})
    if not of_pod.get("runAsNonRoot") or of_pod.get("runAsUser") != 10001:
        yield "securityContext: wants runAsNonRoot and user 10001"
    if of_pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "securityContext: wants the seccomp profile RuntimeDefault"
    policies = [each for each in documents if each["kind"] == "NetworkPolicy"]
    selected = [each for each in policies if each["spec"]["podSelector"]["matchLabels"].items() <= labels.items()]
    if not any("Ingress" in each["spec"].get("policyTypes", []) for each in selected):
        yield "NetworkPolicy: none selects these pods"
    volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
    maps = {each["metadata"]["name"]: each for each in documents if each["kind"] == "ConfigMap"}
    for volume in volumes.values():
        if "configMap" in volume and volume["configMap"]["name"] not in maps:
            yield f"volumes: there is no ConfigMap {volume['configMap']['name']}"
    (container,) = spec["containers"]
    own = container.get("securityContext", {})
    if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "securityContext: wants no privilege escalation and no capability"
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
    if len(mounts) != len(container["volumeMounts"]):
        yield "volumeMounts: two at one path"
    for path, mount in mounts.items():
        if mount["name"] not in volumes:
            yield f"volumeMounts: there is no volume {mount['name']}"
        elif "configMap" in (volume := volumes[mount["name"]]):
            if mount.get("subPath") not in maps.get(volume["configMap"]["name"], {}).get("data", {}):
                yield f"volumeMounts: the ConfigMap has no {mount.get('subPath')}"
        if not path.startswith("/") or ":" in path:
            yield f"volumeMounts: {path!r} is no place"
    resources = container.get("resources", {})
    if resources.get("requests") != resources.get("limits") or not {"cpu", "memory"} <= set(resources["limits"]):
        yield "resources: what is requested is not what is allowed"
    shared = volumes.get(mounts.get("/dev/shm", {}).get("name"), {}).get("emptyDir", {})
    if shared.get("medium") != "Memory" or not 0 < bytes_of(shared["sizeLimit"]) < bytes_of(
        str(resources["limits"]["memory"])
    ):
        yield "volumes: /dev/shm wants a part of the memory"
    for variable in container.get("env", []):
        if SECRET.search(variable["name"]) and "value" in variable:
            yield f"env: {variable['name']} is a secret, which is named and not written"
    hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    if hook is None or ("--ask-nothing" in hook) != (container["name"] == "ray-worker"):
        yield "preStop: the run would not save, or would pause for a worker"
    if hook and spec.get("terminationGracePeriodSeconds", 30) <= int(hook[hook.index("--wait-s") + 1]):
        yield "terminationGracePeriodSeconds: less than the hook waits"
