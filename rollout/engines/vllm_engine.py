"""vLLM behind the protocol of engine.py, for models that are too big for the embedded engine.

    weight sync ──> live_tensors: a copy of the model on the host ──use_weights──> vLLM's own, packed weights
    requests ─────> vLLM: paged keys and values, shared prefixes ─> Generation

What vLLM loads it packs, fuses and shards, so nobody can write into it by name. A sync therefore writes into a plain
copy of the model in host memory, whose names and shapes are the learner's, and `use_weights` has vLLM load that.

Only this file knows vLLM, and imports it where it is used: its arguments are pure functions, which need none.
"""

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.pretrained import load_causal_lm
from core.trajectory import PromptRequest
from core.weights import named_tensors
from rollout.engines.engine import Begun, Generation

if TYPE_CHECKING:
    from vllm import LLM

NOTHING = Begun(response_ids=np.zeros(0, dtype=np.int64), logprobs=np.zeros(0, dtype=np.float32))
CPU_CACHE_BYTES = 2**30  # of keys and values; VLLM_CPU_KVCACHE_SPACE, in GiB, says otherwise


def engine_arguments(
    path: str,
    *,
    dtype: str,
    device: str,
    max_tokens: int,
    requests: int,
    tensor_parallel_size: int = 1,
    gpu_memory: float | None = None,
    sleep: bool = False,
    prefix_cache: bool = True,
) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM.

    Args:
        max_tokens: of prompt and response together.
        requests: most responses that are written side by side.
        gpu_memory: share of each GPU for weights, keys and values; vLLM's own default if None.
    """
    arguments: dict[str, Any] = {
        "model": path,
        "dtype": dtype,
        "max_model_len": max_tokens,
        "max_num_seqs": requests,
        "tensor_parallel_size": tensor_parallel_size,
        # Named, since vLLM would take Ray where it finds itself in an actor, and that wants a placement group.
        "distributed_executor_backend": "uni" if tensor_parallel_size == 1 else "mp",
        "enable_prefix_caching": prefix_cache,
        "enable_sleep_mode": sleep,
        "generation_config": "vllm",  # nothing of the checkpoint's reaches the samples
        "logprobs_mode": "processed_logprobs",  # of what was sampled from: after temperature
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "worker_extension_cls": f"{WeightLoader.__module__}.{WeightLoader.__qualname__}",
        "seed": 0,  # every request has a seed of its own
    }
    if device.startswith("cuda"):
        if gpu_memory is not None:
            arguments["gpu_memory_utilization"] = gpu_memory
    else:  # compiled, a 34 M model takes 105 s to start, not 20
        arguments |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return arguments


def sampling_arguments(
    request: PromptRequest,
    stop: tuple[int, ...],
    *,
    temperature: float,
    max_new_tokens: int,
    begun: int = 0,
    most: int | None = None,
) -> dict[str, Any]:
    """Keyword arguments of vllm.SamplingParams for one request, of whose response `begun` tokens are there. `most`: as
    Engine.generate has it."""
    assert begun < max_new_tokens, f"a response of {max_new_tokens} tokens was begun with {begun}"
    return {
        "temperature": temperature,
        "seed": request_seed(request, begun),
        "max_tokens": max_new_tokens - begun if most is None else min(most, max_new_tokens - begun),
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # `stop` has every id that ends a response
        "logprobs": 0,  # of the sampled token alone
        "flat_logprobs": True,
        "detokenize": False,
    }


def request_seed(request: PromptRequest, begun: int = 0) -> int:
    """63 bits, a function of (seed, ordinal, k) and of the tokens that are there before: not of who else is in the
    batch, nor of the attempt. vLLM counts its random numbers from its own first token."""
    key = f"{request.seed}/{request.ordinal}/{request.k}/{begun}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1


class WeightLoader:
    """What vLLM's workers can do beyond their own: a method of theirs for `collective_rpc`."""

    def load_new_weights(self, weights: list[tuple[str, Tensor]]) -> None:
        self.model_runner.reload_weights(weights_iterator=iter(weights))


