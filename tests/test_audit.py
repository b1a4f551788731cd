"""docker/audit.py: what passes is looked up, without a known vulnerability, or waived for a reason and a time."""

import datetime
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docker"
SPEC = importlib.util.spec_from_file_location("docker_audit", FOLDER / "audit.py")
audit = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(audit)

TODAY = datetime.date(2026, 11, 28)
BAD = {"id": "PYSEC-2026-7", "aliases": ["CVE-2026-7", "GHSA-x"], "fix_versions": ["2.1"], "description": "d"}


def report(*vulnerabilities: dict) -> dict:
    good = {"name": "good", "version": "1.0", "vulns": []}
    return {"dependencies": [good, {"name": "bad", "version": "2.0", "vulns": list(vulnerabilities)}], "fixes": []}


def waiver(name: str = "CVE-2026-7", until: datetime.date = TODAY) -> "audit.Waiver":
    return audit.Waiver(id=name, why="never called", until=until)


def test_nothing_known_is_no_problem():
    assert audit.problems(report(), [], TODAY) == []


def test_a_vulnerability_is_named_with_what_mends_it():
    assert audit.problems(report(BAD), [], TODAY) == ["bad 2.0: PYSEC-2026-7, mended in 2.1"]
    assert audit.problems(report(BAD | {"fix_versions": []}), [], TODAY) == [
        "bad 2.0: PYSEC-2026-7, mended in no release"
    ]


@pytest.mark.parametrize("name", ["PYSEC-2026-7", "CVE-2026-7", "GHSA-x"])
def test_a_waiver_covers_by_any_of_its_names_to_the_last_day(name):
    assert audit.problems(report(BAD), [waiver(name)], TODAY) == []


def test_a_waiver_past_its_day_covers_nothing_and_is_told():
    found = audit.problems(report(BAD), [waiver(until=TODAY - datetime.timedelta(days=1))], TODAY)
    assert found == ["bad 2.0: PYSEC-2026-7, mended in 2.1", "CVE-2026-7: its waiver ended on 2026-11-27"]


def test_a_waiver_covers_no_other_vulnerability():
    other = BAD | {"id": "PYSEC-2026-8", "aliases": []}
    assert audit.problems(report(BAD, other), [waiver()], TODAY) == ["bad 2.0: PYSEC-2026-8, mended in 2.1"]


def test_a_waiver_is_short_and_of_use():
    far = waiver(until=TODAY + datetime.timedelta(days=91))
    (told,) = audit.problems(report(BAD), [far], TODAY)
    assert "more than 90 days" in told
    assert audit.problems(report(), [waiver()], TODAY) == ["CVE-2026-7: nothing has it any more; take its waiver away"]


def test_what_could_not_be_looked_up_does_not_pass():
    absent = {"dependencies": [{"name": "x", "skip_reason": "Dependency not found"}], "fixes": []}
    assert audit.problems(absent, [], TODAY) == ["x: not looked up: Dependency not found"]


@pytest.mark.parametrize(
    "text",
    [
        "- {id: CVE-1, why: x}",
        "- {id: CVE-1, until: 2026-12-31}",
        "- {id: CVE-1, why: '', until: 2026-12-31}",
        "- {id: CVE-1, why: x, until: soon}",
        "- {id: CVE-1, why: x, until: 2026-12-31, who: me}",
        "- CVE-1",
    ],
)
def test_a_waiver_without_reason_or_day_is_none(text):
    with pytest.raises(ValueError):
        audit.read_waivers(text)


def test_the_waivers_that_there_are_can_be_read():
    assert audit.read_waivers((FOLDER / "waivers.yaml").read_text()) is not None
    assert audit.read_waivers("- {id: CVE-2026-7, why: never called, until: 2026-11-28}") == [waiver()]


def test_releases_are_those_of_the_locks_without_their_builds():
    lock = "torch==2.13.0+cpu \\\n    --hash=sha256:0\na-b==1.0 \\\n    --hash=sha256:1\n"
    assert audit.releases([lock, "torch==2.13.0 \\\n    --hash=sha256:2\n"]) == ["a-b==1.0", "torch==2.13.0"]
    lines = audit.releases([file.read_text() for file in FOLDER.glob("*.lock")])
    assert len(lines) > 100 and len({line.split("==")[0] for line in lines}) == len(lines)
