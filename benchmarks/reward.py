"""What scoring costs: tokens per second in process, through Ray and over HTTP; and how much of a slow reward is hidden.

    python benchmarks/reward.py                  # all of it, about five minutes
    python benchmarks/reward.py --only overlap   # or speed, codec
    python benchmarks/reward.py --rounds 3 --tokens 8192

Ways to score are timed in turns, round by round, on the same responses; figures are medians, and ratios are medians of
the ratios within a round, so that a busy machine slows all of them alike.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from train_command import CARDS, ROOT, circumstances, table, train

from core.faults import RewardFault
from core.schema import RewardConfig
from launch import cluster
from reward_server import wire
from reward_server.components import ScoreRequest
from reward_server.scorer import Scorer

LATENCY_S = 1.0
CHUNK, CHUNKS = 32, 32  # of one step of the overlap runs
WARM_UP_STEPS = 2


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; every way has had one call before."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def responses(tokens: int, each: int = 1024) -> ScoreRequest:
    """So many tokens in responses of `each`, as an engine would hand them over: four characters a token."""
    rng, n = np.random.default_rng(0), tokens // each
    offsets = np.stack([np.arange(each) * 4, np.arange(1, each + 1) * 4], axis=1)
    return ScoreRequest(
        prompts=["State the facts of the card."] * n,
        completions=["".join(rng.choice(list("abcdefghij klmno"), each * 4)) for _ in range(n)],
        prompt_ids=[rng.integers(0, 50_000, 64).tolist() for _ in range(n)],
        completion_ids=[rng.integers(0, 50_000, each).tolist() for _ in range(n)],
        offsets=[offsets] * n,
        finish_reasons=["stop"] * n,
        uids=[f"{i:032x}" for i in range(n)],
        columns={"card": [{"name": "Ada", "born": 1815}] * n},
    )


NAMES = ("a", "b", "c")
REWARDS = Path(__file__).with_name("timed_rewards.py")
CONSTANT = f"{REWARDS}:constant"


def speed(tokens: int, rounds: int) -> str:
    """Tokens per second of three components in process, in a Ray actor, and over HTTP on loopback."""
    import ray

    request = responses(tokens)
    rewards = {name: RewardConfig(fn=CONSTANT) for name in NAMES}
    scorer = Scorer(rewards)
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "rewards.yaml"
        config.write_text("rewards:\n" + "".join(f"  {name}: {{fn: '{CONSTANT}'}}\n" for name in NAMES))
        cluster.prepare_environment()
        ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", object_store_memory=200 * 2**20)
        actor = ray.remote(Scorer).options(num_cpus=0).remote(rewards)
        command = [sys.executable, "-m", "tokenppo", "serve-reward", "--config", str(config), "--port", "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            assert server.stdout is not None
            url = server.stdout.readline().rsplit(" ", 1)[1].strip()
            remote = {
                form: Scorer({n: RewardConfig(fn=url, options={"format": form}) for n in NAMES})
                for form in ("arrow", "json")
            }
            ways = {
                "in process": lambda: scorer.score(request),
                "Ray actor": lambda: ray.get(actor.score.remote(request), timeout=60),
                "HTTP, Arrow": lambda: remote["arrow"].score(request),
                "HTTP, JSON": lambda: remote["json"].score(request),
            }
            seconds = in_turns(ways, rounds)
            want = scorer.score(request)
            for form in remote.values():
                for name, answers in form.score(request).items():
                    for a, b in zip(answers, want[name], strict=True):
                        assert not isinstance(a, RewardFault) and a[0].tobytes() == b[0].tobytes()
                form.close()
        finally:
            server.terminate()
            server.wait(20)
            ray.shutdown()
    lines = [
        [way, f"{1000 * statistics.median(s):.1f}", f"{tokens / statistics.median(s):,.0f}"]
        for way, s in seconds.items()
    ]
    arrow = statistics.median(seconds["HTTP, Arrow"])
    base = statistics.median(seconds["in process"])
    return "\n".join(
        [
            f"{tokens:,} tokens in {len(request)} responses, {len(NAMES)} components that cost nothing",
            table(["way", "ms a request", "tokens/s"], lines),
            "",
            f"overhead of HTTP with Arrow over scoring in process: {1000 * (arrow - base):.1f} ms (limit 15 ms)",
        ]
    )


def codec(tokens: int, rounds: int) -> str:
    """Encoding and decoding a request and its answer, both sides together, Arrow against JSON."""
    request = responses(tokens)
    answers = Scorer({n: RewardConfig(fn=CONSTANT) for n in NAMES}).score(request)

    def both(kind: str) -> None:
        asked, names = wire.decode_request(wire.encode_request(request, list(NAMES), kind), kind, list(NAMES))
        wire.decode_answer(wire.encode_answer(asked, answers, kind, "1"), kind, request, names)

    seconds = in_turns({"Arrow": lambda: both(wire.ARROW), "JSON": lambda: both(wire.JSON)}, rounds)
    ratio = statistics.median(j / a for j, a in zip(seconds["JSON"], seconds["Arrow"], strict=True))
    lines = [[kind, f"{1000 * statistics.median(s):.1f}"] for kind, s in seconds.items()]
    return "\n".join(
        [
            f"{tokens:,} tokens, {len(NAMES)} components: encode and decode request and answer, with all checks",
            table(["format", "ms"], lines),
            "",
            f"Arrow is {ratio:.1f} times as fast as JSON (wanted: 10)",
        ]
    )


def overlap(steps: int) -> str:
    """Iterations with and without a second of latency on the first chunk of each step, while others are written."""
    totals: dict[float, list[float]] = {}
    waits: dict[float, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn, delay in enumerate((0.0, LATENCY_S, 0.0, LATENCY_S)):
            settings = {
                "run.steps": steps,
                "run.eval_every": steps,
                "data.eval_path": "null",
                "rollout.workers": 1,
                "rollout.batch_size": CHUNK * CHUNKS,
                "rollout.chunk_size": CHUNK,
                "ppo.mini_batch_size": CHUNK * CHUNKS // 4,
                "ppo.ppo_epochs": 1,
                "log.trackers": "[]",
                "rewards.late.fn": f"{REWARDS}:FirstChunkLate",
                "rewards.late.weight": 0,
                "rewards.late.options.delay_s": delay,
                "rewards.late.options.chunks": CHUNKS,
            }
            run = train(Path(scratch) / f"turn-{turn}", CARDS, settings)
            if run.exit_code:
                print(run.last_words, file=sys.stderr)
                raise SystemExit(run.exit_code)
            rows = run.rows[WARM_UP_STEPS:]
            totals.setdefault(delay, []).extend(row["time/total"] for row in rows)
            waits.setdefault(delay, []).extend(row["time/reward"] for row in rows)
    median = {delay: statistics.median(values) for delay, values in totals.items()}
    grown = median[LATENCY_S] - median[0.0]
    lines = [
        [f"{delay:g} s", f"{median[delay]:.3f}", f"{statistics.median(waits[delay]):.3f}", str(len(totals[delay]))]
        for delay in sorted(totals)
    ]
    return "\n".join(
        [
            table(["latency", "iteration", "waiting for scores", "steps"], lines),
            "",
            f"{LATENCY_S:g} s of latency while rollouts run lengthens an iteration by {grown:+.3f} s:"
            f" {grown / LATENCY_S:.1%} of it (limit 10 %)",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("speed", "codec", "overlap"), help="one part")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a request, default 65536")
    parser.add_argument("--rounds", type=int, default=15, help="of speed and codec")
    parser.add_argument("--steps", type=int, default=8, help=f"of each overlap run; {WARM_UP_STEPS} are left out")
    args = parser.parse_args()
    print(circumstances(), "\n")
    parts = {
        "speed": lambda: speed(args.tokens, args.rounds),
        "codec": lambda: codec(args.tokens, args.rounds),
        "overlap": lambda: overlap(args.steps),
    }
    for name, part in parts.items():
        if args.only in (None, name):
            print(part(), "\n", sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
