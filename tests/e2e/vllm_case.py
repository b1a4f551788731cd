"""vLLM in its own interpreter, started by test_vllm.py: writes responses before, amid and after a weight update.

    python tests/e2e/vllm_case.py FOLDER        reads FOLDER/case.pickle, writes FOLDER/answers.pickle

Answers are judged by the one who asked, with another transformers and without vLLM.
"""

import pickle
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from core.faults import TransitFault  # noqa: E402
from rollout.engines.engine import Begun, Generation  # noqa: E402
from rollout.engines.vllm_engine import VLLMEngine  # noqa: E402
from rollout.weight_receiver import WeightReceiver  # noqa: E402


def receive(receiver: WeightReceiver, case: dict, buckets: list) -> None:
    receiver.begin(case["manifest"])
    for index, pieces in enumerate(buckets):
        receiver.receive(index, pieces)
    receiver.commit(case["digests"])


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    case = pickle.loads((folder / "case.pickle").read_bytes())
    engine = VLLMEngine.load(str(folder / "old"), case["stop"], **case["engine"])
    receiver = WeightReceiver(engine.live_tensors)
    answers: dict[str, object] = {"names": list(engine.live_tensors())}

    def written(begun: bool = False) -> dict[float, list[Generation]]:
        by_temperature = {}
        for engine.temperature in case["temperatures"]:
            generations = engine.generate(case["requests"])
            if begun:  # by halves: what was there, and the rest
                starts = [len(g.response_ids) // 2 for g in generations]
                generations = engine.generate(
                    case["requests"],
                    [
                        Begun(response_ids=g.response_ids[:n], logprobs=g.logprobs[:n]) if n else None
                        for g, n in zip(generations, starts, strict=True)
                    ],
                )
            by_temperature[engine.temperature] = generations
        return by_temperature

    def probe() -> dict[float, object]:
        by_temperature = {}
        for engine.temperature in case["temperatures"]:
            by_temperature[engine.temperature] = engine.logprobs(*case["probe"])
        return by_temperature

    answers["before"], answers["probe before"] = written(), probe()
    broken = [[piece.copy() for piece in bucket] for bucket in case["buckets"]]
    broken[-1][0][0] ^= 1
    try:
        receive(receiver, case, broken)
    except TransitFault as refusal:
        answers["refusal"] = str(refusal)
    engine.use_weights()  # not even now
    answers["amid"] = written()
    receive(receiver, case, case["buckets"])
    engine.use_weights()
    answers["after"], answers["probe after"] = written(), probe()
    answers["begun"] = written(begun=True)
    # Of each as it came: its place, and how many vLLM still writes.
    answers["came"] = [
        (i, engine._llm.llm_engine.get_num_unfinished_requests()) for i, _ in engine.stream(case["requests"])
    ]
    (folder / "answers.pickle").write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
