"""Make the cards task: its data, its tokenizer and the base model that PPO starts from. Run once; the results are kept.

    python examples/cards/make.py                                        # all of it, about 5 minutes on one core
    python examples/cards/make.py --no-train                             # the data only, seconds
    python examples/cards/make.py --no-train --facts 36 --out runs/long  # cards of 36 facts: responses of 150 tokens

A card lists facts in any order, the name first; the response states each fact in a short sentence of its own:

    name hugo ; price cheap ; food korean ; =>  meet hugo . prices are cheap . it serves korean food .

Cards of up to five facts speak of the first attributes of language.json, longer ones add others at random. Held-out
cards are combinations of facts that no training card has, made of values that training cards do have.

The base model imitates a corpus that is wrong on purpose (see `noisy_response`), over cards of 4 to 40 facts. Its
facts follow the card's order, which lets so small a model keep track of a long card; the rewards ask for no order.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the data alone need neither
    from torch import Tensor
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LANGUAGE = json.loads((HERE / "language.json").read_text(encoding="utf-8"))
ATTRIBUTES: dict[str, dict[str, list[str]]] = LANGUAGE["attributes"]
CORE = list(ATTRIBUTES)[:5]
EXTRA = list(ATTRIBUTES)[5:]
MIN_FACTS, MAX_FACTS = 4, len(ATTRIBUTES)
EOS = "<eos>"
WINDOW_TOKENS = 512  # a card of 40 facts: prompt 121, clean response 171, and room for the noise of a policy at work

WRONG_SHARE = 0.34  # of the facts get another value
OMITTED_SHARE = 0.08  # of the facts are left out
SWAPPED_SHARE = 0.02  # of the facts change places with the next one
FILLER_SHARE, RUDE_SHARE, STUTTER_SHARE = 0.01, 0.005, 0.01  # of the words

LEARNING_RATE = 4e-3
BATCH_TOKENS = 3000
CLEAN_STEPS = 1000


def draw_card(rng: random.Random, n_facts: int, core_first: bool = True) -> list[str]:
    """`n_facts` facts "attribute value" in random order, the name first; without `core_first` of any attributes."""
    name, *rest = CORE
    if core_first:
        rest = rest[: n_facts - 1] + rng.sample(EXTRA, max(0, n_facts - len(CORE)))
        rng.shuffle(rest)
    else:
        rest = rng.sample(rest + EXTRA, n_facts - 1)
    return [f"{attribute} {rng.choice(ATTRIBUTES[attribute]['values'])}" for attribute in [name, *rest]]


def prompt_of(facts: list[str]) -> str:
    return " ; ".join([*facts, "=>"])


def sentence_of(rng: random.Random, fact: str) -> str:
    attribute, value = fact.split()
    return rng.choice(ATTRIBUTES[attribute]["says"]).format(value)


def clean_response(rng: random.Random, facts: list[str]) -> str:
    """All facts, rightly and once, in the order of the card. Begins with the space that follows the prompt."""
    return "".join(" " + sentence_of(rng, fact) for fact in facts)


def noisy_response(rng: random.Random, facts: list[str]) -> str:
    """What the corpus says of a card: facts omitted, swapped or given another value, fillers, stutters, rude words."""
    told = [fact for fact in facts if rng.random() >= OMITTED_SHARE]
    for i in range(len(told) - 1):
        if rng.random() < SWAPPED_SHARE:
            told[i], told[i + 1] = told[i + 1], told[i]
    for i, fact in enumerate(told):
        attribute, value = fact.split()
        if rng.random() < WRONG_SHARE:
            told[i] = f"{attribute} {rng.choice([v for v in ATTRIBUTES[attribute]['values'] if v != value])}"
    words = []
    for word in clean_response(rng, told).split():
        if rng.random() < FILLER_SHARE:
            words.append(rng.choice(LANGUAGE["fillers"]))
        if rng.random() < RUDE_SHARE:
            words.append(rng.choice(LANGUAGE["rude"]))
        words += [word] * (2 if rng.random() < STUTTER_SHARE else 1)
    return "".join(" " + word for word in words)


def write_data(folder: Path, n_facts: int, n_train: int, n_heldout: int, seed: int) -> None:
    """Writes train.jsonl and heldout.jsonl: columns `prompt` and `facts`, no combination of facts twice.

    `facts` is a list of "attribute value", because objects of different keys come back from Arrow with all keys.
    """
    rng = random.Random(f"data {n_facts} {seed}")
    combinations: set[frozenset[str]] = set()
    cards = []
    while len(cards) < n_train + n_heldout:
        card = draw_card(rng, n_facts)
        if frozenset(card) not in combinations:
            combinations.add(frozenset(card))
            cards.append(card)
    seen = {fact for card in cards[:n_train] for fact in card}
    unseen = {fact for card in cards[n_train:] for fact in card} - seen
    if unseen:
        raise ValueError(f"held-out facts that no training card has: {sorted(unseen)}; ask for more training cards")
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in [("train", cards[:n_train]), ("heldout", cards[n_train:])]:
        rows = [json.dumps({"prompt": prompt_of(card), "facts": card}) for card in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def corpus_words() -> list[str]:
    """Every word of the corpus as the tokenizer meets it: after a space, but for the one that opens a prompt."""
    words = {";", "=>", *ATTRIBUTES, *LANGUAGE["fillers"], *LANGUAGE["rude"]}
    for entry in ATTRIBUTES.values():
        words.update(entry["values"], *(sentence.split() for sentence in entry["says"]))
    return [CORE[0], *(" " + word for word in sorted(words - {"{}"}))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: each corpus word is one token, any other text falls apart into its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = [byte_level.pre_tokenize_str(word) for word in corpus_words()]
    assert all(len(piece) == 1 for piece in pieces)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(piece[0][0] for piece in pieces)])}
    # ignore_merges takes a whole word from the vocabulary, so no merges, and no half words they would need, exist
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,  # " ." must stay " .": the rewards point at characters
        model_max_length=WINDOW_TOKENS,
    )


def make_batch(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, n_facts: int, n_tokens: int, noisy: bool
) -> tuple[Tensor, Tensor]:
    """About `n_tokens` tokens of prompt, response and eos over cards of `n_facts` facts: input_ids, labels, [B, T].

    Labels are -100 on prompt and padding. The prompts of one batch are equally long, so only the end is padded.
    """
    import torch

    prompt_len = 3 * n_facts + 1  # attribute, value, ";" of each fact, then "=>"
    core_first = rng.random() < 0.5
    sequences = []
    for _ in range(n_tokens // (8 * n_facts)):
        card = draw_card(rng, n_facts, core_first)
        response = noisy_response(rng, card) if noisy else clean_response(rng, card)
        sequences.append(tokenizer(prompt_of(card) + response + EOS)["input_ids"][:WINDOW_TOKENS])
    input_ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    labels = torch.full_like(input_ids, -100)
    for i, ids in enumerate(sequences):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        labels[i, prompt_len : len(ids)] = input_ids[i, prompt_len : len(ids)]
    return input_ids, labels


def train_base(tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> LlamaForCausalLM:
    """Trains the base LM: each batch of cards of one length, short ones more often.

    The first CLEAN_STEPS see clean responses, the others the noisy corpus: copying from the card is the hard thing to
    learn, and 1,400 steps of the noisy corpus alone did not teach it (75 % slot errors at 36 facts).
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rng = random.Random(f"corpus {seed}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=WINDOW_TOKENS,
        initializer_range=0.08,  # 0.02 suits wide models: here attention stayed flat, and nothing was copied
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:
        return min((step + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, step / steps))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.monotonic()
    for step in range(1, steps + 1):
        n_facts = round(rng.uniform(math.sqrt(MIN_FACTS - 0.49), math.sqrt(MAX_FACTS + 0.49)) ** 2)
        input_ids, labels = make_batch(tokenizer, rng, n_facts, BATCH_TOKENS, noisy=step > CLEAN_STEPS)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  {n_facts} facts  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    return model.eval()


def sample_responses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int, seed: int
) -> tuple[list[str], list[str]]:
    """One response each at temperature 1, with its finish reason. The prompts must be equally long in tokens."""
    import torch

    torch.manual_seed(seed)
    prompt_ids = torch.tensor(tokenizer(prompts)["input_ids"])
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    with torch.inference_mode():
        output = model.generate(prompt_ids, attention_mask=torch.ones_like(prompt_ids), **settings)
    response_ids = output[:, prompt_ids.shape[1] :]
    reasons = ["stop" if tokenizer.eos_token_id in ids else "length" for ids in response_ids.tolist()]
    return tokenizer.batch_decode(response_ids, skip_special_tokens=True), reasons


