"""An answer placed on tokens: each kind worked by hand, nothing lost for any spans over any text, errors named."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.faults import RewardFault
from reward_server.placing import Span, place

OFFSETS = np.array([[0, 3], [3, 7], [7, 8], [8, 8]])  # "the", " cat", ".", <eos>


def placed(answer, offsets=OFFSETS) -> tuple[list[float], list[bool]]:
    rewards, mask = place(answer, offsets, component="truth", uid="u7")
    assert rewards.dtype == np.float64 and mask.dtype == bool and len(rewards) == len(mask) == len(offsets)
    return rewards.tolist(), mask.tolist()


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
        score=st.floats(-1e9, 1e9),
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
            ([Span(0, 1, 9e8), Span(0, 1, 9e8)], "more than 1e+09 on one token"),
            (1e30, "1e+30 (float)"),
            (np.array([0.0, 0.0, -1e30, 0.0]), "(float64) for token 2"),
            (np.array([0.0, math.nan]), "a list of 2 entries for 4 tokens"),
            ([Span(0, 3, 1e30)], "at most 1e+09"),
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

    def test_a_span_may_go_whole_to_its_last_token(self):
        rewards, _ = place([Span(0, 8, 3.0), Span(0, 4, 1.0)], OFFSETS, component="c", uid="u", spans="last")
        assert rewards.tolist() == [0, 1, 3, 0]

    def test_a_fault_in_the_place_of_an_entry_stays_one(self):
        with pytest.raises(RewardFault, match="sample u7: component 'truth': the server was busy"):
            placed(RewardFault("the server was busy"))

    def test_where_large_scores_cancel_a_small_token_holds_the_rest(self):
        spans = [Span(0, 3, 500.123), Span(3, 7, -500.122), Span(0, 7, 0.001)]
        rewards, _ = place(spans, OFFSETS, component="c", uid="u")
        assert math.fsum(rewards.tolist()) == math.fsum(s.score for s in spans) != math.fsum(rewards[:2].tolist())
        assert rewards[:2].tolist() == [500.1235, -500.1215] and 0 < abs(rewards[2]) < 1e-13 and rewards[3] == 0

    def test_what_a_split_number_rounds_away_stays_with_the_policy(self):
        """The remainder of cancelling spans looks for a small token: one of an environment is the smallest of all."""
        offsets = np.array([[0, 3], [3, 7], [7, 8], [8, 9], [9, 9]])
        own = np.array([True, True, False, True, True])
        spans = [Span(0, 3, 500.123), Span(3, 7, -500.122), Span(0, 7, 0.001)]
        rewards, _ = place(spans, offsets, component="c", uid="u", action_mask=own)
        assert math.fsum(rewards.tolist()) == math.fsum(s.score for s in spans)
        assert rewards[2] == 0 and rewards[3] != 0

    @settings(max_examples=300, deadline=None)
    @given(
        text=st.text("aé😀 .", min_size=1, max_size=12),
        cuts=st.sets(st.integers(1, 47)),
        specials=st.sets(st.integers(0, 11)),
        spans=st.lists(
            st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(-1e6, 1e6, allow_subnormal=False)), max_size=8
        ),
        how=st.sampled_from(["spread", "last"]),
    )
    def test_what_is_placed_sums_to_what_was_said_rounded_once(self, text, cuts, specials, spans, how):
        """Random spans that meet and overlap, over bytes cut anywhere, with special tokens between them."""
        data = text.encode()
        char_of_byte = [i for i, character in enumerate(text) for _ in character.encode()]
        bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
        pairs = [(char_of_byte[a], char_of_byte[b - 1] + 1) for a, b in zip(bounds, bounds[1:], strict=False)]
        for at in sorted(specials):
            if at <= len(pairs):
                stop = pairs[at - 1][1] if at else 0
                pairs.insert(at, (stop, stop))
        pairs.append((len(text), len(text)))  # <eos>: where all others are large, it holds what they are too coarse for
        answer = []
        for a, b, score in spans:
            start, end = sorted((int(a * len(text)), int(b * len(text))))
            answer.append(Span(min(start, len(text) - 1), max(end, min(start, len(text) - 1) + 1), score))
        rewards, _ = place(answer, np.array(pairs), component="c", uid="u", spans=how)
        assert math.fsum(rewards.tolist()) == math.fsum(span.score for span in answer)


OWN = np.array([True, False, False, True])  # " cat" and "." are what an environment answered


class TestObservations:
    """Rewards are the policy's: nothing is ever placed on a token that an environment wrote."""

    @staticmethod
    def placed(answer, own=OWN, **how) -> list[float]:
        rewards, mask = place(answer, OFFSETS, component="truth", uid="u7", action_mask=own, **how)
        assert mask.all() == (answer is not None) and not rewards[~own].any()
        return rewards.tolist()

    @pytest.mark.parametrize("how", ["refuse", "drop"])
    def test_a_float_goes_to_the_last_token_of_the_policy(self, how):
        assert self.placed(0.5, observations=how) == [0, 0, 0, 0.5]
        assert self.placed(0.5, np.array([True, True, False, False]), observations=how) == [0, 0.5, 0, 0]

    @pytest.mark.parametrize("how", ["refuse", "drop"])
    def test_a_span_goes_whole_to_the_tokens_of_the_policy_that_it_overlaps(self, how):
        assert self.placed([Span(0, 8, 3.0)], observations=how) == [3, 0, 0, 0]
        own = np.array([True, False, True, True])
        assert self.placed([Span(0, 8, 3.0)], own, observations=how) == [1.5, 0, 1.5, 0]
        assert self.placed([Span(0, 8, 3.0)], own, spans="last", observations=how) == [0, 0, 3, 0]
        assert self.placed([Span(0, 7, 3.0)], own, spans="last", observations=how) == [3, 0, 0, 0]

    def test_a_span_on_nothing_else_is_an_error_or_dropped(self):
        with pytest.raises(RewardFault, match="sample u7: component 'truth': .*score=1.0.* the environment wrote"):
            self.placed([Span(0, 3, 2.0), Span(4, 8, 1.0)])
        assert self.placed([Span(0, 3, 2.0), Span(4, 8, 1.0)], observations="drop") == [2, 0, 0, 0]
        assert self.placed([Span(4, 8, 1.0)], observations="drop") == [0, 0, 0, 0]

    @pytest.mark.parametrize("kind", [list, np.array])
    def test_a_number_for_such_a_token_is_an_error_or_dropped_and_0_is_none(self, kind):
        assert self.placed(kind([1.0, 0.0, 0.0, 2.0])) == [1, 0, 0, 2]
        with pytest.raises(RewardFault, match="sample u7: component 'truth': got .*-3.0.* for token 2, .*environment"):
            self.placed(kind([1.0, 0.0, -3.0, 2.0]))
        assert self.placed(kind([1.0, 4.0, -3.0, 2.0]), observations="drop") == [1, 0, 0, 2]

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e10])
    def test_what_is_no_reward_is_an_error_there_too(self, wrong):
        with pytest.raises(RewardFault, match="for token 1; allowed"):
            self.placed([1.0, wrong, 0.0, 0.0], observations="drop")

    def test_a_response_without_a_token_of_the_policy_has_nothing_to_reward(self):
        with pytest.raises(RewardFault, match="u7.*the policy wrote no token"):
            self.placed(1.0, np.zeros(4, dtype=bool))
