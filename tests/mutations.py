"""Bugs that RLHF trainers have had, put back one at a time into a copy of this code: the tests must notice each.

    python tests/mutations.py                   # all, in minutes; exit code 1 if one gets through
    python tests/mutations.py whiten bootstrap  # those with such a word in their name

A mutation is an exact text replacement. Its old text must stand in its file exactly once; where code was changed so
that it does not, the script stops and names the mutation, which then wants the same bug in the words of the new code.
First the tests run on the copy as it is and must pass, so what fails later fails because of the mutation. A test that
cannot even be collected has caught nothing.

Each mutation has a copy and a process of its own. The process is forked from this one, which has imported the libraries
(and nothing of ours), or most of the time would go into importing torch a hundred times.
"""

import gc
import importlib
import importlib.metadata
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("core", "trainer", "rollout", "tests", "pyproject.toml")
AT_A_TIME = 2
TIMEOUT_S = 300  # of one process; the machine may be busy
LIBRARIES = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "accelerate",
    "peft",
    "hypothesis",
    "numpy",
    "pydantic",
    "yaml",
    "pytest",
)

ALIGN, INVARIANCE, IDENTITY = ("tests/test_align.py",), ("tests/test_invariance.py",), ("tests/test_identity.py",)
POISON, ENGINE = ("tests/test_poison.py",), ("tests/test_engine.py",)
DECODER, PACKED = ("tests/test_decoder.py",), ("tests/test_packed.py",)
COMPILED = ("tests/test_compiled.py",)
DRAWN = ("tests/test_draw.py",)
EMITTED = ("tests/test_emit_values.py",)
WEIGHTS, COMBINE, BATCH = ("tests/test_weights.py",), ("tests/test_combine.py",), ("tests/test_batch.py",)
PPO, LOGPROBS = ("tests/test_ppo.py",), ("tests/test_logprobs.py",)
PACKING, MODEL, HEAD = (
    ("tests/test_packing.py",),
    ("tests/test_model.py::test_padding_changes_nothing",),
    ("tests/test_fused_head.py",),
)
VALUE_HEADS = ("tests/test_value_heads.py",)
STALE, AHEAD = ("tests/test_stale.py",), ("tests/test_ahead.py",)
DRAWS = ("tests/test_sampling.py::test_draws_follow_the_softmax_over_what_is_kept",)
KEPT = ("tests/test_kept.py::test_caps_clips_and_kl_in_the_loss_work_on_them",)
KEPT_HEAD = ("tests/test_kept.py::test_the_fused_head_is_autograd_over_masked_logits",)
TURNS = ("tests/test_turns.py::test_logprobs_are_those_of_one_forward_over_all_that_stands_there",)
LAST_TURN = ("tests/test_turns.py::test_the_environment_is_not_asked_after_the_last_turn",)
NO_ROOM = ("tests/test_turns.py::test_an_observation_that_leaves_no_room_is_left_out_and_the_response_is_cut",)
LOST = ("tests/test_rounds.py::test_a_sample_that_is_missing_is_a_fault_unless_it_was_dropped",)
COUNTED = ("tests/test_turns.py::test_metrics_count_what_the_policy_wrote",)
LEARN = ("tests/test_learn.py::test_a_token_for_each_position_is_learnt",)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


TURNS_PY = "rollout/turns.py"
BATCH_PY, PPO_PY, LOOP_PY = "trainer/batch.py", "trainer/ppo.py", "trainer/loop.py"
COMBINE_PY, WEIGHTS_PY, RECEIVER_PY = "core/combine.py", "core/weights.py", "rollout/weight_receiver.py"
LOGPROBS_PY, ENGINE_PY = "core/logprobs.py", "rollout/engines/transformers_engine.py"
RESPONSES_PY = "rollout/engines/responses.py"
LEARNER_PY, MODEL_PY, OBJECTIVE_PY = "trainer/learner.py", "trainer/model.py", "trainer/objective.py"
VALUE_HEADS_PY, SAMPLING_PY, KEPT_PY = "trainer/value_heads.py", "rollout/engines/sampling.py", "trainer/kept.py"
PACKING_PY, HEAD_PY, EXPORT_PY = "trainer/packing.py", "trainer/fused_head.py", "trainer/engine_weights.py"

AHEAD_PY = "trainer/ahead.py"
DECODER_PY, PACKED_PY = "rollout/engines/decoder.py", "rollout/engines/packed.py"
STEP_CPP, COMPILED_PY = "rollout/engines/compiled_step.cpp", "rollout/engines/compiled.py"
COMPILER_PY, DRAW_PY = "rollout/engines/compiler.py", "rollout/engines/draw.py"
DRAW_CPP, VECTORS_H = "rollout/engines/compiled_draw.cpp", "rollout/engines/vectors.h"

