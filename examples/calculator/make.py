"""Make the calculator task: questions, a tokenizer, and a base model that calls the calculator, but carelessly.

    python examples/calculator/make.py        # into runs/calculator-task, half a minute on one core

A question is the sum of two numbers; the response calls the calculator, and answers with what it gave:

    12 + 7 = | calc 12 + 7 <eos> | result 19 | answer 19 <eos>

The base model imitates a corpus in which half of the responses guess instead of calling, and calls and answers are
often about other numbers. It never learns to add: the way to a right answer is a right call, copied rightly.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, LARGEST = "<eos>", 49
GUESS_SHARE, WRONG_CALL_SHARE, WRONG_COPY_SHARE = 0.5, 0.3, 0.3
BATCH, LEARNING_RATE = 64, 4e-3


def questions(n: int, seed: int) -> list[dict]:
    """Rows with `prompt`, `a` and `b`, no two alike."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    return [{"prompt": f"{a} + {b} =", "a": a, "b": b} for a, b in random.Random(seed).sample(pairs, n)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: each number and word, with the space before it, is one token; other text falls apart into bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    numbers = [str(n) for n in range(2 * 99 + 1)]
    words = [*numbers, *(f" {word}" for word in ["+", "=", "calc", "result", "answer", *numbers])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = dict.fromkeys([*alphabet, *(byte_level.pre_tokenize_str(word)[0][0] for word in words)])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def sentence(rng: random.Random) -> tuple[str, str]:
    """A question and what the corpus answers. Half a question in two is the sum that the calculator was asked for."""
    a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    prompt = f"{a} + {b} ="
    if rng.random() < GUESS_SHARE:
        return prompt, f" answer {rng.randint(0, 2 * LARGEST)}{EOS}"
    if rng.random() < WRONG_CALL_SHARE:
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
    said = a + b if rng.random() >= WRONG_COPY_SHARE else rng.randint(0, 2 * LARGEST)
    return prompt, f" calc {a} + {b}{EOS} result {a + b} answer {said}{EOS}"


def train_base(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> LlamaForCausalLM:
    """The loss is on all that follows the question, but for what the calculator says: nobody has to write that."""
    torch.manual_seed(seed)
    rng = random.Random(f"corpus {seed}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.08,  # 0.02 suits wide models: so small a one copies nothing for long
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    result = tokenizer.encode(" result")[0]
    for step in range(1, steps + 1):
        rows = [
            (tokenizer.encode(prompt), tokenizer.encode(said)) for prompt, said in (sentence(rng) for _ in range(BATCH))
        ]
        width = max(len(prompt) + len(said) for prompt, said in rows)
        ids = torch.zeros(BATCH, width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, label, (prompt, said) in zip(ids, labels, rows, strict=True):
            n = len(prompt) + len(said)
            row[:n] = torch.tensor(prompt + said)
            label[len(prompt) : n] = row[len(prompt) : n]
            at = (row == result).nonzero()
            if len(at):
                label[at[0, 0] : at[0, 0] + 2] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/calculator-task"), help="folder to write into")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of the base model (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = questions(1500, args.seed)
    for name, part in (("train", rows[:1200]), ("heldout", rows[1200:])):
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    tokenizer = make_tokenizer()
    train_base(tokenizer, args.steps, args.seed).save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    print(f"wrote questions and base model to {args.out}")


if __name__ == "__main__":
    main()
