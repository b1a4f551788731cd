"""Reward components: every kind of answer worked by hand, every way to be wrong named, the user's code left alone."""

import asyncio
import functools
import math
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest

from core.faults import RewardFault, UserError
from core.trajectory import PromptRequest, Trajectory
from reward_server.components import Component, ScoreRequest, load_component, score_components
from reward_server.placing import Span

OFFSETS = np.array([[0, 3], [3, 7], [7, 8], [8, 8]])  # "the", " cat", ".", <eos>


def entries(component: Component, batch: ScoreRequest) -> list:
    """What it answers, before it is placed."""
    answer = component.begin(batch)
    return component.entries(asyncio.run(answer) if asyncio.iscoroutine(answer) else answer, batch)


def score_component(component: Component, batch: ScoreRequest) -> list:
    return score_components([component], batch)[component.name]


def request(prompts=("p",), texts=("the cat.",), columns=None, **changes) -> ScoreRequest:
    fields = {
        "prompts": list(prompts),
        "completions": list(texts),
        "prompt_ids": [[1, 2] for _ in texts],
        "completion_ids": [[5, 6, 7, 0] for _ in texts],
        "offsets": [OFFSETS for _ in texts],
        "finish_reasons": ["stop" for _ in texts],
        "uids": [f"u{i}" for i, _ in enumerate(texts)],
        "columns": columns or {},
    }
    return ScoreRequest(**(fields | changes))


def trajectory(prompt, *, k: int = 0, **columns) -> Trajectory:
    return Trajectory(
        request=PromptRequest(
            ordinal=3, k=k, sample_uid=f"u{k}", prompt_ids=np.array([1]), columns={"prompt": prompt, **columns}, seed=0
        ),
        response_ids=np.array([5, 6, 7, 0]),
        rollout_logprobs=np.zeros(4, dtype=np.float32),
        action_mask=np.ones(4, dtype=bool),
        token_offsets=OFFSETS,
        policy_version=np.zeros(4, dtype=np.int64),
        finish_reason="stop",
        finished_at=0.0,
    )


def trl_length(prompts, completions, completion_ids, **kwargs):
    """As in TRL's documentation."""
    return [float(len(ids)) for ids in completion_ids]


def trl_answer(completions, answer, **kwargs):
    return [1.0 if right in completion else 0.0 for completion, right in zip(completions, answer, strict=True)]


