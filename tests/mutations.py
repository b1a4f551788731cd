"""Bugs that RLHF trainers have had, put back one at a time into a copy of this code: the tests must notice each.

    python tests/mutations.py                   # all, in minutes; exit code 1 if one gets through
    python tests/mutations.py whiten bootstrap  # those with such a word in their name

A mutation is an exact text replacement. Its old text must stand in its file exactly once; where code was changed so
that it does not, the script stops and names the mutation, which then wants the same bug in the words of the new code.
First the tests run on the copy as it is and must pass, so what fails later fails because of the mutation. A test that
cannot even be collected has caught nothing.

Each mutation has a copy and a process of its own. The process is forked from this one, which has imported the libraries
(and nothing of ours), or most of the time would go into importing torch sixty times.
"""

import importlib
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
    "hypothesis",
    "numpy",
    "pydantic",
    "yaml",
    "pytest",
)

ALIGN, INVARIANCE, IDENTITY = ("tests/test_align.py",), ("tests/test_invariance.py",), ("tests/test_identity.py",)
POISON, ENGINE = ("tests/test_poison.py",), ("tests/test_engine.py",)
WEIGHTS, COMBINE, BATCH = ("tests/test_weights.py",), ("tests/test_combine.py",), ("tests/test_batch.py",)
PPO, LOGPROBS = ("tests/test_ppo.py",), ("tests/test_logprobs.py",)
LEARN = ("tests/test_learn.py::test_a_token_for_each_position_is_learnt",)


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


BATCH_PY, PPO_PY, LOOP_PY = "trainer/batch.py", "trainer/ppo.py", "trainer/loop.py"
COMBINE_PY, WEIGHTS_PY, RECEIVER_PY = "core/combine.py", "core/weights.py", "rollout/weight_receiver.py"
LOGPROBS_PY, ENGINE_PY = "core/logprobs.py", "rollout/engines/transformers_engine.py"

MUTATIONS = [
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
        "for start in range(0, len(index), size))",
        "for start in range(0, max(1, len(index) - size + 1), size))",
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
        "advantage = torch.where(valid, delta + gamma * gae_lambda * advantage, advantage)",
        "advantage = delta + gamma * gae_lambda * advantage",
        ALIGN,
    ),
    Mutation(
        "GAE reads the values of masked tokens",
        PPO_PY,
        "next_value = torch.where(valid, values[:, t], next_value)",
        "next_value = values[:, t]",
        ALIGN,
    ),
    Mutation(
        "gamma is forgotten at the next value",
        PPO_PY,
        "delta = rewards[:, t] + gamma * next_value - values[:, t]",
        "delta = rewards[:, t] + next_value - values[:, t]",
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
        "bootstrap_values=batch.bootstrap_values,",
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
        "        rewards,\n        batch.values,",
        "        batch.token_rewards,\n        batch.values,",
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
        "ppo.whiten(advantages, batch.response_mask, all_reduce=all_reduce)",
        "ppo.whiten(advantages, batch.response_mask)",
        INVARIANCE,
    ),
    Mutation("advantages are not whitened", LOOP_PY, "if cfg.ppo.whiten_advantages:", "if False:", ALIGN),
    Mutation(
        "returns are made from whitened advantages",
        LOOP_PY,
        "batch.fill(rewards=rewards, returns=returns, advantages=advantages)",
        "batch.fill(rewards=rewards, returns=advantages + batch.values, advantages=advantages)",
        ALIGN,
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
        "logp = _log_softmax(logits, temperature)",
        "logp = _log_softmax(logits, 1.0)",
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
        ENGINE_PY,
        "logprobs_from_logits(logits.unsqueeze(1), token, temperature)",
        "logprobs_from_logits(logits.unsqueeze(1), token, 1.0)",
        ENGINE,
    ),
    Mutation(
        "no temperature in the sampling",
        ENGINE_PY,
        "torch.softmax(logits.double() / temperature, dim=-1)",
        "torch.softmax(logits.double(), dim=-1)",
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
        ENGINE_PY,
        "(request.ordinal << 20) | request.k",
        "(request.ordinal << 20)",
        IDENTITY,
    ),
    Mutation(
        "the stop token is no part of the response",
        ENGINE_PY,
        "lengths[rows[ended]] = True, t + 1",
        "lengths[rows[ended]] = True, t",
        ENGINE,
    ),
    Mutation("a cut response says that it stopped", ENGINE_PY, '"stop" if stop else "length"', '"stop"', ENGINE),
    Mutation(
        "the tokenizer's eos ends no response",
        ENGINE_PY,
        " | {tokenizer_eos}\n",
        "\n",
        ENGINE,
    ),
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
        "h.update(_bytes(tensors[spec.name]).data)",
        "pass",
        WEIGHTS,
    ),
    Mutation("the digest is not compared", RECEIVER_PY, "if received != manifest.digest:", "if False:", WEIGHTS),
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
LEARNER_PY, MODEL_PY = "trainer/learner.py", "trainer/model.py"

