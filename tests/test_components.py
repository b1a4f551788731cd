"""Reward components: every kind of answer worked by hand, every way to be wrong named, the user's code left alone."""

import functools
import math
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.faults import RewardFault, UserError
from core.trajectory import PromptRequest, Trajectory
from reward_server.components import Component, ScoreRequest, Span, load_component, place, score_component

OFFSETS = np.array([[0, 3], [3, 7], [7, 8], [8, 8]])  # "the", " cat", ".", <eos>


def placed(answer, offsets=OFFSETS) -> tuple[list[float], list[bool]]:
    rewards, mask = place(answer, offsets, component="truth", uid="u7")
    assert rewards.dtype == np.float64 and mask.dtype == bool and len(rewards) == len(mask) == len(offsets)
    return rewards.tolist(), mask.tolist()


def request(prompts=("p",), texts=("the cat.",), columns=None, **changes) -> ScoreRequest:
    fields = {
        "prompts": list(prompts),
        "completions": list(texts),
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


class TestPlace:
    def test_a_float_goes_to_the_last_token(self):
        assert placed(0.5) == ([0, 0, 0, 0.5], [True] * 4)

    @pytest.mark.parametrize("answer", [2, np.float32(2), np.int64(2), np.array(2.0)])
    def test_numbers_of_other_types(self, answer):
        assert placed(answer)[0] == [0, 0, 0, 2.0]

    def test_a_list_gives_one_per_token(self):
        assert placed([0.0, 1, -0.25, 2.0]) == ([0, 1, -0.25, 2], [True] * 4)
        assert placed(np.array([0, 1, 2, 3], dtype=np.float32))[0] == [0, 1, 2, 3]
        assert placed([np.float32(0.5), 0, 0, np.int32(3)])[0] == [0.5, 0, 0, 3]

    def test_none_does_not_apply(self):
        assert placed(None) == ([0, 0, 0, 0], [False] * 4)

    def test_no_spans_is_zero_and_applies(self):
        assert placed([]) == ([0, 0, 0, 0], [True] * 4)

    def test_a_span_within_one_token(self):
        assert placed([Span(4, 7, 1.0)])[0] == [0, 1, 0, 0]  # "cat" within " cat"

    def test_a_span_over_tokens_is_shared_evenly(self):
        assert placed([Span(2, 8, 3.0)])[0] == [1, 1, 1, 0]
        assert placed([Span(0, 4, 1.0)])[0] == [0.5, 0.5, 0, 0]

    def test_the_last_token_takes_the_remainder(self):
        assert math.fsum([0.9 / 3] * 3) != 0.9
        assert placed([Span(0, 8, 0.9)])[0] == [0.3, 0.3, 0.30000000000000004, 0]

    def test_spans_that_meet_add_up(self):
        assert placed([Span(0, 3, 1.0), Span(2, 4, -0.5), Span(0, 8, 3.0)])[0] == [1.75, 0.75, 1, 0]

    def test_a_split_character_counts_for_its_last_token(self):
        """ "aé😀": a | é in 2 tokens | the emoji in 4; <eos> within it, as if sampled there, never gets anything."""
        offsets = np.array([[0, 1], [1, 2], [1, 2], [2, 3], [2, 3], [2, 2], [2, 3], [2, 3]])
        assert placed([Span(1, 2, 1.0)], offsets)[0] == [0, 0, 1, 0, 0, 0, 0, 0]
        assert placed([Span(2, 3, 1.0)], offsets)[0] == [0, 0, 0, 0, 0, 0, 0, 1]
        assert placed([Span(0, 3, 3.0)], offsets)[0] == [1, 0, 1, 0, 0, 0, 0, 1]

    def test_a_token_with_characters_of_its_own_beside_the_split_one(self):
        """ "aéb" as [a + half of é][other half + b]: the first token owns a only, the second é and b."""
        offsets = np.array([[0, 2], [1, 3]])
        assert placed([Span(1, 2, 1.0)], offsets)[0] == [0, 1]
        assert placed([Span(0, 2, 1.0)], offsets)[0] == [0.5, 0.5]

    @settings(max_examples=500, deadline=None)
    @given(
        score=st.floats(allow_nan=False, allow_infinity=False),
        tokens=st.integers(1, 60),
        bounds=st.tuples(st.integers(0, 59), st.integers(1, 60)),
    )
    def test_the_parts_of_a_span_sum_to_its_score_exactly(self, score, tokens, bounds):
        start, end = min(bounds[0], tokens - 1), min(bounds[1], tokens)
        start = min(start, end - 1)
        offsets = np.stack([np.arange(tokens), np.arange(1, tokens + 1)], axis=1)
        rewards, _ = place([Span(start, end, score)], offsets, component="c", uid="u")
        assert math.fsum(rewards) == score
        assert not rewards[:start].any() and not rewards[end:].any()

    @settings(max_examples=200, deadline=None)
    @given(
        text=st.text("aé😀", min_size=1, max_size=8),
        cuts=st.sets(st.integers(1, 31)),
        where=st.tuples(*[st.floats(0, 1)] * 2),
    )
    def test_any_text_cut_anywhere_finds_the_owners(self, text, cuts, where):
        """The rule in its own words, character by character: the last token with a byte of it owns it."""
        data = text.encode()
        char_of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
        bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        offsets = np.array(
            [(char_of_byte[a], char_of_byte[b - 1] + 1) for a, b in zip(bounds, bounds[1:], strict=False)]
        )
        owners = [max(t for t, (a, b) in enumerate(offsets) if a <= i < b) for i in range(len(text))]
        start, end = sorted(round(x * len(text)) for x in where)
        end = max(end, start + 1)
        start, end = (start, end) if end <= len(text) else (len(text) - 1, len(text))
        rewards, _ = place([Span(start, end, 7.0)], offsets, component="c", uid="u")
        assert set(np.flatnonzero(rewards)) == set(owners[start:end])
        assert math.fsum(rewards) == 7.0

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            ("good", "'good' (str)"),
            (True, "True (bool)"),
            (np.bool_(True), "(bool)"),
            (math.nan, "nan (float)"),
            (math.inf, "inf (float)"),
            (10**400, "(int)"),
            (1j, "1j (complex)"),
            ({"score": 1.0}, "{'score': 1.0} (dict)"),
            ((0.0, 0.0, 0.0, 1.0), "(tuple)"),
            (Span(0, 3, 1.0), "Span(start=0, end=3, score=1.0)"),
            ([1.0, 2.0], "a list of 2 entries for 4 tokens"),
            (np.zeros((0,)), "a list of 0 entries for 4 tokens"),
            ([0.0, math.nan, 0.0, 0.0], "nan (float) for token 1"),
            ([0.0, 0.0, False, 0.0], "False (bool) for token 2"),
            ([0.0, 0.0, 0.0, None], "None for token 3"),
            ([[0.0], [0.0], [0.0], [0.0]], "[0.0] (list) for token 0"),
            ([Span(0, 1, 1.0), 0.0, 0.0, 0.0], "Span(start=0, end=1, score=1.0) for token 0"),
            ([Span(-1, 3, 1.0)], "0 <= start < end <= 8"),
            ([Span(3, 9, 1.0)], "Span(start=3, end=9, score=1.0): allowed is 0 <= start < end <= 8"),
            ([Span(3, 3, 1.0)], "0 <= start < end <= 8"),
            ([Span(5, 3, 1.0)], "0 <= start < end <= 8"),
            ([Span(0.0, 3.0, 1.0)], "whole numbers"),
            ([Span(False, True, 1.0)], "whole numbers"),
            ([Span(0, 3, math.nan)], "must be a finite float"),
            ([Span(0, 3, "1")], "must be a finite float"),
            ([Span(0, 1, 1.7e308), Span(0, 1, 1.7e308)], "more than a float64 holds"),
        ],
    )
    def test_anything_else_is_refused_by_name(self, answer, says):
        with pytest.raises(RewardFault) as fault:
            place(answer, OFFSETS, component="truth", uid="u7")
        message = str(fault.value)
        assert message.startswith("sample u7: component 'truth': ") and says in message and "\n" not in message

    def test_a_span_in_a_text_without_characters_is_refused(self):
        with pytest.raises(RewardFault, match="0 <= start < end <= 0"):
            place([Span(0, 1, 1.0)], np.array([[0, 0]]), component="truth", uid="u7")

    def test_a_span_that_meets_no_token_is_refused(self):
        with pytest.raises(RewardFault, match=r"u7.*truth.*Span\(start=1, end=2, score=1.0\) meets no token"):
            place([Span(1, 2, 1.0)], np.array([[0, 1], [2, 3]]), component="truth", uid="u7")

    @pytest.mark.parametrize("answer", [1.0, None, []])
    def test_no_tokens_no_reward(self, answer):
        with pytest.raises(RewardFault, match="u7.*truth.*no tokens"):
            place(answer, np.zeros((0, 2), dtype=np.int64), component="truth", uid="u7")


