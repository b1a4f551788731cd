"""Names of components, and functions written for verl and OpenRLHF, called as those frameworks call them."""

import json
from pathlib import Path

import numpy as np
import pytest

from core.config import load
from core.faults import RewardFault, UserError
from core.reward_name import RewardName
from launch import arguments
from reward_server.components import Component, ScoreRequest, load_component, score_components

THEIRS = """
import asyncio

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    assert data_source in ("cards", None)
    right = ground_truth in solution_str
    return {"score": float(right) + bonus, "acc": right} if extra_info else float(right) + bonus

async def compute_late(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0)
    return len(solution_str)

class Tensor:
    def __init__(self, values):
        self.values = values
    def tolist(self):
        return self.values

def reward_func(queries, prompts, labels):
    rewards = Tensor([[float(label in query[len(prompt):])] for query, prompt, label in zip(queries, prompts, labels)])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {"dummy": rewards}}
"""


@pytest.fixture
def theirs(tmp_path) -> Path:
    (tmp_path / "theirs.py").write_text(THEIRS)
    return tmp_path / "theirs.py"


def batch(**columns) -> ScoreRequest:
    texts = ["it is 4.", "it is 5."]
    return ScoreRequest(
        prompts=["2+2=", [{"role": "user", "content": "2+2="}]],
        completions=[texts[0], [{"role": "assistant", "content": texts[1]}]],
        prompt_ids=[[1], [1]],
        completion_ids=[[5, 0], [6, 0]],
        offsets=[np.array([[0, 8], [8, 8]])] * 2,
        finish_reasons=["stop"] * 2,
        uids=["u0", "u1"],
        columns=columns,
    )


def last(component: Component, request: ScoreRequest) -> list:
    answers = score_components([component], request)[component.name]
    return [answer if isinstance(answer, RewardFault) else answer[0][-1] for answer in answers]


VERL = {"data_source": ["cards", "cards"], "reward_model": [{"ground_truth": "4", "style": "rule"}] * 2}


def test_compute_score_of_verl(theirs):
    fn = load_component(f"verl:{theirs}:compute_score")
    assert last(Component("c", fn, {"bonus": 0.5}), batch(**VERL)) == [1.5, 0.5]
    assert last(Component("c", fn), batch(**VERL, extra_info=[{"i": 1}, {"i": 2}])) == [1.0, 0.0]
    assert last(Component("c", fn), batch(ground_truth=["4", "5"])) == [1.0, 1.0]


def test_an_async_compute_score(theirs):
    assert last(Component("c", load_component(f"verl:{theirs}:compute_late")), batch(**VERL)) == [8.0, 8.0]


def test_compute_score_without_a_truth_says_which_column_it_wants(theirs):
    fault, _ = last(Component("c", load_component(f"verl:{theirs}:compute_score")), batch())
    assert str(fault).startswith("sample u0: component 'c': compute_score wants a column `reward_model`")


def test_reward_func_of_openrlhf(theirs):
    fn = load_component(f"openrlhf:{theirs}:reward_func")
    assert last(Component("c", fn), batch(label=["4", "4"])) == [1.0, 0.0]
    assert last(Component("c", fn, {"label_column": "answer"}), batch(answer=["5", "5"])) == [0.0, 1.0]


@pytest.mark.parametrize(
    "text",
    [
        "my.py:fn",
        "pkg.mod:fn",
        "verl:my.py:compute_score",
        "openrlhf:pkg.mod:reward_func",
        "http://127.0.0.1:8000",
        "openrlhf:http://host:5000/get_reward",
        "verl:fn",  # in a package of that name
    ],
)
def test_a_name_is_written_as_it_was_read(text):
    assert str(RewardName.parse(text)) == text


def test_a_path_behind_an_adapter_is_relative_to_the_file_that_names_it(tmp_path):
    (tmp_path / "sub").mkdir()
    config = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "rewards": {"a": {"fn": "verl:my.py:compute_score"}}}
    (tmp_path / "sub" / "c.yaml").write_text(json.dumps(config))
    assert load(tmp_path / "sub" / "c.yaml").rewards["a"].fn == f"verl:{tmp_path}/sub/my.py:compute_score"


@pytest.mark.parametrize("text", ["my.py", "verl:", ":fn", "verl:http://host:1", "fn:"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(ValueError, match="write"):
        RewardName.parse(text)


class TestRewardOption:
    """--reward FILE:FN=WEIGHT"""

    MORE = ("--model.path", "m", "--data.path", "d.jsonl")

    def test_it_may_be_given_several_times_and_is_relative_to_where_one_stands(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        given = ["--reward", "my.py:polite=0.5", "--reward", "verl:v.py:compute_score"]
        rewards = arguments.parse([*given, *self.MORE]).load().rewards
        assert {name: (spec.fn, spec.weight) for name, spec in rewards.items()} == {
            "polite": (f"{tmp_path}/my.py:polite", 0.5),
            "compute_score": (f"verl:{tmp_path}/v.py:compute_score", 1),
        }

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            (["--reward", "polite"], "write `pkg.mod:fn` or `path/file.py:fn`, then =WEIGHT"),
            (["--reward", "http://127.0.0.1:8000=1"], "--rewards.NAME.fn http://127.0.0.1:8000"),
            (["--reward", "a.py:f=1", "--reward", "b.py:f=1"], "there is a component f already"),
            (["--reward"], "write"),
        ],
    )
    def test_what_it_cannot_be(self, given, says):
        with pytest.raises(UserError) as error:
            arguments.parse(given)
        assert says in str(error.value) and "\n" not in str(error.value)

    def test_a_weight_that_is_no_number_is_refused_by_the_schema(self):
        args = arguments.parse(["--reward", "a.py:f=much", *self.MORE])
        with pytest.raises(UserError, match=r"rewards\.f\.weight"):
            args.load()
