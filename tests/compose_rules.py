"""What docker/compose.yaml must keep to, beyond the schema of the compose specification."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jsonschema.validators import validator_for

from docker_rules import SECRET, Stage, lineage

SECRETS = "/run/secrets/"


def schema() -> dict[str, Any]:
    """The schema of the specification's authors, as check-jsonschema carries it."""
    package = importlib.util.find_spec("check_jsonschema")
    assert package and package.origin, "check-jsonschema is not installed: bash launch/test.sh does it"
    file = Path(package.origin).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
    return json.loads(file.read_text(encoding="utf-8"))


def problems(compose: dict[str, Any], stages: list[Stage]) -> list[str]:
    """Everything that is wrong with a parsed compose file whose services are targets of `stages`, one line each."""
    specification = schema()
    found = [f"schema: {e.message}" for e in validator_for(specification)(specification).iter_errors(compose)]
    return found or list(_problems(compose, stages))


def _problems(compose: dict[str, Any], stages: list[Stage]) -> Iterator[str]:
    services = compose["services"]
    for name, secret in compose.get("secrets", {}).items():
        if set(secret) != {"file"}:
            yield f"secret: {name} is no file"
    for name, service in services.items():
        yield from (f"{rule}: {name}: {text}" for rule, text in _of_service(service, compose, stages))
    for kind in ("secrets", "volumes", "networks"):
        used = {source for service in services.values() for source in _sources(service, kind)}
        yield from (f"unused: {kind}: nobody uses {name}" for name in compose.get(kind, {}) if name not in used)


def _sources(service: dict[str, Any], kind: str) -> list[str]:
    """Names of what a service mounts or joins; paths of the host start with . / or ~."""
    return [entry.split(":")[0] if kind == "volumes" else entry for entry in service.get(kind, [])]


def _of_service(service: dict[str, Any], compose: dict[str, Any], stages: list[Stage]) -> Iterator[tuple[str, str]]:
    for kind in ("secrets", "volumes", "networks"):
        for source in _sources(service, kind):
            if source not in compose.get(kind, {}):
                yield "undefined", f"{kind} has no {source}"
    if not service.get("read_only"):
        yield "hardened", "its root can be written to"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        yield "hardened", "it keeps capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []) or service.get("privileged"):
        yield "hardened", "it can gain privileges"
    if service.get("user", "10001").split(":")[0] in ("root", "0"):
        yield "hardened", "it is root"
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield "ports", f"{port} is open to others"
    environment = service.get("environment", {})
    pairs = environment.items() if isinstance(environment, dict) else (e.partition("=")[::2] for e in environment)
    for key, value in pairs:
        if SECRET.search(key) and value and not key.endswith("_FILE"):
            yield "secret", f"{key} has its value in the file"
    for word in service.get("command", []):
        for path in re.findall(rf"{SECRETS}(\S+)", word):
            if path not in service.get("secrets", []):
                yield "secret", f"{SECRETS}{path} is not given to it"
        if (url := urlsplit(word.partition("=")[2])).scheme == "http":
            yield from (("address", text) for text in _of_url(url.hostname, url.port, service, compose, stages))

    target = service["build"]["target"]
    made_by = lineage(stages, target)
    if not made_by:
        yield "target", f"the Dockerfile has no {target}"
    for volume in [i.body for i in made_by if i.word == "VOLUME"]:
        if volume not in [entry.split(":")[1] for entry in service.get("volumes", [])]:
            yield "volume", f"{volume} of the image has no name"
    if "/tmp" not in service.get("tmpfs", []):
        yield "volume", "there is no /tmp that can be written to"
    for other, how in service.get("depends_on", {}).items():
        if how["condition"] != "service_healthy":
            yield "order", f"it does not wait until {other} is well"
        theirs = lineage(stages, compose["services"][other]["build"]["target"])
        if not [i for i in theirs if i.word == "HEALTHCHECK"]:
            yield "order", f"{other} has no HEALTHCHECK"


def _of_url(
    host: str | None, port: int | None, service: dict[str, Any], compose: dict[str, Any], stages: list[Stage]
) -> Iterator[str]:
    other = compose["services"].get(host)
    if other is None:
        yield f"there is no service {host}"
        return
    if host not in service.get("depends_on", {}):
        yield f"it does not wait for {host}"
    if not set(_sources(service, "networks")) & set(_sources(other, "networks")):
        yield f"it shares no network with {host}"
    exposed = [i.body for i in lineage(stages, other["build"]["target"]) if i.word == "EXPOSE"]
    if str(port) not in exposed:
        yield f"{host} listens at {exposed}, not at {port}"