MUTATIONS = [
    # ------------------------------------------------ batches of an older policy
    Mutation(
        "the KL penalty of stale tokens is that of the present policy",
        BATCH_PY,
        "return self.rollout_logprobs if off_policy else self.old_logprobs",
        "return self.old_logprobs",
        STALE,
    ),
    Mutation(
        "stale tokens are weighed and measured against the writer at once",
        LEARNER_PY,
        "micro.old_logprobs if cfg.importance_cap else micro.writers_logprobs(self._off_policy)",
        "micro.writers_logprobs(self._off_policy)",
        STALE,
    ),
    Mutation(
        "the ratio of stale tokens starts at 1 and no weight makes up for it",
        LEARNER_PY,
        "micro.old_logprobs if cfg.importance_cap else micro.writers_logprobs(self._off_policy)",
        "micro.old_logprobs",
        STALE,
    ),
    Mutation(
        "a batch is asked for across a checkpoint",
        AHEAD_PY,
        "return max(after_checkpoint, step - max_staleness)",
        "return max(1, step - max_staleness)",
        AHEAD,
    ),
    # ------------------------------------------------ from trajectories to a batch
    Mutation(
        "eos is masked because it pads too",
        BATCH_PY,
        "response_mask=right([t.action_mask for t in trajectories], np.bool_)",
        "response_mask=right([t.action_mask & (t.response_ids != 0) for t in trajectories], np.bool_)",
        ALIGN,
    ),
    Mutation(
        "tokens of a tool are trained on",
        BATCH_PY,
        "response_mask=right([t.action_mask for t in trajectories], np.bool_)",
        "response_mask=right([np.ones(len(t), dtype=bool) for t in trajectories], np.bool_)",
        ALIGN,
    ),
    Mutation(
        "the policy is trained on what an environment wrote",
        TURNS_PY,
        "masks[i] = np.append(masks[i], none.astype(bool))",
        "masks[i] = np.append(masks[i], ~none.astype(bool))",
        TURNS,
    ),
    Mutation(
        "a response ends with an observation",
        TURNS_PY,
        'if reason == "stop" and turn < max_turns:',
        'if reason == "stop":',
        LAST_TURN,
    ),
    Mutation(
        "an observation fills the response",
        TURNS_PY,
        "if n_tokens + len(ids) >= self._spec.max_new_tokens:",
        "if n_tokens + len(ids) > self._spec.max_new_tokens:",
        NO_ROOM,
    ),
    Mutation(
        "log-probs of a turn stand where the observation before it began",
        TURNS_PY,
        "logprobs=np.append(g.logprobs, none)",
        "logprobs=np.append(none, g.logprobs)",
        TURNS,
    ),
    Mutation(
        "a sample that never came back is not missed",
        LOOP_PY,
        "lost := sorted(asked.difference(got, dropped))",
        "lost := sorted({*got}.difference(asked))",
        LOST,
    ),
    Mutation(
        "what an environment wrote counts as length",
        LOOP_PY,
        'sums.add("response/length_mean", float(mask.sum()), n)',
        'sums.add("response/length_mean", float(batch.response_lengths.sum()), n)',
        COUNTED,
    ),
    Mutation(
        "the reward lands on the token after its own, the last one's on padding",
        BATCH_PY,
        "component_rewards={n: right(arrays, np.float64)",
        "component_rewards={n: right([np.r_[0.0, a[:-1]] for a in arrays], np.float64)",
        LEARN,
    ),
    Mutation(
        "the reward of the last token is dropped",
        BATCH_PY,
        "component_rewards={n: right(arrays, np.float64)",
        "component_rewards={n: right([np.r_[a[:-1], 0.0] for a in arrays], np.float64)",
        ALIGN,
    ),
    Mutation(
        "a response is cut if it is as long as the longest",
        BATCH_PY,
        'torch.tensor([t.finish_reason == "length" for t in trajectories]',
        "torch.tensor([len(t) == width for t in trajectories]",
        ALIGN,
    ),
    Mutation(
        "padding ids inside a prompt are no tokens",
        BATCH_PY,
        "prompt_lengths=torch.tensor([len(t.request.prompt_ids) for t in trajectories]",
        "prompt_lengths=torch.tensor([max(1, int((t.request.prompt_ids != 0).sum())) for t in trajectories]",
        ALIGN,
    ),
    Mutation(
        "rows in the order of arrival",
        BATCH_PY,
        "trajectories = sorted(trajectories, key=lambda t: t.order)",
        "trajectories = list(trajectories)",
        ALIGN,
    ),
    Mutation(
        "the last, smaller micro-batch is dropped",
        BATCH_PY,
        "for piece in pieces]\n",
        "for piece in pieces if len(piece) == size or len(pieces) == 1]\n",
        INVARIANCE,
    ),
    Mutation(
        "every epoch has the same mini-batches",
        BATCH_PY,
        'text = f"{seed}/{step}/{epoch}/{sample[0]}/{sample[1]}"',
        'text = f"{seed}/{step}/{sample[0]}/{sample[1]}"',
        BATCH,
    ),
    # ------------------------------------------------ from rewards to advantages
    Mutation(
        "GAE takes tokens of a tool for time steps",
        PPO_PY,
        "    place = left_places(mask)\n",
        "    place = None\n",
        ALIGN,
    ),
    Mutation(
        "GAE reads the values of masked tokens",
        PPO_PY,
        "torch.nn.functional.pad(v[:, 1:], (0, 1))",
        "move_left(torch.nn.functional.pad(values.double()[:, 1:], (0, 1)), place)",
        ALIGN,
    ),
    Mutation(
        "gamma is forgotten at the next value",
        PPO_PY,
        "delta = r + gamma * next_value - v",
        "delta = r + next_value - v",
        ALIGN,
    ),
    Mutation(
        "returns are the advantages alone",
        PPO_PY,
        "return advantages, advantages + values",
        "return advantages, advantages",
        ALIGN,
    ),
    Mutation(
        "a cut response is never bootstrapped",
        LOOP_PY,
        "bootstrap_values=bootstrap,",
        "bootstrap_values=None,",
        ALIGN,
    ),
    Mutation(
        "the KL penalty is paid as a bonus",
        PPO_PY,
        "_select(token_rewards, mask) - kl_coef * kl",
        "_select(token_rewards, mask) + kl_coef * kl",
        IDENTITY,
    ),
    Mutation(
        "GAE never sees the KL",
        LOOP_PY,
        "        rewards,\n        values,",
        "        batch.token_rewards,\n        values,",
        IDENTITY,
    ),
    Mutation(
        "whitening counts padding",
        PPO_PY,
        "[wide.sum(), mask.sum().double()]",
        "[wide.sum(), torch.tensor(mask.numel()).double()]",
        INVARIANCE,
    ),
    Mutation(
        "whitening divides by the root of the deviation",
        PPO_PY,
        "torch.rsqrt(squares / (count - 1).clamp(min=1) + 1e-8)",
        "torch.rsqrt((squares / (count - 1).clamp(min=1)).sqrt() + 1e-8)",
        ALIGN,
    ),
    Mutation(
        "whitening on each rank by itself",
        LOOP_PY,
        "ppo.whitening(advantages, mask, all_reduce=all_reduce)",
        "ppo.whitening(advantages, mask)",
        INVARIANCE,
    ),
    Mutation(
        "advantages are not whitened",
        LOOP_PY,
        "if p.whitens:",
        "if False:",
        ALIGN,
    ),
    Mutation(
        "returns are made from whitened advantages",
        LOOP_PY,
        "batch.fill(rewards=rewards, returns=returns, advantages=advantages)",
        "batch.fill(rewards=rewards, returns=advantages + batch.values, advantages=advantages)",
        ALIGN,
    ),
    Mutation(
        "the heads of components are summed without their weights",
        VALUE_HEADS_PY,
        "sum(self.weights[name] * x for name, x in of.items())",
        "sum(x for name, x in of.items())",
        VALUE_HEADS,
    ),
    Mutation(
        "the head of the KL penalty learns a bonus",
        VALUE_HEADS_PY,
        "kl_coef=1.0",
        "kl_coef=-1.0",
        VALUE_HEADS,
    ),
    Mutation(
        "every head learns the returns of the first",
        VALUE_HEADS_PY,
        "        learnt[name] = returns",
        "        learnt[name] = next(iter(learnt.values()), returns)",
        VALUE_HEADS,
    ),
    Mutation(
        "the units of all heads are one",
        VALUE_HEADS_PY,
        'return f"{estimators.RETURNS}/{name}"',
        "return estimators.RETURNS",
        VALUE_HEADS,
    ),
    Mutation(
        "the value loss grows with the number of heads",
        LEARNER_PY,
        "normalizer=n_valid * n_heads,",
        "normalizer=n_valid,",
        VALUE_HEADS,
    ),
    # ------------------------------------------------ losses
    Mutation(
        "masked numbers are multiplied by 0",
        PPO_PY,
        "return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))",
        "return x * mask",
        POISON,
    ),
    Mutation(
        "the smaller of the two policy losses",
        PPO_PY,
        "loss = torch.maximum(unclipped, clipped)",
        "loss = torch.minimum(unclipped, clipped)",
        PPO,
    ),
    Mutation(
        "the smaller of the two value losses",
        PPO_PY,
        "torch.maximum(plain_sq, clipped_sq)",
        "torch.minimum(plain_sq, clipped_sq)",
        PPO,
    ),
    Mutation(
        "the KL coefficient is steered the wrong way",
        PPO_PY,
        "min(max(kl_per_response / self.target_kl - 1, -0.2), 0.2)",
        "min(max(1 - kl_per_response / self.target_kl, -0.2), 0.2)",
        PPO,
    ),
    # ------------------------------------------------ from components to token rewards
    Mutation(
        "the mean of dense rewards is shifted to 0",
        COMBINE_PY,
        "value = value / moments.std",
        "value = torch.where(valid, value - moments.mean, 0.0) / moments.std",
        COMBINE,
    ),
    Mutation(
        "a weight is applied twice",
        COMBINE_PY,
        "weighted[name] = weights[name] * value",
        "weighted[name] = weights[name] * (weights[name] * value)",
        ALIGN,
    ),
    Mutation(
        "an answer of None counts as what stands in its place",
        COMBINE_PY,
        "valid = response_mask & applies[name]",
        "valid = response_mask",
        ALIGN,
    ),
    Mutation(
        "rewards at tokens of a tool are paid",
        COMBINE_PY,
        "valid = response_mask & applies[name]",
        "valid = applies[name]",
        ALIGN,
    ),
    Mutation(
        "the deviation of a component is that of one rank",
        COMBINE_PY,
        "_moments(value, valid, all_reduce)\n",
        "_moments(value, valid, None)\n",
        INVARIANCE,
    ),
    Mutation(
        "running moments forget earlier batches",
        COMBINE_PY,
        "moments = running.setdefault(name, RunningMoments())",
        "moments = RunningMoments()",
        COMBINE,
    ),
    # ------------------------------------------------ log-probs and the rollout engine
    Mutation(
        "no temperature in the entropy",
        LOGPROBS_PY,
        "logp = _log_softmax(logits, temperature, keep)",
        "logp = _log_softmax(logits, 1.0, keep)",
        LOGPROBS,
    ),
    Mutation(
        "the temperature divides logits in place",
        LOGPROBS_PY,
        "wide / temperature if temperature != 1.0 else wide",
        "wide.div_(temperature)",
        LOGPROBS,
    ),
    Mutation(
        "no temperature in the log-probs of the rollout",
        SAMPLING_PY,
        "logprobs_from_logits(logits.unsqueeze(1), token, temperature, of_kept)",
        "logprobs_from_logits(logits.unsqueeze(1), token, 1.0, of_kept)",
        ENGINE,
    ),
    Mutation(
        "no temperature in the sampling",
        SAMPLING_PY,
        "heated = logits.double() / temperature",
        "heated = logits.double()",
        ENGINE,
    ),
    Mutation(
        "the engine counts positions from the padding on",
        ENGINE_PY,
        "positions = (mask.cumsum(-1) - 1).clamp(min=0)",
        "positions = (torch.ones_like(mask).cumsum(-1) - 1).clamp(min=0)",
        ENGINE,
    ),
    Mutation("the engine attends to padding", ENGINE_PY, "mask[i, width - len(prompt) :] = 1", "mask[i] = 1", ENGINE),
    Mutation(
        "all samples of a prompt are the same",
        RESPONSES_PY,
        "(request.ordinal << 20) | request.k",
        "(request.ordinal << 20)",
        IDENTITY,
    ),
    Mutation(
        "the stop token is no part of the response",
        ENGINE_PY,
        "torch.minimum(written[ended], out",
        "torch.minimum(written[ended] - stopped[ended].long(), out",
        ENGINE,
    ),
    Mutation("a cut response says that it stopped", RESPONSES_PY, '"stop" if stop else "length"', '"stop"', ENGINE),
    Mutation(
        "the tokenizer's eos ends no response",
        ENGINE_PY,
        " | {tokenizer_eos}\n",
        "\n",
        ENGINE,
    ),
    Mutation(
        "a full response is done with before the value behind it is there",
        ENGINE_PY,
        "done = written > out.limits[request]",
        "done = written >= out.limits[request]",
        EMITTED,
    ),
    Mutation(
        "a full response is ended by what is drawn behind it",
        ENGINE_PY,
        "request, written.clamp(max=out.steps), out) & ~done",
        "request, written.clamp(max=out.steps), out)",
        EMITTED,
    ),
    Mutation(
        "values are those of the state after the token",
        LEARNER_PY,
        "values[..., 0], after[:, 0], entropy = batch.rollout_values,",
        "values[..., 0], after[:, 0], entropy = batch.rollout_values.roll(-1, 1),",
        EMITTED,
    ),
    Mutation(
        "log-probs of workers are not held against the learner's",
        LEARNER_PY,
        "sums |= {_LOGPROBS_APART: apart.sum(), LOGPROB_ERROR: apart.max()}",
        "sums |= {_LOGPROBS_APART: 0 * apart.sum(), LOGPROB_ERROR: 0 * apart.max()}",
        EMITTED,
    ),
    Mutation(
        "values of workers are not held against the learner's",
        LEARNER_PY,
        "off = (own - given",
        "off = 0 * (own - given",
        EMITTED,
    ),
    Mutation(
        "values behind cut responses are not held against the learner's",
        LEARNER_PY,
        "own = torch.cat([values[:m], values[m:][cut]]).double()",
        "own = torch.cat([values[:m], given[m:]]).double()",
        EMITTED,
    ),
    Mutation(
        "the decoder turns queries the other way",
        DECODER_PY,
        "[-sin[..., :half], sin",
        "[sin[..., :half], -sin",
        DECODER,
    ),
    Mutation(
        "the decoder scores with its own scale", DECODER_PY, "attention.scaling)", "attention.scaling * 1.01)", DECODER
    ),
    Mutation("the decoder leaves out the norm of keys", DECODER_PY, "_normed(attention.k_norm, key)", "key", DECODER),
    Mutation(
        "the decoder takes a class that derives a known one",
        DECODER_PY,
        "kind.__name__ not in KNOWN",
        "not any(k.__name__ in KNOWN for k in kind.__mro__)",
        DECODER,
    ),
    Mutation(
        "the decoder takes whoever has the name of a known class",
        DECODER_PY,
        ' or not kind.__module__.startswith("transformers.models.")',
        "",
        DECODER,
    ),
    Mutation(
        "fused biases are left out",
        PACKED_PY,
        "bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])",
        "bias = None",
        DECODER,
    ),
    Mutation(
        "packed weights stay those of before",
        PACKED_PY,
        "        self._forward = None\n\n    def __call__",
        "\n    def __call__",
        PACKED,
    ),
    Mutation(
        "compiled attention sees what is behind the end of a row",
        STEP_CPP,
        "for (int64_t t = n; t < W; t++) found[t] = -INFINITY;",
        "",
        COMPILED,
    ),
    Mutation(
        "compiled products forget a part of a long sum",
        STEP_CPP,
        "total[r][0] += sums[r][0], total[r][1] += sums[r][1]",
        "total[r][0] = sums[r][0], total[r][1] += sums[r][1]",
        COMPILED,
    ),
    Mutation(
        "compiled exponentials make numbers of what is none",
        VECTORS_H,
        "return x != x ? x : x < all(-87.f)",
        "return x < all(-87.f)",
        COMPILED,
    ),
    Mutation(
        "compiled steps read memory at any token",
        STEP_CPP,
        "token[r] < 0 || token[r] >= m->vocabulary || ",
        "",
        COMPILED,
    ),
    Mutation(
        "compiled steps keep the weights of before", COMPILED_PY, "self._model = self._weights = None", "pass", COMPILED
    ),
    Mutation(
        "compiled steps look at slots that are gone",
        COMPILED_PY,
        "if slots is not self._slots:",
        "if self._slots is None:",
        COMPILED,
    ),
    Mutation(
        "compiled steps take models in bfloat16",
        COMPILED_PY,
        'kinds == {("cpu", torch.float32)}',
        'kinds <= {("cpu", torch.float32), ("cpu", torch.bfloat16)}',
        COMPILED,
    ),
    Mutation(
        "what lies in anybody's folder is run",
        COMPILER_PY,
        "seen.st_uid != os.getuid() or seen.st_mode & 0o022",
        "seen.st_uid != os.getuid()",
        COMPILED,
    ),
    Mutation(
        "compiled products have no biases",
        COMPILED_PY,
        "return self.plain(_padded(torch.cat([layer.bias for layer in layers]), 2 * self._lanes))",
        "return None",
        COMPILED,
    ),
    Mutation(
        "biases of gate and up are not interleaved",
        COMPILED_PY,
        "torch.stack(halves, dim=1)",
        "torch.stack(halves, dim=0)",
        COMPILED,
    ),
    Mutation(
        "threads score into one another's memory", STEP_CPP, "w.scores + me * up(m.room, W)", "w.scores", COMPILED
    ),
    Mutation(
        "slots count as looked at before they are",
        COMPILED_PY,
        "self._slots, model = None, self._model",
        "self._slots, model = slots, self._model",
        COMPILED,
    ),
    Mutation(
        "compiled steps write what the process takes for its default",
        COMPILED_PY,
        'return torch.empty(sizes, dtype=torch.float32, device="cpu")',
        "return torch.empty(sizes)",
        COMPILED,
    ),
    Mutation(
        "compiled steps are compared on two short rows alone",
        ENGINE_PY,
        "of = ((1, 8), (4, 9)) if self._compiled is None else ((1, 8), (4, 9), (2, 50), *[(3, 40)] * 13)",
        "of = ((1, 8), (4, 9))",
        COMPILED,
    ),
    Mutation("drawing takes an id that has no probability", DRAW_CPP, "if (e[lane] > 0) last", "last", DRAWN),
    Mutation(
        "drawing takes the id before",
        DRAW_CPP,
        "if (before > target) return last;",
        "if (before > target) return last - 1;",
        DRAWN,
    ),
    Mutation("drawing forgets the blocks before", DRAW_CPP, "before += sums[block++]", "block++", DRAWN),
    Mutation("drawing reads what is behind the last id", DRAW_CPP, "if (i + W <= N) return load", "return load", DRAWN),
    Mutation(
        "a drawn log-prob knows no temperature",
        DRAW_CPP,
        "row.logits[*token] / row.temperature",
        "row.logits[*token]",
        DRAWN,
    ),
    Mutation(
        "compiled code that draws something else is used",
        DRAW_PY,
        "if not all(self._is_right(ids, filters) for ids, filters in asked):",
        "if False:",
        DRAWN,
    ),
    Mutation("what is compiled does not know its headers", COMPILER_PY, 'source.parent.glob("*.h")', "[]", DRAWN),
    Mutation(
        "who wants no compiled code has it draw",
        ENGINE_PY,
        "self._make_draw() if compiled else None",
        "self._make_draw()",
        DRAWN,
    ),
    Mutation(
        "top-p stops before it is reached",
        DRAW_CPP,
        "if (sum >= wanted) end = middle;",
        "if (sum >= 0.9 * wanted) end = middle;",
        DRAWN,
    ),
    Mutation("top-k keeps one less", DRAW_CPP, "return some[k - 1];", "return some[k - 2];", DRAWN),
    Mutation(
        "top-p does not see what top-k has left",
        DRAW_CPP,
        "top_p * sum_from(least, 0)",
        "top_p * sum_from(-INFINITY, 0)",
        DRAWN,
    ),
    Mutation("filters hide what is no number", DRAW_CPP, "seen != seen) return 0;", "false) return 0;", DRAWN),
    Mutation(
        "equal ids stay in the order of their numbers",
        DRAW_CPP,
        "Candidate(e[i], i) >= edge",
        "e[i] > edge.first || (e[i] == edge.first && i <= edge.second)",
        DRAWN,
    ),
    Mutation(
        "a head adds many ids up as torch does",
        HEAD_PY,
        "return log_softmax(heated",
        "return torch.log_softmax(dim=-1, input=heated",
        HEAD,
    ),
    Mutation("many ids are added up as torch does", LOGPROBS_PY, "z.shape[-1] > MANY_IDS", "False", LOGPROBS),
    # ------------------------------------------------ weights on their way to the workers
    Mutation(
        "a tied head is not sent",
        WEIGHTS_PY,
        "dict(model.named_parameters(remove_duplicate=False))",
        "dict(model.named_parameters())",
        WEIGHTS,
    ),
    Mutation(
        "buffers are not sent",
        WEIGHTS_PY,
        "tensors.update(model.named_buffers(remove_duplicate=False))",
        "",
        WEIGHTS,
    ),
    Mutation(
        "the digest is of names and shapes alone",
        WEIGHTS_PY,
        "h.update(piece.data)",
        "pass",
        WEIGHTS,
    ),
    Mutation("the digest is not compared", RECEIVER_PY, "if self._digests[index] != sent:", "if False:", WEIGHTS),
    Mutation(
        "nobody looks whether the engine uses what arrived",
        RECEIVER_PY,
        "self._refuse_unused(manifest, arrived)",
        "pass",
        WEIGHTS,
    ),
    Mutation(
        "shared memory is written in place",
        RECEIVER_PY,
        "live.data = tensor.to(live.dtype, copy=not isinstance(live, torch.nn.Parameter))",
        "live.copy_(tensor)",
        WEIGHTS,
    ),
    Mutation(
        "two tensors of the sender go into one here",
        RECEIVER_PY,
        "sources.setdefault(live.data_ptr(), source) != source",
        "False",
        WEIGHTS,
    ),
    Mutation(
        "older weights replace newer ones",
        RECEIVER_PY,
        "if manifest.version < self.version:",
        "if False:",
        WEIGHTS,
    ),
    Mutation(
        "a missing tensor is left as it was",
        RECEIVER_PY,
        "if s.alias_of is None and s.name not in self._staged]",
        "if False]",
        WEIGHTS,
    ),
]