class TestComponent:
    def test_trl_functions_unmodified(self):
        batch = request(["p", "q"], ["the cat.", "a dog."], {"answer": ["cat", "cat"], "level": [1, 2]})
        assert entries(Component("length", trl_length), batch) == [4.0, 4.0]
        assert entries(Component("answer", trl_answer), batch) == [1.0, 0.0]

    def test_a_trl_function_on_conversations(self):
        def think_format(completions, **kwargs):
            contents = [completion[0]["content"] for completion in completions]
            return [float(content.startswith("the")) for content in contents]

        messages = [{"role": "user", "content": "hi"}]
        batch = ScoreRequest.from_trajectories([trajectory(messages)], ["the cat."])
        assert entries(Component("think", think_format), batch) == [1.0]

    def test_a_coroutine_is_awaited(self):
        async def slow(completions, **kwargs):
            return [1.0 for _ in completions]

        assert entries(Component("slow", slow), request()) == [1.0]

    def test_a_function_gets_what_it_names(self):
        def fn(finish_reasons, offsets, level=0):
            assert finish_reasons == ["stop"] and offsets[0].tolist() == OFFSETS.tolist() and level == [3]
            return [[0.0, 0.0, 0.0, 1.0]]

        assert entries(Component("c", fn), request(columns={"level": [3], "unused": [None]})) == [[0.0, 0.0, 0.0, 1.0]]

    def test_a_function_gets_everything_through_kwargs(self):
        seen = {}
        entries(Component("c", lambda **kwargs: seen.update(kwargs) or [0.0]), request(columns={"level": [3]}))
        assert sorted(seen) == [
            "action_masks",
            "completion_ids",
            "completions",
            "finish_reasons",
            "level",
            "offsets",
            "prompts",
        ]

    def test_a_function_gets_its_options_with_each_call(self):
        def fn(completions, factor=1.0):
            return [factor for _ in completions]

        assert entries(Component("c", fn, {"factor": 3.0}), request()) == [3.0]

    def test_a_class_gets_its_options_once(self):
        class Words:
            made = 0

            def __init__(self, words, penalty=-1.0):
                Words.made += 1
                self.words, self.penalty = words, penalty

            def __call__(self, completions):
                return [[Span(c.index(w), c.index(w) + len(w), self.penalty) for w in self.words] for c in completions]

        component = Component("words", Words, {"words": ["cat"], "penalty": -2.0})
        for _ in range(2):
            [(rewards, mask)] = score_component(component, request())
            assert rewards.tolist() == [0, -2, 0, 0] and mask.all()
        assert Words.made == 1

    def test_arrays_and_tuples_are_lists_of_answers(self):
        batch = request(["p", "q"], ["the cat.", "a dog.."])
        for answers in (np.array([1.0, 2.0], dtype=np.float32), (1.0, 2.0)):
            component = Component("c", lambda completions, answers=answers: answers)
            assert [rewards[-1] for rewards, _ in score_component(component, batch)] == [1.0, 2.0]
        component = Component("c", lambda completions: np.arange(8.0).reshape(2, 4))
        assert [rewards.tolist() for rewards, _ in score_component(component, batch)] == [[0, 1, 2, 3], [4, 5, 6, 7]]

    def test_what_one_component_does_to_its_arguments_no_other_sees(self):
        def vandal(prompts, completions, completion_ids, tags, **kwargs):
            completions[0][0]["content"] = ""
            completion_ids[0].clear()
            tags[0].append("x")
            prompts.clear()
            return [0.0]

        batch = ScoreRequest.from_trajectories(
            [trajectory([{"role": "user", "content": "hi"}], tags=["a"])], ["the cat."]
        )
        entries(Component("vandal", vandal), batch)
        assert batch.prompts == [[{"role": "user", "content": "hi"}]] and batch.columns == {"tags": [["a"]]}
        assert batch.completions == [[{"role": "assistant", "content": "the cat."}]]
        assert batch.completion_ids[0].tolist() == [5, 6, 7, 0]

        def shift(offsets, **kwargs):
            offsets[0] += 1

        class Rewrites:
            def score(self, batch):
                batch.completion_ids[0][0] = 9

        for fn in (shift, Rewrites):
            [fault] = score_component(Component("shift", fn), batch)
            assert "read-only" in str(fault)

    def test_a_column_that_is_missing_is_named(self):
        def fn(completions, answr):
            return [0.0]

        with pytest.raises(RewardFault, match=r"component 'c'.* wants `answr`.*did you mean `answer`"):
            entries(Component("c", fn), request(columns={"answer": ["4"]}))

    def test_an_option_with_the_name_of_a_column_is_refused(self):
        component = Component("c", lambda completions, level: [0.0], {"level": 1})
        with pytest.raises(RewardFault, match="component 'c'.*`level` is both an option"):
            entries(component, request(columns={"level": [3]}))

    def test_wrong_options_are_found_at_birth(self):
        class Words:
            def __init__(self, words):
                raise OSError("no such list")

        with pytest.raises(UserError, match=r"rewards\.c: .*Words has no option `wods`; did you mean `words`\?"):
            Component("c", Words, {"wods": []})
        with pytest.raises(
            UserError, match=r"rewards\.c: .*Words.* raised OSError: no such list \(.*test_components.py:\d"
        ):
            Component("c", Words, {"words": []})
        with pytest.raises(UserError, match=r"rewards\.c: .*Words.* raised TypeError: .*missing 1 required"):
            Component("c", Words)
        with pytest.raises(UserError, match=r"trl_answer has no option `completions`"):
            Component("c", trl_answer, {"completions": 1})

    def test_a_class_whose_objects_cannot_be_called(self):
        with pytest.raises(UserError, match=r"rewards\.c: .*give its class a __call__"):
            Component("c", type("Plain", (), {}))