OF_THE_LEARNER = [
    Mutation(
        "a mean of the means of micro-batches, policy",
        PPO_PY,
        "(count if normalizer is None else normalizer), stats",
        "count, stats",
        INVARIANCE,
    ),
    Mutation(
        "a mean of the means of micro-batches, value",
        PPO_PY,
        "(mask.sum().clamp(min=1) if normalizer is None else normalizer), stats",
        "mask.sum().clamp(min=1), stats",
        INVARIANCE,
    ),
    Mutation(
        "no temperature in the log-probs of the policy",
        LEARNER_PY,
        "micro, self.cfg.rollout.temperature, with_entropy=True)",
        "micro, 1.0, with_entropy=True)",
        IDENTITY,
    ),
    Mutation(
        "no temperature in the log-probs of an update",
        LEARNER_PY,
        "micro, self.cfg.rollout.temperature, with_entropy=cfg.entropy_coef > 0)",
        "micro, 1.0, with_entropy=cfg.entropy_coef > 0)",
        IDENTITY,
    ),
    Mutation(
        "no temperature in the log-probs of the reference",
        LEARNER_PY,
        "micro.input_ids[:, -t:], self.cfg.rollout.temperature)",
        "micro.input_ids[:, -t:], 1.0)",
        IDENTITY,
    ),
    Mutation(
        "the temperature divides values",
        MODEL_PY,
        ".squeeze(-1)  # no temperature here",
        ".squeeze(-1) / temperature",
        IDENTITY,
    ),
    Mutation(
        "the value is that of the state after the token",
        LEARNER_PY,
        "values[at, :t], entropy[at, :t] = out.values[:, :-1]",
        "values[at, :t], entropy[at, :t] = out.values[:, 1:]",
        ALIGN,
    ),
    Mutation(
        "the bootstrap is read behind the padding",
        LEARNER_PY,
        "out.values.gather(1, micro.response_lengths[:, None]).squeeze(1)",
        "out.values[:, -1]",
        ALIGN,
    ),
    Mutation(
        "a response that stopped is bootstrapped too",
        LEARNER_PY,
        "torch.where(batch.cut, after, 0.0) if",
        "after if",
        ALIGN,
    ),
    Mutation(
        "logits score the token before them",
        MODEL_PY,
        "return logits[:, :-1], hidden",
        "return logits[:, 1:], hidden",
        ALIGN,
    ),
    Mutation(
        "the learner counts positions from the padding on",
        MODEL_PY,
        "(mask.long().cumsum(-1) - 1).clamp(min=0)",
        "(torch.ones_like(mask).long().cumsum(-1) - 1).clamp(min=0)",
        ALIGN,
    ),
    Mutation(
        "the learner attends to padding",
        MODEL_PY,
        "attention_mask=mask.long()",
        "attention_mask=torch.ones_like(mask).long()",
        ALIGN,
    ),
    Mutation("dropout is on in training", LEARNER_PY, "self._engine.eval()", "self._engine.train()", IDENTITY),
    Mutation(
        "dropout is on in the reference",
        LEARNER_PY,
        "ref_lm.to(self.device).eval().requires_grad_(False)",
        "ref_lm.to(self.device).train().requires_grad_(False)",
        IDENTITY,
    ),
    Mutation(
        "the policy is its own reference",
        LEARNER_PY,
        "ref_lm.to(self.device).eval().requires_grad_(False)",
        "lm",
        IDENTITY,
    ),
    Mutation(
        "old log-probs are the new ones",
        LEARNER_PY,
        "            micro.old_logprobs,\n",
        "            out.logprobs.detach(),\n",
        IDENTITY,
    ),
    Mutation(
        "the entropy is fined",
        LEARNER_PY,
        "loss = loss - cfg.entropy_coef",
        "loss = loss + cfg.entropy_coef",
        IDENTITY,
    ),
    Mutation(
        "the weight of the value loss is ignored",
        LEARNER_PY,
        "loss = pg_loss + cfg.vf_coef * vf_loss",
        "loss = pg_loss + vf_loss",
        IDENTITY,
    ),
    Mutation(
        "gradients of one step stay for the next",
        LEARNER_PY,
        "        self._optimizer.zero_grad()\n",
        "",
        INVARIANCE,
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
    tests = sorted({test for m in mutations for test in m.tests})
    for number, code, output, _ in side_by_side([(None, (test,)) for test in tests]):
        if code != 0:
            print(f"without any mutation {tests[number]} must pass (exit code {code}):\n{output[-3000:]}")
            return 1
    print(f"without any mutation all of {', '.join(tests)} pass", flush=True)
    caught = 0
    for number, code, output, seconds in side_by_side([(m, m.tests) for m in mutations]):
        mutation = mutations[number]
        failed = re.search(r"^FAILED (\S+::.+?)(?: - |$)", output, flags=re.MULTILINE)
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
