"""Small random models and a tokenizer, made here: no test needs a download."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from core.trajectory import PromptRequest, Trajectory, sample_uid
from rollout.engines.transformers_engine import TransformersEngine

VOCABULARY = 320
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def configs() -> dict[str, object]:
    """Name -> configuration of the shapes that the engine must serve; dropout is on in GPT-2's, as it ships."""
    rope = {"vocab_size": VOCABULARY, "max_position_embeddings": 256, "num_key_value_heads": 2, **_SIZES}
    return {
        "llama-tied": LlamaConfig(**rope, tie_word_embeddings=True),
        "llama-untied": LlamaConfig(**rope, tie_word_embeddings=False),
        "gpt2": GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        ),
        "qwen2-tied": Qwen2Config(**rope, tie_word_embeddings=True),
        "qwen3-untied": Qwen3Config(**rope, head_dim=8, tie_word_embeddings=False),
    }


def make_model(name: str, *, seed: int = 0, scale: float = 4.0) -> torch.nn.Module:
    """A random model with weights scaled up, so that its log-probs differ from token to token as trained ones do."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(configs()[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    model.generation_config = GenerationConfig(eos_token_id=[0, 7], pad_token_id=0)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over any text; <eos> is id 0 and there is no pad token, as GPT-2 has none."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat , the dog ran to the park and back again ."] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def save_model(folder: Path, name: str = "llama-tied", *, seed: int = 0) -> Path:
    """A folder as `from_pretrained` loads it: model, generation config, tokenizer."""
    make_model(name, seed=seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_requests(n: int, *, seed: int = 0, shortest: int = 2) -> list[PromptRequest]:
    """Random prompts of several lengths."""
    rng = np.random.default_rng(5)
    return [
        PromptRequest(
            ordinal=i,
            k=0,
            sample_uid=sample_uid("t", i, 0),
            prompt_ids=rng.integers(1, VOCABULARY, size=shortest + i % 7),
            columns={"prompt": ""},
            seed=seed,
        )
        for i in range(n)
    ]


# Of a learner that gets its models and its batch from here: the paths are never read.
LEARNER_SETTINGS = {"model.path": "m", "model.dtype": "float32", "data.path": "d.jsonl", "rewards.a.fn": "r.py:f"}


def roll_out(engine: TransformersEngine, n: int) -> list[Trajectory]:
    """What the engine writes to `n` random prompts, scored by one component "a" with random numbers."""
    rng, asked, out = np.random.default_rng(1), make_requests(n), []
    for request, g in zip(asked, engine.generate(asked), strict=True):
        t = len(g.response_ids)
        out.append(
            Trajectory(
                request=request,
                response_ids=g.response_ids,
                rollout_logprobs=g.logprobs,
                action_mask=np.ones(t, dtype=bool),
                token_offsets=np.zeros((t, 2), dtype=np.int64),
                policy_version=np.zeros(t, dtype=np.int64),
                finish_reason=g.finish_reason,
                finished_at=0.0,
                kept=g.kept,
                rollout_values=g.values,
                rollout_bootstrap=g.bootstrap,
                component_rewards={"a": rng.normal(size=t)},
                component_mask={"a": np.ones(t, dtype=bool)},
            )
        )
    return out
