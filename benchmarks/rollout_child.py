"""One rollout engine as a process of its own (peer_child.py): asked by rollout.py, in whichever interpreter has it.

Requests have planned lengths: an engine is told for each response after how many tokens it ends, in whatever way costs
it least. Every engine samples, from the whole vocabulary at temperature 1; ours and vLLM's give log-probs with the ids.
"""

import tempfile
import time
from typing import Any

import numpy as np
import torch
from peer_cases import Size
from peer_child import answer, requests

from core.trajectory import PromptRequest, sample_uid


def save_model(folder: str, size: Size, seed: int = 0) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


class Slots:
    """The embedded engine. The last id stops; a random number near 1 draws it where a response is to end."""

    def __init__(self, path: str, size: Size, longest: int, asked: dict[str, Any]) -> None:
        from rollout.engines import responses
        from rollout.engines.transformers_engine import TransformersEngine

        self._lengths: dict[int, int] = {}
        real = responses.uniforms

        def planned(request: PromptRequest, n: int) -> np.ndarray:
            # The last ids are the last part of the cumulative distribution, of about 1 / V each: not drawn by chance.
            numbers = real(request, n) * (1 - 8 / size.vocabulary)
            if (end := self._lengths[request.ordinal]) < longest:
                numbers[end - 1] = 1 - 1e-12
            return numbers

        responses.uniforms = planned
        self._engine = TransformersEngine.load(
            path,
            (size.vocabulary - 1,),
            dtype=asked["dtype"],
            device=asked["device"],
            temperature=1.0,
            max_new_tokens=longest,
            slots=asked["batch"],
        )

    def write(self, prompts: list[np.ndarray], lengths: list[int]) -> int:
        self._lengths = dict(enumerate(lengths))
        asked = [_request(i, prompt) for i, prompt in enumerate(prompts)]
        return sum(len(g.response_ids) for g in self._engine.generate(asked))


class Generate:
    """transformers' `generate`, which ends when the longest response does."""

    def __init__(self, path: str, size: Size, longest: int, asked: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, asked["dtype"])
        self._lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(asked["device"]).eval()
        self._settings = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": 0, "use_cache": True}
        if asked["engine"] == "generate-static":
            self._settings |= {"cache_implementation": "static", "disable_compile": asked["device"] == "cpu"}

    @torch.inference_mode()
    def write(self, prompts: list[np.ndarray], lengths: list[int]) -> int:
        ids = torch.from_numpy(np.stack(prompts)).to(self._lm.device)
        out = self._lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max(lengths), eos_token_id=None, **self._settings
        )
        assert out.shape == (len(prompts), ids.shape[1] + max(lengths))
        return sum(lengths)  # the rest is thrown away


class VLLM:
    """Through our engine, each request with a longest response of its own."""

    def __init__(self, path: str, size: Size, longest: int, asked: dict[str, Any]) -> None:
        from rollout.engines.vllm_engine import VLLMEngine, sampling_arguments

        self._engine = VLLMEngine.load(
            path,
            (),
            dtype=asked["dtype"],
            device=asked["device"],
            temperature=1.0,
            max_new_tokens=longest,
            max_prompt_tokens=asked["prompt"],
            requests=asked["batch"],
        )
        self._arguments = sampling_arguments

    def write(self, prompts: list[np.ndarray], lengths: list[int]) -> int:
        from vllm import SamplingParams

        params = [
            SamplingParams(**self._arguments(_request(i, prompt), (), temperature=1.0, max_new_tokens=length))
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        texts = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        done = self._engine._llm.generate(texts, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in done)


ENGINES = {"slots": Slots, "generate-dynamic": Generate, "generate-static": Generate, "vllm": VLLM}


def _request(ordinal: int, prompt: np.ndarray) -> PromptRequest:
    uid = sample_uid("bench", ordinal, 0)
    return PromptRequest(ordinal=ordinal, k=0, sample_uid=uid, prompt_ids=prompt, columns={}, seed=0)


def main() -> None:
    engine, rng = None, np.random.default_rng(0)
    for asked in requests():
        if asked["do"] == "setup":
            size = Size(**asked["size"])
            with tempfile.TemporaryDirectory() as folder:
                save_model(folder, size)
                started = time.perf_counter()
                engine = ENGINES[asked["engine"]](folder, size, asked["longest"], asked)
                answer(load_s=time.perf_counter() - started, threads=torch.get_num_threads())
        else:
            # New prompts each time: nothing may come out of a cache of prefixes.
            prompts = [rng.integers(1, size.vocabulary - 2, size=asked["prompt"]) for _ in asked["lengths"]]
            started = time.perf_counter()
            tokens = engine.write(prompts, asked["lengths"])
            spent = time.perf_counter() - started
            assert tokens == sum(asked["lengths"]), f"{tokens} tokens were written, {sum(asked['lengths'])} asked for"
            answer(seconds=spent, tokens=tokens)


if __name__ == "__main__":
    main()
