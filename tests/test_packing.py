"""Rows packed without padding, each prompt once: layout by hand, and the same numbers as each row alone."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import tiny_models
from policy_reading import WAYS, policy_of, read
from rollout.engines.transformers_engine import TransformersEngine
from trainer.batch import TrainBatch
from trainer.packing import Segments, attend, pack


def test_the_layout_by_hand():
    """Two samples of one prompt "5 6 7", responses "8 9" and "4"; then a prompt "1" alone, response "2 3" with its
    first token not the policy's own."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 4, 0], [0, 0, 1, 2, 3]])
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    packed = pack(ids, torch.tensor([3, 3, 1]), torch.tensor([2, 1, 2]), mask)
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 4, 1, 2, 3]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert packed.token.tolist() == [8, 9, 4, 3]
    assert packed.state_at.tolist() == [2, 3, 2, 7]  # 2 twice: both first tokens follow the prompt's last
    assert packed.after_at.tolist() == [4, 5, 8]
    assert packed.row.tolist() == [0, 0, 1, 2] and packed.column.tolist() == [0, 1, 0, 1]
    assert packed.segments._spans.tolist() == [[0, 3, 0, 0], [3, 2, 0, 3], [5, 1, 0, 3], [6, 3, 0, 0]]
    assert len(packed) == 9


def test_the_layout_for_a_kernel_that_takes_lengths_by_hand():
    """The same rows: keys of each segment are its prompt, then itself, never the response beside it."""
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 4, 0], [0, 0, 1, 2, 3]])
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    at = pack(ids, torch.tensor([3, 3, 1]), torch.tensor([2, 1, 2]), mask).segments.varlen
    assert at.keys.tolist() == [0, 1, 2] + [0, 1, 2, 3, 4] + [0, 1, 2, 5] + [6, 7, 8]
    assert at.q_starts.tolist() == [0, 3, 5, 6, 9] and at.k_starts.tolist() == [0, 3, 8, 12, 15]
    assert (at.longest_q, at.longest_k) == (3, 5)
    assert pack(ids[2:], torch.tensor([1]), torch.tensor([2]), mask[2:]).segments.varlen.keys is None


def test_prompts_that_differ_by_the_padding_id_alone_are_two():
    """Padded to one width, "9" and "0 9" look alike where 0 pads; so do the responses "3" and "3 0"."""
    ids = torch.tensor([[0, 9, 3, 0], [0, 9, 3, 0]])
    mask = torch.tensor([[True, False], [True, True]])
    packed = pack(ids, torch.tensor([1, 2]), torch.tensor([1, 2]), mask)
    assert packed.ids.tolist() == [[9, 3, 0, 9, 3, 0]]
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2, 3]]
    assert packed.state_at.tolist() == [0, 3, 4] and packed.after_at.tolist() == [1, 5]


