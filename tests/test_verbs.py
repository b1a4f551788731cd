"""What the command says of itself: every verb with an example that parses, and the first mistakes people make."""

import shlex

import pytest

from core.faults import UserError
from launch import cli, verbs


@pytest.mark.parametrize("verb", verbs.VERBS, ids=lambda verb: verb.name)
def test_a_verb_explains_itself_with_examples_that_are_right(verb, capsys):
    with pytest.raises(SystemExit) as end:
        verbs.parse([verb.name, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and verb.help[1:] in " ".join(said.split())
    for example in verb.examples:
        assert f"\n  {example}\n" in said
        command, name, *rest = shlex.split(example)
        parsed, _ = verbs.parse([name, *rest])
        assert (command, parsed) == ("tokenppo", verb)


def test_the_list_of_verbs_has_them_all(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb.name} " in said for verb in verbs.VERBS) and "\n  train " in said
    assert cli.main([]) == 2
    assert len({verb.name for verb in verbs.VERBS}) == len(verbs.VERBS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sampel runs/x", "sampel: tokenppo has no such verb; did you mean sample?"),
        ("tran", "tran: tokenppo has no such verb; did you mean train?"),
        ("train --confg a.yaml", "--confg: there is no such option; did you mean --config?"),
        ("train --dryrun", "--dryrun: there is no such option; did you mean --dry-run?"),
        ("zzz", "zzz: tokenppo has no such verb; see tokenppo --help"),
        ("--verbose", "--verbose: tokenppo has no such option"),
        ("sample runs/x --jsn", "--jsn: tokenppo sample has no such option; did you mean --json?"),
        ("sample runs/x --js=1", "--js: tokenppo sample has no such option; did you mean --json?"),
        ("sample", "sample: the following arguments are required: RUN; see tokenppo sample --help"),
        ("health --stale-s soon", "health: argument --stale-s: invalid float value: 'soon'"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_was_meant(line, words, capsys):
    assert cli.main(line.split()) == UserError.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"tokenppo: {words}") and said.count("\n") == 1