class VLLMEngine:
    def __init__(
        self,
        llm: "LLM",
        mirror: torch.nn.Module,
        stop: tuple[int, ...],
        *,
        temperature: float,
        max_new_tokens: int,
        sleeps: bool = False,
    ) -> None:
        """`mirror`: the same model in host memory, as transformers has it. `sleeps`: `rest` frees the GPU."""
        self._llm, self._mirror, self._stop = llm, mirror, stop
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self._sleeps, self._asleep = sleeps, False

    @classmethod
    def load(
        cls,
        path: str,
        stop: tuple[int, ...],
        *,
        dtype: str,
        device: str,
        temperature: float,
        max_new_tokens: int,
        max_prompt_tokens: int,
        requests: int,
        tensor_parallel_size: int = 1,
        gpu_memory: float | None = None,
        sleep: bool = False,
        prefix_cache: bool = True,
    ) -> "VLLMEngine":
        """Start vLLM in this process, which has not imported it before."""
        _prepare_environment(device)
        from vllm import LLM

        arguments = engine_arguments(
            path,
            dtype=dtype,
            device=device,
            max_tokens=max_prompt_tokens + max_new_tokens,
            requests=requests,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory=gpu_memory,
            sleep=sleep,
            prefix_cache=prefix_cache,
        )
        mirror = load_causal_lm(path, getattr(torch, dtype)).eval()
        return cls(LLM(**arguments), mirror, stop, temperature=temperature, max_new_tokens=max_new_tokens, sleeps=sleep)

    def live_tensors(self) -> dict[str, Tensor]:
        """Of the copy in host memory, on the CPU: what is written there counts from `use_weights` on."""
        return named_tensors(self._mirror)

    def use_weights(self) -> None:
        self._wake()
        # Both names of what is tied: vLLM would leave a head that is not named as it was.
        weights = list(_as_on_disk(self._mirror).items())
        self._llm.collective_rpc("load_new_weights", args=(weights,))
        # Keys and values of the old weights would be taken for prefixes of the new ones.
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop the keys and values of the old weights")

    def generate(
        self, requests: list[PromptRequest], begun: list[Begun | None] | None = None, most: int | None = None
    ) -> list[Generation]:
        """What `stream` gives, in the order of the requests."""
        return [generation for _, generation in sorted(self.stream(requests, begun, most), key=lambda pair: pair[0])]

    def stream(
        self, requests: list[PromptRequest], begun: list[Begun | None] | None = None, most: int | None = None
    ) -> Iterator[tuple[int, Generation]]:
        from vllm import SamplingParams

        self._wake()
        starts = [start or NOTHING for start in begun or [None] * len(requests)]
        names = self._llm.enqueue(
            [
                {"prompt_token_ids": [*request.prompt_ids.tolist(), *start.response_ids.tolist()]}
                for request, start in zip(requests, starts, strict=True)
            ],
            [
                SamplingParams(
                    **sampling_arguments(
                        request,
                        self._stop,
                        temperature=self.temperature,
                        max_new_tokens=self.max_new_tokens,
                        begun=len(start.response_ids),
                        most=most,
                    )
                )
                for request, start in zip(requests, starts, strict=True)
            ],
            use_tqdm=False,
        )
        places = {name.partition("-")[0]: i for i, name in enumerate(names)}  # an answer has the number alone
        while places:
            for output in self._llm.llm_engine.step():
                if output.finished:
                    i = places.pop(output.request_id)
                    yield i, _generation(starts[i], output.outputs[0], self.max_new_tokens)

    def logprobs(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        """One request for each token: what vLLM says of a prompt's own tokens is before temperature, and on its other
        paths; so each is asked for as the next token of those before it, where samples come from."""
        from vllm import SamplingParams

        self._wake()
        (n, t), p = response_ids.shape, prompt_ids.shape[1]
        rows = np.concatenate([prompt_ids, response_ids], axis=1)
        outputs = self._llm.generate(
            [{"prompt_token_ids": row[: p + i].tolist()} for row in rows for i in range(t)],
            [
                SamplingParams(
                    temperature=self.temperature,
                    seed=0,
                    max_tokens=1,
                    ignore_eos=True,
                    logprob_token_ids=[token],
                    detokenize=False,
                )
                for token in response_ids.ravel().tolist()
            ],
            use_tqdm=False,
        )
        said = [
            output.outputs[0].logprobs[0][token].logprob
            for output, token in zip(outputs, response_ids.ravel().tolist(), strict=True)
        ]
        return np.array(said, dtype=np.float32).reshape(n, t)

    def rest(self) -> None:
        if self._sleeps and not self._asleep:
            self._llm.sleep(level=1)  # weights to the host, keys and values gone
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False


def _prepare_environment(device: str) -> None:
    """What vLLM reads when it is imported. What the user has set stays."""
    settings = {
        # The engine in this process: it dies with it, and no other process is needed on one device.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",  # it would tell its makers of each start
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    if not device.startswith("cuda"):
        # Bound to cores, every worker of this machine would take the same. Compiling one small function of the
        # log-probs takes 10 s and a C++ compiler.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _as_on_disk(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights under the names that a checkpoint has, which vLLM loads from: transformers has others for some models."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, model.state_dict())


def _generation(start: Begun, output: Any, max_new_tokens: int) -> Generation:
    said, reason = output.logprobs, output.finish_reason
    if reason == "length" and len(start.response_ids) + len(output.token_ids) < max_new_tokens:
        reason = None  # the end of a round, not of the response
    of_sampled = [said.logprobs[first] for first in said.start_indices]  # of a place, that of its sampled token
    return Generation(
        response_ids=np.concatenate([start.response_ids, np.array(output.token_ids, dtype=np.int64)]),
        logprobs=np.concatenate([start.logprobs, np.array(of_sampled, dtype=np.float32)]),
        finish_reason=reason if reason in ("stop", "length", None) else "abort",
    )