# Of the files that know how a forward pass is laid out.

OF_THE_LEARNER = [
    # ------------------------------------------------ what is sampled from, and what is trained
    Mutation(
        "the learner ignores which ids were kept",
        MODEL_PY,
        "kept=None if batch.kept is None else KeptSets.of(batch.kept, mask, device)",
        "kept=None",
        KEPT,
    ),
    Mutation(
        "the loss ignores which ids were kept, the old log-probs do not",
        HEAD_PY,
        "weight_c, bias_c, temperature, _left_out(kept, at, len(weight))",
        "weight_c, bias_c, temperature, None",
        KEPT_HEAD,
    ),
    Mutation(
        "each token has the kept ids of the one before it",
        KEPT_PY,
        "row[t] for row",
        "row[max(t - 1, 0)] for row",
        KEPT,
    ),
    Mutation(
        "the engine tells the log-prob of the unfiltered distribution",
        SAMPLING_PY,
        "of_kept = None if keep is None else keep.unsqueeze(1)",
        "of_kept = None",
        DRAWS,
    ),
    Mutation(
        "top-p leaves out the id that reaches it",
        SAMPLING_PY,
        "before < top_p",
        "(before + ascending < top_p) | (before == 0)",
        DRAWS,
    ),
    Mutation(
        "a mean of the means of micro-batches, policy",
        OBJECTIVE_PY,
        "return loss.sum() / normalizer, numbers",
        "return loss.sum() / mask.sum().clamp(min=1), numbers",
        INVARIANCE,
    ),
    Mutation(
        "a mean of the means of micro-batches, value",
        LEARNER_PY,
        "            normalizer=n_valid * n_heads,\n",
        "",
        INVARIANCE,
    ),
    Mutation(
        "no temperature in the log-probs of the policy",
        LEARNER_PY,
        "of_entropy, _ = self._engine(inputs, self.cfg.rollout.temperature)",
        "of_entropy, _ = self._engine(inputs, 1.0)",
        IDENTITY,
    ),
    Mutation(
        "no temperature in the log-probs of an update",
        LEARNER_PY,
        "            self.cfg.rollout.temperature,\n            token_loss,\n",
        "            1.0,\n            token_loss,\n",
        IDENTITY,
    ),
    Mutation(
        "no temperature in the log-probs of the reference",
        LEARNER_PY,
        "return self._ref.score(inputs, self.cfg.rollout.temperature)",
        "return self._ref.score(inputs, 1.0)",
        IDENTITY,
    ),
    Mutation(
        "the temperature divides values",
        MODEL_PY,
        "return first, self._values(inputs, states, after, value_only), entropy",
        "return first, self._values(inputs, states, after, value_only) / temperature, entropy",
        IDENTITY,
    ),
    Mutation(
        "the value is that of the state after the token",
        LEARNER_PY,
        "= of_states[:m].to(",
        "= of_states[1 : m + 1].to(",
        ALIGN,
    ),
    Mutation(
        "the bootstrap is read behind the padding",
        MODEL_PY,
        "after = hidden[torch.arange(len(hidden), device=hidden.device), inputs.response_lengths]",
        "after = hidden[:, -1]",
        MODEL,
    ),
    Mutation(
        "a response that stopped is bootstrapped too",
        LEARNER_PY,
        "torch.where(bootstrapped[:, None], after, 0.0)",
        "after if self.cfg.ppo.bootstrap_cut else 0.0 * after",
        ALIGN,
    ),
    Mutation(
        "logits score the token before them",
        MODEL_PY,
        "logits[:, :-1][inputs.mask]",
        "logits[:, 1:][inputs.mask]",
        PACKING,
    ),
    Mutation(
        "the learner counts positions from the padding on",
        MODEL_PY,
        "(mask.long().cumsum(-1) - 1).clamp(min=0)",
        "(torch.ones_like(mask).long().cumsum(-1) - 1).clamp(min=0)",
        PACKING,
    ),
    Mutation(
        "the learner attends to padding",
        MODEL_PY,
        '"attention_mask": mask.long()',
        '"attention_mask": torch.ones_like(mask).long()',
        PACKING,
    ),
    Mutation("dropout is on in training", LEARNER_PY, "self._engine.eval()", "self._engine.train()", IDENTITY),
    Mutation(
        "dropout is on in the reference",
        MODEL_PY,
        "            self._reader = CausalForward(lm, getattr(torch, config.dtype))\n",
        "            self._reader = CausalForward(lm, getattr(torch, config.dtype))\n            lm.train()\n",
        IDENTITY,
    ),
    Mutation(
        "the policy is its own reference",
        LEARNER_PY,
        'own = ref_lm if cfg.reference != "adapter" else None',
        "own = None",
        IDENTITY,
    ),
    Mutation(
        "old log-probs are the new ones",
        OBJECTIVE_PY,
        "        given.old_logprobs,\n        given.advantages,\n",
        "        logprobs.detach(),\n        given.advantages,\n",
        IDENTITY,
    ),
    Mutation(
        "the entropy is fined",
        OBJECTIVE_PY,
        "loss = loss - cfg.entropy_coef",
        "loss = loss + cfg.entropy_coef",
        IDENTITY,
    ),
    Mutation(
        "the weight of the value loss is ignored",
        LEARNER_PY,
        "(cfg.vf_coef if cfg.has_critic else 0.0) * vf_loss",
        "vf_loss",
        IDENTITY,
    ),
    Mutation(
        "gradients of one step stay for the next",
        LEARNER_PY,
        "        self._optimizer.zero_grad()\n",
        "",
        INVARIANCE,
    ),
    # ------------------------------------------------ one sequence without padding
    Mutation(
        "positions of a response begin at 0 again",
        PACKING_PY,
        "positions.append(np.arange(n_prompt, n_prompt + t))",
        "positions.append(np.arange(t))",
        PACKING,
    ),
    Mutation(
        "a response sees the first one of its prompt",
        PACKING_PY,
        "keys = np.where(in_prompt, prompts[:, None] + at, starts[:, None] + at - n_prompt[:, None])",
        "keys = prompts[:, None] + at",
        PACKING,
    ),
    Mutation(
        "a response sees the first one of its prompt, on a GPU",
        PACKING_PY,
        "np.r_[p : p + n, s : s + t]",
        "np.r_[p : p + n + t]",
        PACKING,
    ),
    Mutation(
        "a token sees the tokens after it",
        PACKING_PY,
        "mask = at[None, None, :] <= (n_prompt[:, None] + column)[:, :, None]",
        "mask = at[None, None, :] <= (n_prompt + lengths)[:, None, None] + 0 * column[None, :, None]",
        PACKING,
    ),
    Mutation(
        "a token is scored by the state that has seen it",
        PACKING_PY,
        "np.where(columns > 0, at - 1, lasts[rows])",
        "np.where(columns > 0, at, lasts[rows])",
        PACKING,
    ),
    Mutation(
        "the first token of the second sample follows the first sample",
        PACKING_PY,
        "np.where(columns > 0, at - 1, lasts[rows])",
        "at - 1",
        PACKING,
    ),
    Mutation(
        "the bootstrap value is that of the last token, not of the state behind it",
        PACKING_PY,
        "starts + n_responses - 1, lasts)",
        "starts + n_responses - 2, lasts)",
        PACKING,
    ),
    Mutation(
        "prompts that are alike with their padding are one",
        PACKING_PY,
        "ids[row, p - n_prompt : p].tobytes()",
        "ids[row, :p].tobytes()",
        PACKING,
    ),
    Mutation(
        "the padded path takes the state after each token",
        MODEL_PY,
        "return hidden[:, :-1][inputs.mask], after",
        "return hidden[:, 1:][inputs.mask], after",
        PACKING,
    ),
    Mutation(
        "values of a policy with its own logits are those of the first token",
        MODEL_PY,
        "self._own_hidden = args[0]",
        "self._own_hidden = args[0].flip(1)",
        PACKING,
    ),
    # ------------------------------------------------ the head
    Mutation(
        "the sign of the entropy in d logits",
        HEAD_PY,
        "mul_(-h[:, None])",
        "mul_(h[:, None])",
        HEAD,
    ),
    Mutation(
        "the entropy is missing in its own derivative",
        HEAD_PY,
        "logp.add_(e[:, None]).mul_(",
        "logp.mul_(",
        HEAD,
    ),
    Mutation(
        "no temperature in d logits",
        HEAD_PY,
        "return d.div_(temperature) if temperature != 1.0 else d",
        "return d",
        HEAD,
    ),
    Mutation(
        "no temperature in the head",
        HEAD_PY,
        "logits / temperature if temperature != 1.0 else logits",
        "logits",
        HEAD,
    ),
    Mutation(
        "the last, smaller chunk of a loss is dropped",
        HEAD_PY,
        "range(0, max(1, len(states)), size)",
        "range(0, max(1, len(states) - size + 1), size)",
        HEAD,
    ),
    Mutation(
        "the last, smaller chunk of scores is dropped",
        HEAD_PY,
        "range(0, len(states), size)",
        "range(0, len(states) - size + 1, size)",
        HEAD,
    ),
    Mutation(
        "the gradient of the head is that of its last chunk",
        HEAD_PY,
        "d_weight.addmm_(d_logits.T, states[at])",
        "torch.mm(d_logits.T, states[at], out=d_weight)",
        HEAD,
    ),
    Mutation(
        "the gradient of the head is that of its last chunk, under autocast",
        HEAD_PY,
        "d_weight.add_(d_logits.T @ states[at])",
        "d_weight.copy_(d_logits.T @ states[at])",
        HEAD,
    ),
    Mutation(
        "the gradient of the bias is that of its last chunk",
        HEAD_PY,
        "d_bias.add_(d_logits.sum(0))",
        "d_bias.copy_(d_logits.sum(0))",
        HEAD,
    ),
    Mutation(
        "what comes from above is left out of the gradient",
        HEAD_PY,
        "x.mul_(upstream.to(x.dtype))",
        "x",
        HEAD,
    ),
    Mutation(
        "all chunks read the fields of the first",
        LEARNER_PY,
        "policy_objective(logprobs, entropy, known[at], cfg, n_valid)",
        "policy_objective(logprobs, entropy, known[: len(logprobs)], cfg, n_valid)",
        INVARIANCE,
    ),
    # ------------------------------------------------ ranks, warm-up
    Mutation(
        "the row of an idle rank counts",
        BATCH_PY,
        "return replace(row, input_ids=ids, prompt_lengths=torch.ones_like(row.prompt_lengths))",
        "one = torch.ones_like(row.prompt_lengths)\n        return replace("
        "row, input_ids=ids, prompt_lengths=one, response_lengths=one, response_mask=row.response_mask | True)",
        INVARIANCE,
    ),
    Mutation(
        "the denominator is that of one rank",
        LEARNER_PY,
        "max(1.0, float(sum(n for _, n in of_ranks)))",
        "max(1.0, float(mine and batch.response_mask[np.concatenate(mine)].sum()))",
        INVARIANCE,
    ),
    Mutation(
        "gradients that are averaged over ranks are not multiplied by them",
        LEARNER_PY,
        "                self._accelerator.backward(loss * self.ranks.size)\n        norm",
        "                self._accelerator.backward(loss)\n        norm",
        INVARIANCE,
    ),
    Mutation(
        "in warm-up the value loss moves the trunk",
        MODEL_PY,
        'self.value == "shared_detached" or value_only:',
        'self.value == "shared_detached":',
        IDENTITY,
    ),
    Mutation(
        "in warm-up the policy loss moves the trunk",
        LEARNER_PY,
        "return loss * 0.0 if warming else loss, sums",
        "return loss, sums",
        IDENTITY,
    ),
    Mutation(
        "a detached value head moves the trunk",
        MODEL_PY,
        'elif self.value == "shared_detached" or value_only:',
        "elif value_only:",
        IDENTITY,
    ),
    # ------------------------------------------------ adapters
    Mutation(
        "the reference is computed with the adapter",
        MODEL_PY,
        "with adapters.active(self.lm, None):",
        'with adapters.active(self.lm, "policy"):',
        IDENTITY,
    ),
    Mutation(
        "an adapter is not merged into the weights that are sent",
        EXPORT_PY,
        "merged = whole + torch.mm(*factors).to(whole.dtype) if factors else whole",
        "merged = whole",
        WEIGHTS,
    ),
    Mutation(
        "alpha is left out of an adapter that is sent",
        EXPORT_PY,
        'b = b.detach().float() * layer.scaling["policy"]',
        "b = b.detach().float()",
        WEIGHTS,
    ),
    Mutation(
        "an adapter of transposed weights is sent as if they were not",
        EXPORT_PY,
        "(a.T, b.T) if layer.fan_in_fan_out else (b, a)",
        "(b, a)",
        WEIGHTS,
    ),
    Mutation(
        "an adapter is added to what the last one left",
        RECEIVER_PY,
        "self.version, self._manifest, self._staged = manifest.version, None, {}",
        "self.version, self._manifest, self._staged, self._loaded = manifest.version, None, {}, {}",
        WEIGHTS,
    ),
]


