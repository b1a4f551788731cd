"""Names under which other trainers log the very same quantity, so that a dashboard that was made for their runs shows
ours too (`log.peer_names`).

Only what means the same is here, whatever it is averaged over in between (peers log means of the means of their
micro-batches). What is called alike and is another thing is left out on purpose:

* TRL `policy/approxkl_avg` is half the mean square of the log-ratio, `val/ratio` and `policy/entropy_avg` count
  padding, `objective/entropy` is a sum of -logp over a response: ours is an entropy per token.
* OpenRLHF `kl` is per token, `return` is after the KL penalty.
* verl `actor/pg_loss` and `critic/vf_loss` are scaled by the share of their micro-batch, `actor/grad_norm` is of the
  policy alone, `critic/vf_clipfrac` counts losses and not moves, `response_length/clip_ratio` counts who ends by itself
  in the last place.
"""

# peer -> our name -> theirs
PEERS: dict[str, dict[str, str]] = {
    "trl": {  # PPOTrainer of trl 1.12; its objective/kl is ours, name and all
        "reward/total": "objective/scores",
        "loss/policy": "loss/policy_avg",
        "loss/value": "loss/value_avg",
        "ppo/pg_clipfrac": "policy/clipfrac_avg",
        "optim/lr": "lr",
    },
    "openrlhf": {
        "reward/total": "train/reward",
        "response/length_mean": "train/response_length",
        "loss/policy": "train/policy_loss",
        "loss/value": "train/critic_loss",
        "loss/entropy": "train/entropy_loss",
        "loss/ptx": "train/ptx_loss",
        "ppo/approx_kl": "train/ppo_kl",
        "ppo/pg_clipfrac": "train/ppo_clip_ratio",
        "optim/lr": "train/actor_lr",
    },
    "verl": {
        "reward/total": "critic/score/mean",
        "response/length_mean": "response_length/mean",
        "value/explained_variance": "critic/vf_explained_var",
        "objective/entropy": "actor/entropy",
        "objective/kl_coef": "actor/reward_kl_penalty_coeff",
        "ppo/approx_kl": "actor/ppo_kl",
        "ppo/pg_clipfrac": "actor/pg_clipfrac",
        "optim/lr": "actor/lr",
        "time/total": "timing_s/step",
    },
}


def with_peer_names(peer: str, values: dict[str, float]) -> dict[str, float]:
    """The values under our names, and those that `peer` has a name for under that too; "none" has none."""
    return values | {theirs: values[ours] for ours, theirs in PEERS.get(peer, {}).items() if ours in values}
