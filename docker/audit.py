"""Known vulnerabilities of what docker/*.lock names, by pip-audit, less the dated waivers of docker/waivers.yaml.

    python docker/audit.py

Exit code 1 for a vulnerability that no waiver covers, a waiver that is past its day or that nobody needs, and a package
that could not be looked up. Wants pip-audit, and a network on which it reaches its data.
"""

import datetime
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
LONGEST = datetime.timedelta(days=90)


@dataclass(frozen=True, kw_only=True)
class Waiver:
    id: str
    why: str
    until: datetime.date  # the last day


def read_waivers(text: str) -> list[Waiver]:
    """The waivers of a YAML list. Raises ValueError for one without all of id, why and until."""
    waivers = []
    for entry in yaml.safe_load(text):
        if not isinstance(entry, dict) or entry.keys() != {"id", "why", "until"}:
            raise ValueError(f"{entry}: a waiver has id, why and until")
        if not isinstance(entry["until"], datetime.date) or not str(entry["why"]).strip():
            raise ValueError(f"{entry['id']}: until is a day like 2026-12-31, and why is a reason")
        waivers.append(Waiver(**entry))
    return waivers


def releases(locks: list[str]) -> list[str]:
    """`name==version` of all locks, each once. A local part (`+cpu`) is a build, which advisories do not know."""
    return sorted({line for text in locks for line in re.findall(r"^([a-z0-9-]+==[^\s+]+)", text, re.M)})


def problems(report: dict[str, Any], waivers: list[Waiver], today: datetime.date) -> list[str]:
    """What must be mended, one line each, from pip-audit's report in JSON."""
    found, seen = [], set()
    for package in report["dependencies"]:
        if reason := package.get("skip_reason"):
            found.append(f"{package['name']}: not looked up: {reason}")
        for vulnerability in package.get("vulns", []):
            names = {vulnerability["id"], *vulnerability["aliases"]}
            seen |= names
            if not any(waiver.id in names and today <= waiver.until for waiver in waivers):
                mended = ", ".join(vulnerability["fix_versions"]) or "no release"
                found.append(f"{package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}")
    for waiver in waivers:
        if today > waiver.until:
            found.append(f"{waiver.id}: its waiver ended on {waiver.until}")
        elif waiver.until - today > LONGEST:
            found.append(f"{waiver.id}: its waiver goes on until {waiver.until}, more than {LONGEST.days} days")
        if waiver.id not in seen:
            found.append(f"{waiver.id}: nothing has it any more; take its waiver away")
    return found


def audit(lines: list[str]) -> dict[str, Any]:
    """pip-audit's report on exact releases. Raises RuntimeError where it could not make one."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = [sys.executable, "-m", "pip_audit", "--requirement", file.name, "--no-deps", "--disable-pip"]
        command += ["--format", "json", "--progress-spinner", "off"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"pip-audit gave no report:\n{done.stderr.strip()[-2000:]}") from None


def main() -> int:
    waivers = read_waivers((FOLDER / "waivers.yaml").read_text(encoding="utf-8"))
    lines = releases([file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.lock"))])
    found = problems(audit(lines), waivers, datetime.date.today())
    print("\n".join(found) or f"{len(lines)} releases, no known vulnerability, {len(waivers)} waivers")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