def test_an_empty_response_has_the_state_of_its_prompt_behind_it():
    packed = pack(torch.tensor([[3, 4, 0]]), torch.tensor([2]), torch.tensor([0]), torch.zeros(1, 1).bool())
    assert packed.ids.tolist() == [[3, 4]] and packed.after_at.tolist() == [1] and len(packed.token) == 0


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_over_segments_is_that_of_each_segment_alone(kv_heads):
    """Against softmax written out, for random segments of many lengths, some of them with a shared prompt."""
    rng = np.random.default_rng(3)
    spans, n = [], 0
    for _ in range(7):
        prompt, start = int(rng.integers(1, 9)), n
        n += prompt
        spans.append((start, prompt, 0, 0))
        for _ in range(int(rng.integers(0, 4))):
            t = int(rng.integers(1, 12))
            spans.append((n, t, start, prompt))
            n += t
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, 8, dtype=torch.float64, requires_grad=True) for h in (4, kv_heads, kv_heads))
    out, _ = attend(None, q, k, v, None, segments=Segments(np.array(spans), torch.device("cpu")), scaling=0.3)
    expected = torch.empty_like(out)
    for start, t, p_start, p in spans:
        sees = [*range(p_start, p_start + p), *range(start, start + t)]
        for j in range(t):
            keys = sees[: p + j + 1]
            for head in range(4):
                of = head * kv_heads // 4
                scores = (k[0, of, keys] @ q[0, head, start + j]) * 0.3
                expected[0, start + j, head] = F.softmax(scores, dim=0) @ v[0, of, keys]
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    g = torch.randn_like(out)
    ours = torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
    theirs = torch.autograd.grad(expected, (q, k, v), g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("what", ["softcap", "sliding_window", "s_aux", "position_bias"])
def test_what_such_attention_has_not_is_refused(what):
    segments = Segments(np.array([(0, 5, 0, 0)]), torch.device("cpu"))
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(NotImplementedError):
        attend(None, x, x, x, None, segments=segments, **{what: 3 if what == "sliding_window" else torch.ones(1)})
    attend(None, x, x, x, None, segments=segments, sliding_window=5)  # a window that no segment outgrows is none


def shared_prompts(name: str, device: str = "cpu") -> tuple[torch.nn.Module, TrainBatch]:
    """Four samples to each of five prompts; rows of one ordinal have one prompt."""
    import dataclasses

    model = tiny_models.make_model(name).to(device)
    engine = TransformersEngine(model, tuple(range(30)), temperature=1.0, max_new_tokens=14)
    rolled = tiny_models.roll_out(engine, 20)
    asked = [t.request for t in rolled[:5]]
    requests = [dataclasses.replace(r, k=k) for r in asked for k in range(4)]
    again = engine.generate(requests)
    rows = []
    for t, request, g in zip(rolled, requests, again, strict=True):
        n = len(g.response_ids)
        rows.append(
            dataclasses.replace(
                t,
                request=request,
                response_ids=g.response_ids,
                rollout_logprobs=g.logprobs,
                action_mask=np.arange(n) != 2,  # a token that was not the policy's own
                token_offsets=np.zeros((n, 2), dtype=np.int64),
                policy_version=np.zeros(n, dtype=np.int64),
                finish_reason=g.finish_reason,
                component_rewards={"a": np.ones(n)},
                component_mask={"a": np.ones(n, dtype=bool)},
            )
        )
    return model, TrainBatch.collate(rows)


@pytest.mark.parametrize("name", tiny_models.configs())
def test_every_shape_of_model_reads_a_packed_batch_as_it_reads_rows_alone(name):
    """The oracle is the model itself, one row at a time without padding, logits and last hidden state."""
    model, batch = shared_prompts(name)
    oracle = tiny_models.make_model(name)
    policy = policy_of(model)
    torch.nn.init.normal_(policy.value_head.weight)
    ours = read(policy, batch, 0.8)
    for i in range(len(batch)):
        p, t = int(batch.prompt_lengths[i]), int(batch.response_lengths[i])
        ids = batch.input_ids[i, batch.prompt_width - p : batch.prompt_width + t][None]
        with torch.no_grad():
            logits = oracle(input_ids=ids).logits[0] / 0.8
            hidden = oracle.base_model(input_ids=ids).last_hidden_state[0]
            values = policy.value_head(hidden).squeeze(-1)
        want = logits.log_softmax(-1)[torch.arange(p - 1, p - 1 + t), ids[0, p:]]
        mask = batch.response_mask[i, :t]
        torch.testing.assert_close(ours.logprobs[i, :t][mask], want[mask], atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.values[i, :t][mask], values[p - 1 : p - 1 + t][mask], atol=1e-4, rtol=0)
        torch.testing.assert_close(ours.values[i, t], values[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3-untied"])
def test_the_three_ways_of_reading_agree(name):
    _, batch = shared_prompts(name)
    policies = [policy_of(tiny_models.make_model(name), way) for way in WAYS]
    for policy in policies:
        torch.manual_seed(1)
        torch.nn.init.normal_(policy.value_head.weight)
    readings = [read(policy, batch, 1.0) for policy in policies]
    for other in readings[1:]:
        torch.testing.assert_close(other.values, readings[0].values, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.logprobs, readings[0].logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.entropy, readings[0].entropy, atol=1e-4, rtol=0)