class TestScoreComponent:
    BATCH = request(["p", "q", "r"], ["the cat."] * 3)

    def test_a_fault_of_one_entry_is_that_samples_alone(self):
        first, second, third = score_component(Component("c", lambda completions: [1.0, math.nan, None]), self.BATCH)
        assert first[0].tolist() == [0, 0, 0, 1] and first[1].all()
        assert isinstance(second, RewardFault) and str(second).startswith("sample u1: component 'c': got nan")
        assert third[0].tolist() == [0, 0, 0, 0] and not third[1].any()

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            ([1.0], "answered 1 entries for 3 completions"),
            (None, "answered None; wanted is a list, one entry per completion"),
            (1.0, "answered 1.0 (float)"),
            (np.array(1.0), "(ndarray)"),
            ("yes", "answered 'yes' (str)"),
            ({"a": 1, "b": 2, "c": 3}, "(dict)"),
            (Span(0, 3, 1.0), "answered Span("),
            ((x for x in [1.0, 1.0, 1.0]), "(generator)"),
        ],
    )
    def test_a_wrong_answer_of_the_call_is_every_samples(self, answer, says):
        faults = score_component(Component("c", lambda completions: answer), self.BATCH)
        for i, fault in enumerate(faults):
            assert isinstance(fault, RewardFault) and says in str(fault)
            assert str(fault).startswith(f"sample u{i}: component 'c': ")
        assert len(faults) == 3

    def test_an_exception_is_told_in_one_line_with_the_users_line(self, tmp_path):
        file = tmp_path / "mine.py"
        file.write_text(
            textwrap.dedent("""\
            import json

            def read(text):
                return json.loads(text)  # line 4

            def score(completions, **kwargs):
                return [read(c) for c in completions]
            """)
        )
        faults = score_component(Component("c", load_component(f"{file}:score")), self.BATCH)
        assert len(faults) == 3
        for i, fault in enumerate(faults):
            assert str(fault).startswith(f"sample u{i}: component 'c': score raised JSONDecodeError: Expecting value")
            assert f"({file}:4, in read)" in str(fault) and "\n" not in str(fault)

    def test_a_wrapped_function_is_found_too(self):
        def wrong(completions, level):
            raise ValueError("first\nsecond")

        [fault] = score_component(Component("c", functools.partial(wrong, level=1)), request())
        assert "raised ValueError: first second" in str(fault) and "test_components.py" in str(fault)

    def test_the_end_of_the_process_is_not_swallowed(self):
        """A worker is told to end by SystemExit, which may well arrive within a user's function."""

        def leave(completions):
            sys.exit(1)

        with pytest.raises(SystemExit):
            score_component(Component("c", leave), request())


class TestScoreRequest:
    def test_from_trajectories(self):
        rows = [trajectory("p", k=0, answer="4"), trajectory("q", k=1, level=2)]
        batch = ScoreRequest.from_trajectories(rows, ["the cat.", "the dog."])
        assert batch.prompts == ["p", "q"] and batch.completions == ["the cat.", "the dog."]
        assert [ids.tolist() for ids in batch.completion_ids] == [[5, 6, 7, 0]] * 2 and batch.finish_reasons == [
            "stop"
        ] * 2
        assert batch.uids == ["u0", "u1"] and len(batch) == 2
        assert batch.columns == {"answer": ["4", None], "level": [None, 2]}
        assert all((offsets == OFFSETS).all() for offsets in batch.offsets)

    def test_whose_the_tokens_are(self):
        """Components get it from the trajectory; where nobody says, all are the policy's."""
        mixed = replace(trajectory("p"), action_mask=np.array([True, False, False, True]))
        batch = ScoreRequest.from_trajectories([mixed, trajectory("q")], ["the cat.", "the cat."])
        assert [mask.tolist() for mask in batch.action_masks] == [[True, False, False, True], [True] * 4]
        assert [mask.tolist() for mask in request().action_masks] == [[True] * 4]
        with pytest.raises(ValueError, match="read-only"):
            batch.action_masks[0][1] = True

    def test_what_an_environment_wrote_earns_nothing_unless_it_is_a_fault(self):
        rewards = {"refuse": [1.0, 0.0, 2.0, 3.0], "drop": [1.0, 0.0, 2.0, 3.0], "last": 4.0, "who": None}
        mixed = request(action_masks=[np.array([True, False, False, True])])
        seen = {}
        parts = [
            Component("refuse", lambda **_: [rewards["refuse"]]),
            Component("drop", lambda **_: [rewards["drop"]], observations="drop"),
            Component("last", lambda **_: [rewards["last"]]),
            Component("who", lambda action_masks: seen.update(masks=action_masks) or [None]),
        ]
        got = {name: answers[0] for name, answers in score_components(parts, mixed).items()}
        assert (
            isinstance(got["refuse"], RewardFault) and "u0" in str(got["refuse"]) and "'refuse'" in str(got["refuse"])
        )
        assert got["drop"][0].tolist() == [1, 0, 0, 3] and got["last"][0].tolist() == [0, 0, 0, 4]
        assert seen["masks"][0].tolist() == [True, False, False, True]

    def test_a_prompt_of_messages_is_answered_by_a_message(self):
        messages = [{"role": "user", "content": "hi"}]
        batch = ScoreRequest.from_trajectories([trajectory(messages)], ["the cat."])
        assert batch.prompts == [messages]
        assert batch.completions == [[{"role": "assistant", "content": "the cat."}]]

    @pytest.mark.parametrize(
        "name", ["prompts", "completions", "completion_ids", "offsets", "finish_reasons", "action_masks"]
    )
    def test_a_column_with_a_taken_name_is_the_users_error(self, name):
        with pytest.raises(UserError, match=f"data column `{name}`: .*rename the column"):
            ScoreRequest.from_trajectories([trajectory("p", **{name: 1})], ["the cat."])

    def test_lists_of_unequal_length(self):
        with pytest.raises(ValueError, match="`finish_reasons` has 2 entries for 1 samples"):
            request(finish_reasons=["stop", "stop"])