def print_measures(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Prints what the base model does with unseen cards of several lengths, one sample each at temperature 1."""
    from rewards import slot_error

    for n_facts in (4, 5, 14, 36):
        rng = random.Random(f"measure {n_facts} {seed}")
        cards = [draw_card(rng, n_facts) for _ in range(500 if n_facts < 14 else 200)]
        texts, reasons = sample_responses(model, tokenizer, [prompt_of(c) for c in cards], 8 * n_facts + 8, seed)
        errors = slot_error(completions=texts, facts=cards)
        tokens = sum(len(ids) + 1 for ids in tokenizer(texts)["input_ids"])
        print(
            f"{n_facts} facts: slot error {sum(errors) / len(errors):.3f}, "
            f"ended by eos {reasons.count('stop') / len(reasons):.3f}, {tokens / len(texts):.1f} tokens per response"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=5, help=f"facts per card, {MIN_FACTS} to {MAX_FACTS} (default 5)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write data/ and base/ into (default: here)")
    parser.add_argument("--train", type=int, default=2000, help="training cards (default 2000)")
    parser.add_argument("--heldout", type=int, default=600, help="held-out cards (default 600)")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps of the base model (default 1800)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-train", action="store_true", help="write the data only")
    args = parser.parse_args()
    if not MIN_FACTS <= args.facts <= MAX_FACTS:
        parser.error(f"--facts must be {MIN_FACTS} to {MAX_FACTS}, got {args.facts}")
    write_data(args.out / "data", args.facts, args.train, args.heldout, args.seed)
    print(f"wrote {args.train} training and {args.heldout} held-out cards to {args.out / 'data'}")
    if args.no_train:
        return
    tokenizer = make_tokenizer()
    model = train_base(tokenizer, args.steps, args.seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")
    print(f"wrote the base model to {args.out / 'base'}")
    print_measures(model, tokenizer, args.seed)


if __name__ == "__main__":
    main()