def copy(folder: Path) -> None:
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "golden", "e2e"))
        else:
            shutil.copy(ROOT / name, folder / name)


def stale(mutations: list[Mutation]) -> list[str]:
    """One line for each mutation whose old text is not in its file exactly once."""
    lines = []
    for m in mutations:
        file = ROOT / m.file
        found = file.read_text(encoding="utf-8").count(m.old) if file.is_file() else 0
        if found != 1:
            lines.append(f"stale mutation {m.name!r}: {m.file} has its old text {found} times: {m.old.strip()!r}")
    return lines


def run_tests(folder: Path, tests: tuple[str, ...], output: Path) -> int:
    """In a forked process: pytest on the sources in `folder`, up to the first failure. Returns its exit code."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    ours = {str(ROOT), str(ROOT / "tests"), ""}
    sys.path[:] = [str(folder), str(folder / "tests"), *(p for p in sys.path if p not in ours)]
    import pytest

    import core

    if not Path(core.__file__).is_relative_to(folder):
        print(f"core comes from {core.__file__}, not from the copy")
        return 99
    return int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not slow", *tests]))


def side_by_side(jobs: list[tuple[Mutation | None, tuple[str, ...]]]) -> Iterator[tuple[int, int | None, str, float]]:
    """Fork a process for each (mutation, tests), `AT_A_TIME` at once. Yields as they end: number, exit code, output,
    seconds; the exit code is None for one that was ended because its time was over."""
    running: dict[int, tuple[int, Path, float]] = {}
    waiting = list(enumerate(jobs))
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        while waiting or running:
            while waiting and len(running) < AT_A_TIME:
                number, (mutation, tests) = waiting.pop(0)
                folder = Path(name) / str(number)
                copy(folder)
                if mutation is not None:
                    file = folder / mutation.file
                    text = file.read_text(encoding="utf-8")
                    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
                sys.stdout.flush()
                pid = os.fork()
                if pid == 0:
                    code = 98
                    try:
                        code = run_tests(folder, tests, folder / "output")
                        sys.stdout.flush()
                    finally:
                        os._exit(code)
                running[pid] = (number, folder, time.monotonic())
            time.sleep(0.05)
            for pid, (number, folder, start) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                seconds = time.monotonic() - start
                code = os.waitstatus_to_exitcode(status) if ended else None
                if not ended:
                    if seconds < TIMEOUT_S:
                        continue
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                output = (folder / "output").read_text(encoding="utf-8", errors="replace")
                shutil.rmtree(folder)
                yield number, code, output, seconds


def main(words: list[str]) -> int:
    mutations = [m for m in MUTATIONS + OF_THE_LEARNER if not words or any(word in m.name for word in words)]
    if problems := stale(mutations):
        print("\n".join(problems))
        return 1
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    for library in LIBRARIES:
        importlib.import_module(library)
    for plugin in importlib.metadata.entry_points(group="pytest11"):  # each child would import them all
        plugin.load()
    gc.collect()
    gc.freeze()  # pytest collects garbage three times, through all that is imported here
    tests = sorted({test for m in mutations for test in m.tests})
    for number, code, output, _ in side_by_side([(None, (test,)) for test in tests]):
        if code != 0:
            print(f"without any mutation {tests[number]} must pass (exit code {code}):\n{output[-3000:]}")
            return 1
    print(f"without any mutation all of {', '.join(tests)} pass", flush=True)
    caught = 0
    for number, code, output, seconds in side_by_side([(m, m.tests) for m in mutations]):
        mutation = mutations[number]
        failed = re.search(r"^FAILED (\S+::.+?)(?: - | call after |$)", output, flags=re.MULTILINE)
        if code == 1 and failed:
            caught += 1
            how = f"caught by {failed[1]}"
        else:
            how = f"NOT CAUGHT by {', '.join(mutation.tests)} (exit code {code})"
        print(f"{mutation.name}: {how} in {seconds:.1f} s", flush=True)
    print(f"{caught} of {len(mutations)} caught")
    return 0 if mutations and caught == len(mutations) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