class TestLoadComponent:
    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "words.txt").write_text("cat")
        path = tmp_path / "my rewards.v2.py"
        path.write_text(
            textwrap.dedent("""\
            from __future__ import annotations
            from dataclasses import dataclass
            from pathlib import Path

            WORD = (Path(__file__).parent / "words.txt").read_text()
            LOADED = []

            @dataclass
            class Finder:
                word: str = WORD

                def __call__(self, completions):
                    return [float(self.word in c) for c in completions]

            def flat(completions, **kwargs):
                LOADED.append(1)
                return [float(len(LOADED)) for _ in completions]

            number = 3
            """)
        )
        return path

    def test_a_file_with_data_beside_it_and_dataclasses_of_its_own(self, file, monkeypatch):
        before = list(sys.path)
        finder = load_component(f"{file}:Finder")
        assert isinstance(finder, type)
        assert entries(Component("f", finder), request()) == [1.0]
        assert entries(Component("f", finder, {"word": "dog"}), request()) == [0.0]
        monkeypatch.chdir(file.parent)
        assert load_component(f"{file.name}:Finder") is finder  # the same file, loaded once
        assert sys.path == before and sys.modules[finder.__module__].__file__ == str(file)

    def test_files_of_one_name_are_two_modules(self, tmp_path):
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "rewards.py").write_text(f"def fn(completions): return ['{folder}']\n")
        assert [load_component(f"{tmp_path}/{folder}/rewards.py:fn")([]) for folder in ("a", "b")] == [["a"], ["b"]]
        assert "rewards" not in sys.modules

    def test_a_module(self):
        assert load_component("math:fsum") is math.fsum

    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ("nothing", "write `pkg.mod:fn` or `path/file.py:fn`"),
            ("math:", "write `pkg.mod:fn`"),
            (":fn", "write `pkg.mod:fn`"),
            ("math:fsun", "math has no `fsun`; did you mean `fsum`?"),
            ("math:pi", "`pi` is a float, not a function or class"),
            ("no_such_package.mod:fn", "no module named 'no_such_package' is installed"),
            ("math.nope:fn", "no module named 'math.nope'"),
            (".relative:fn", ".relative"),
        ],
    )
    def test_what_cannot_be_loaded_is_the_users_error(self, spec, says):
        with pytest.raises(UserError) as error:
            load_component(spec)
        assert f"component `{spec}`" in str(error.value) and says in str(error.value)
        assert "\n" not in str(error.value)

    def test_what_cannot_be_loaded_from_a_file(self, file, tmp_path):
        with pytest.raises(UserError, match=r"has no `finder`; did you mean `Finder`\?"):
            load_component(f"{file}:finder")
        with pytest.raises(UserError, match="`number` is a int, not a function or class"):
            load_component(f"{file}:number")
        with pytest.raises(UserError, match=r"there is no file .*; did you mean `my rewards.v2.py`\?"):
            load_component(f"{tmp_path}/my_rewards.v2.py:flat")
        with pytest.raises(UserError, match="there is no file"):
            load_component(f"{tmp_path}/no/where.py:flat")

    @pytest.mark.parametrize(
        ("source", "says"),
        [
            (
                "import math\n\nx = 1 / 0\n",
                r"raised ZeroDivisionError: division by zero \(.*broken.py:3, in <module>\)",
            ),
            ("def f(:\n", r"raised SyntaxError: invalid syntax.*broken.py:1\)"),
            ("\nimport no_such_package\n", r"raised ModuleNotFoundError: .*'no_such_package' \(.*broken.py:2"),
            ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3 \(.*broken.py:2"),
            ("import json\ndef g(): json.loads('')\ng()\n", r"raised JSONDecodeError: .* \(.*broken.py:2, in g\)"),
        ],
    )
    def test_a_file_that_fails_to_import_is_named_with_its_line(self, tmp_path, source, says):
        file = tmp_path / "broken.py"
        file.write_text(source)
        modules = set(sys.modules)
        for _ in range(2):  # the failed module must not stay behind, half loaded
            with pytest.raises(UserError, match=says) as error:
                load_component(f"{file}:fn")
            assert "\n" not in str(error.value)
        assert not any(name.startswith("component_") for name in set(sys.modules) - modules)

    def test_a_package_that_fails_to_import_is_named_with_its_line(self, tmp_path, monkeypatch):
        (tmp_path / "a_broken_package").mkdir()
        (tmp_path / "a_broken_package" / "__init__.py").write_text("")
        (tmp_path / "a_broken_package" / "mod.py").write_text("import json\nimport no_such_package\n")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(UserError, match=r"importing a_broken_package.mod raised ModuleNotFoundError.*mod.py:2"):
            load_component("a_broken_package.mod:fn")


class TestLife:
    """setup, score and close of a class; `async` components beside each other."""

    class Model:
        def __init__(self, bias: float = 0.0) -> None:
            self.bias, self.device, self.closed = bias, None, False
            TestLife.made = self

        def setup(self, device):
            self.device = device

        def score(self, batch: ScoreRequest):
            return [self.bias + len(ids) for ids in batch.prompt_ids]

        def close(self):
            self.closed = True

    def test_a_class_loads_scores_whole_batches_and_lets_go(self):
        component = Component("model", self.Model, {"bias": 0.5})
        component.setup("cpu")
        [(rewards, _)] = score_component(component, request())
        assert rewards.tolist() == [0, 0, 0, 2.5] and TestLife.made.device == "cpu" and not TestLife.made.closed
        component.close()
        assert TestLife.made.closed

    def test_what_setup_raises_is_what_the_user_wrote(self):
        class NoModel(self.Model):
            def setup(self, device):
                raise OSError("no weights")

        with pytest.raises(UserError, match=r"rewards.m: .*NoModel.setup\('cpu'\) raised OSError: no weights"):
            Component("m", NoModel).setup("cpu")

    def test_async_components_wait_beside_each_other(self):
        """Each waits until the other has begun: one after the other they would never end."""
        begun = {"a": asyncio.Event(), "b": asyncio.Event()}

        def waits(mine, other):
            async def score(completions):
                begun[mine].set()
                await asyncio.wait_for(begun[other].wait(), 10)
                return [1.0] * len(completions)

            return Component(mine, score)

        async def fails(completions):
            raise ValueError("no answer")

        answers = score_components([waits("a", "b"), Component("c", fails), waits("b", "a")], request())
        assert list(answers) == ["a", "c", "b"]
        assert answers["a"][0][0][-1] == answers["b"][0][0][-1] == 1.0
        assert "sample u0: component 'c'" in str(answers["c"][0]) and "ValueError: no answer" in str(answers["c"][0])