def trl_length(prompts, completions, completion_ids, **kwargs):
    """As in TRL's documentation."""
    return [float(len(ids)) for ids in completion_ids]


def trl_answer(completions, answer, **kwargs):
    return [1.0 if right in completion else 0.0 for completion, right in zip(completions, answer, strict=True)]


class TestComponent:
    def test_trl_functions_unmodified(self):
        batch = request(["p", "q"], ["the cat.", "a dog."], {"answer": ["cat", "cat"], "level": [1, 2]})
        assert Component("length", trl_length).score(batch) == [4.0, 4.0]
        assert Component("answer", trl_answer).score(batch) == [1.0, 0.0]

    def test_a_trl_function_on_conversations(self):
        def think_format(completions, **kwargs):
            contents = [completion[0]["content"] for completion in completions]
            return [float(content.startswith("the")) for content in contents]

        messages = [{"role": "user", "content": "hi"}]
        batch = ScoreRequest.from_trajectories([trajectory(messages)], ["the cat."])
        assert Component("think", think_format).score(batch) == [1.0]

    def test_a_coroutine_is_awaited(self):
        async def slow(completions, **kwargs):
            return [1.0 for _ in completions]

        assert Component("slow", slow).score(request()) == [1.0]

    def test_a_function_gets_what_it_names(self):
        def fn(finish_reasons, offsets, level=0):
            assert finish_reasons == ["stop"] and offsets[0].tolist() == OFFSETS.tolist() and level == [3]
            return [[0.0, 0.0, 0.0, 1.0]]

        assert Component("c", fn).score(request(columns={"level": [3], "unused": [None]})) == [[0.0, 0.0, 0.0, 1.0]]

    def test_a_function_gets_everything_through_kwargs(self):
        seen = {}
        Component("c", lambda **kwargs: seen.update(kwargs) or [0.0]).score(request(columns={"level": [3]}))
        assert sorted(seen) == ["completion_ids", "completions", "finish_reasons", "level", "offsets", "prompts"]

    def test_a_function_gets_its_options_with_each_call(self):
        def fn(completions, factor=1.0):
            return [factor for _ in completions]

        assert Component("c", fn, {"factor": 3.0}).score(request()) == [3.0]

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
        Component("vandal", vandal).score(batch)
        assert batch.prompts == [[{"role": "user", "content": "hi"}]] and batch.columns == {"tags": [["a"]]}
        assert batch.completions == [[{"role": "assistant", "content": "the cat."}]]
        assert batch.completion_ids == [[5, 6, 7, 0]]

        def shift(offsets, **kwargs):
            offsets[0] += 1

        [fault] = score_component(Component("shift", shift), batch)
        assert "read-only" in str(fault)

    def test_a_column_that_is_missing_is_named(self):
        def fn(completions, answr):
            return [0.0]

        with pytest.raises(RewardFault, match=r"component 'c'.* wants `answr`.*did you mean `answer`"):
            Component("c", fn).score(request(columns={"answer": ["4"]}))

    def test_an_option_with_the_name_of_a_column_is_refused(self):
        component = Component("c", lambda completions, level: [0.0], {"level": 1})
        with pytest.raises(RewardFault, match="component 'c'.*`level` is both an option"):
            component.score(request(columns={"level": [3]}))

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
        assert batch.completion_ids == [[5, 6, 7, 0]] * 2 and batch.finish_reasons == ["stop"] * 2
        assert batch.uids == ["u0", "u1"] and len(batch) == 2
        assert batch.columns == {"answer": ["4", None], "level": [None, 2]}
        assert all((offsets == OFFSETS).all() for offsets in batch.offsets)

    def test_a_prompt_of_messages_is_answered_by_a_message(self):
        messages = [{"role": "user", "content": "hi"}]
        batch = ScoreRequest.from_trajectories([trajectory(messages)], ["the cat."])
        assert batch.prompts == [messages]
        assert batch.completions == [[{"role": "assistant", "content": "the cat."}]]

    @pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "offsets", "finish_reasons"])
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
        assert Component("f", finder).score(request()) == [1.0]
        assert Component("f", finder, {"word": "dog"}).score(request()) == [0.0]
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
