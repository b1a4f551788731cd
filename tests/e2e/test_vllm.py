"""The real vLLM, in the environment that launch/vllm_venv.sh makes, against a plain forward of transformers here."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import tiny_models
from cards_run import CARDS, ROOT, Run
from core.config import load
from core.trajectory import PromptRequest, sample_uid
from core.weights import named_tensors
from launch import interpreter
from weight_delivery import packed

# Making the environment takes minutes, once.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STOP = (0, 7, *range(10, 20))
LONGEST = 24


@pytest.fixture(scope="module")
def vllm_python() -> str:
    made = subprocess.run(
        ["bash", str(ROOT / "launch" / "vllm_venv.sh")],
        env=os.environ | {"LEARNER_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert made.returncode == 0, made.stderr
    return made.stdout.splitlines()[-1]


def test_the_interpreter_has_what_a_worker_wants(vllm_python, tmp_path):
    """And what is taken for certain about it before anything starts is so."""
    folder = tiny_models.save_model(tmp_path / "m")
    cfg = load(
        None,
        {
            "model.path": str(folder),
            "data.path": "d.jsonl",
            "rewards.a.fn": "r.py:f",
            "rollout.engine": "vllm",
            "rollout.python": vllm_python,
        },
    )
    interpreter.refuse(cfg, None)
    code = (
        "import rollout.worker, core.pretrained, rollout.engines.vllm_engine\n"
        "from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend\n"
        "print(CPUAttentionBackend.get_supported_head_sizes())"
    )
    said = subprocess.run([vllm_python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout.splitlines()[-1]) == list(interpreter.CPU_HEAD_SIZES)


def model(name: str, seed: int) -> torch.nn.Module:
    """As tiny_models has it, with heads as wide as vLLM wants them on a CPU."""
    config = tiny_models.configs()[name]
    config.hidden_size, config.num_attention_heads, config.head_dim = 64, 2, 32
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made.eval()


def requests(n: int) -> list[PromptRequest]:
    """Prompts of 2 to 8 tokens, and every fourth of 130 and more: from 128 on vLLM keeps keys and values for others."""
    rng = np.random.default_rng(5)
    lengths = [130 + i % 7 if i % 4 == 0 else 2 + i % 7 for i in range(n)]
    return [
        PromptRequest(
            ordinal=i,
            k=0,
            sample_uid=sample_uid("t", i, 0),
            prompt_ids=rng.integers(1, tiny_models.VOCABULARY, size=length),
            columns={"prompt": ""},
            seed=0,
        )
        for i, length in enumerate(lengths)
    ]


def of_a_plain_forward(lm: torch.nn.Module, prompt: np.ndarray, response: np.ndarray, temperature: float) -> np.ndarray:
    """One row, no padding, no cache, float64 after the logits: [T]."""
    ids, n = torch.from_numpy(np.concatenate([prompt, response]))[None], len(response)
    with torch.no_grad():
        logits = lm(input_ids=ids, logits_to_keep=n + 1).logits[0, :-1].double()
    return (logits / temperature).log_softmax(-1).gather(-1, ids[0, -n:, None])[:, 0].numpy()


def ask(
    folder: Path, python: str, old: torch.nn.Module, new: torch.nn.Module, n: int, temperatures: list[float], ranks: int
) -> tuple[dict, dict]:
    """The case that was asked, and the answers of tests/e2e/vllm_case.py to it."""
    old.save_pretrained(folder / "old")
    # Were one of these used, hardly a log-prob would be the softmax's; 9 and 11 would end responses, or not.
    (folder / "old" / "generation_config.json").write_text(
        '{"do_sample": true, "top_p": 0.1, "top_k": 2, "repetition_penalty": 3.0, "min_new_tokens": 9,'
        ' "temperature": 0.2, "eos_token_id": [9]}'
    )
    manifest, buckets, digests = packed(named_tensors(new), 7, 20_000)
    case = {
        "stop": STOP,
        "engine": {
            "dtype": "float32",
            "device": "cpu",
            "temperature": 1.0,
            "max_new_tokens": LONGEST,
            "max_prompt_tokens": 140,
            "requests": 64,
            "tensor_parallel_size": ranks,
        },
        "requests": requests(n),
        "temperatures": temperatures,
        "probe": (np.arange(5, 15)[None], np.arange(20, 52)[None] % 50),
        "manifest": manifest,
        "buckets": buckets,
        "digests": digests,
    }
    (folder / "case.pickle").write_bytes(pickle.dumps(case))
    done = subprocess.run(
        [python, str(ROOT / "tests" / "e2e" / "vllm_case.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return case, pickle.loads((folder / "answers.pickle").read_bytes())


@pytest.mark.parametrize(
    ("name", "n", "temperatures", "ranks"),
    [
        ("llama-tied", 84, [0.7, 1.0, 1.3], 1),  # 1,008 responses
        ("qwen3-untied", 84, [0.7, 1.0, 1.3], 1),
        ("llama-tied", 40, [0.7], 2),
    ],
    ids=["tied", "untied", "two-ranks"],
)
def test_logprobs_are_those_of_a_plain_forward_before_and_after_an_update(
    tmp_path, vllm_python, name, n, temperatures, ranks
):
    old, new = model(name, 1), model(name, 2)
    case, got = ask(tmp_path, vllm_python, old, new, n, temperatures, ranks)
    assert got["names"] == list(named_tensors(new))  # what the learner's manifest is compared with
    assert "damaged" in got["refusal"]
    seen = 0
    for when, lm in (("before", old), ("amid", old), ("after", new), ("begun", new)):
        for temperature in temperatures:
            worst = 0.0
            for request, g in zip(case["requests"], got[when][temperature], strict=True):
                want = of_a_plain_forward(lm, request.prompt_ids, g.response_ids, temperature)
                worst = max(worst, float(np.abs(want - g.logprobs).max()))
                ids, seen = g.response_ids.tolist(), seen + 1
                assert len(g.logprobs) == len(ids) <= LONGEST and not {*STOP} & {*ids[:-1]}
                assert g.finish_reason == ("stop" if ids[-1] in STOP else "length")
                assert g.finish_reason == "stop" or len(ids) == LONGEST
            assert worst < 1e-5, (when, temperature, worst)
            lengths = [len(g.response_ids) for g in got[when][temperature]]
            assert len({*lengths}) > 6 and LONGEST in lengths
    assert seen == 4 * n * len(temperatures)
    for when, lm in (("before", old), ("after", new)):
        for temperature in temperatures:
            want = of_a_plain_forward(lm, case["probe"][0][0], case["probe"][1][0], temperature)
            np.testing.assert_allclose(got[f"probe {when}"][temperature][0], want, atol=1e-5)
    # Each came when it was over, while others were written.
    places, others = zip(*got["came"], strict=True)
    assert sorted(places) == [*range(n)] and others[0] > n // 2 and others[-1] == 0
    # Other weights, or the comparisons above would say little.
    assert np.abs(got["probe before"][temperatures[0]] - got["probe after"][temperatures[0]]).max() > 0.1


def with_wider_heads(source: Path, target: Path, width: int) -> None:
    """The same function with heads of `width`, zero where they were not: rotations keep their speeds, scores their
    size. vLLM has no heads of 24, as cards' base has them, on a CPU."""
    old = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = old.config.to_dict()
    d, heads = config["head_dim"], config["num_attention_heads"]
    theta = config["rope_parameters"]["rope_theta"] ** (width / d)
    config |= {"head_dim": width, "rope_parameters": config["rope_parameters"] | {"rope_theta": theta}}
    wide = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32)
    moved = (width - d) // 2  # the second half of a head is rotated with the first
    places = torch.tensor([head * width + i + moved * (i >= d // 2) for head in range(heads) for i in range(d)])
    weights = old.state_dict()
    for name, x in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name] = torch.zeros(heads * width, x.shape[1])
            weights[name][places] = x * math.sqrt(width / d) if "q_proj" in name else x
        elif name.endswith("o_proj.weight"):
            weights[name] = torch.zeros(x.shape[0], heads * width)
            weights[name][:, places] = x
    wide.load_state_dict(weights)
    ids = torch.arange(1, 80)[None]
    with torch.no_grad():
        torch.testing.assert_close(wide(ids).logits, old(ids).logits, atol=1e-4, rtol=0)
    wide.generation_config = old.generation_config
    wide.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def test_a_run_on_cards_trains_with_vllm_and_passes_its_own_checks(tmp_path, vllm_python):
    with_wider_heads(ROOT / "examples" / "cards" / "base", tmp_path / "base", 32)
    options = {
        "model.path": str(tmp_path / "base"),
        "rollout.engine": "vllm",
        "rollout.workers": "1",
        "rollout.python": vllm_python,
        "rollout.temperature": "0.9",
        "rollout.batch_size": "96",
        "rollout.n_samples_per_prompt": "2",
        "rollout.chunk_size": "24",
        "ppo.mini_batch_size": "48",
        "ppo.micro_batch_size": "48",
        "data.eval_prompts": "24",
        "run.steps": "3",
    }
    it = Run(tmp_path / "r", *[word for key, value in options.items() for word in (f"--{key}", value)], config=CARDS)
    it.wait_for(it.rows)
    workers = [pid for name, pid in it.pids().items() if name.startswith("worker-")]
    libraries = [{m.path for m in psutil.Process(pid).memory_maps()} for pid in workers]
    assert it.end(300) == 0, it.words()
    site = str(Path(vllm_python).parents[1])
    assert len(workers) == 1
    assert all(any(path.startswith(site) and "/vllm/" in path for path in paths) for paths in libraries)
    rows = it.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["logprob_diff/max"] < 1e-4 and row["logprob_diff/mean"] < 1e-5 for row in rows)
    assert it.summary()["eval"]["before"]["slot_error"] > 0.3  # the base as it is, and it is answered
    assert "Traceback" not in it.words()
