"""Credit: the parts of an advantage are its whole, for every estimator, and each is what was paid later."""

import numpy as np
import pytest

import tiny_models
from recorded_step import step
from trainer import credit


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


CASES = {
    "gae": {},
    "gae, plain": {"ppo.whiten_advantages": False},
    "gae, everything on": {
        "ppo.scale_rewards": "batch",
        "ppo.scale_values": "running",
        "ppo.bootstrap_cut": True,
        "ppo.lambda_alpha": 0.4,
    },
    "reinforce_pp": {"ppo.estimator": "reinforce_pp"},
    "rloo": {"ppo.estimator": "rloo"},
    "grpo": {"ppo.estimator": "grpo"},
    "grpo, scaled and whitened": {
        "ppo.estimator": "grpo",
        "ppo.scale_rewards": "batch",
        "ppo.whiten_advantages": True,
    },
}


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_the_parts_are_the_advantage_that_the_losses_read(overrides, tokenizer):
    table, said, cfg = step(tokenizer, **overrides)
    kept = credit.padded(table, "advantages").numpy()
    assert np.abs(kept).max() > 0.5
    found = credit.split(table, said, cfg)
    assert [c.uid for c in found] == table["sample_uid"].to_pylist()
    for c, advantages in zip(found, kept, strict=True):
        np.testing.assert_allclose(c.advantages, advantages[: len(c.mask)], atol=2e-6)
        assert "slot_error" not in c.parts and {"quality", "coverage", "kl"} <= set(c.parts)
        for name in c.rewards:
            for t in range(len(c.mask)):
                paid = c.paid(name, t)
                assert paid.sum() == pytest.approx(c.parts[name][t], abs=1e-9)
                assert not paid[:t].any() and not paid[~c.mask].any()


def test_by_hand():
    """gamma lambda 1/2 over three tokens, the second of an environment: the third is one step after the first."""
    c = credit.Credit(
        uid="a",
        mask=np.array([True, False, True]),
        parts={"q": np.array([3.0, 0.0, 4.0]), "kl": np.array([-1.0, 0.0, 0.0])},
        rewards={"q": np.array([1.0, 9.0, 4.0]), "kl": np.array([-1.0, 0.0, 0.0])},
        carry=0.5,
    )
    assert c.advantages.tolist() == [2.0, 0.0, 4.0]
    assert c.paid("q", 0).tolist() == [1.0, 0.0, 2.0] and c.paid("q", 2).tolist() == [0.0, 0.0, 4.0]
    assert c.paid("q", 1).tolist() == [0.0, 0.0, 0.0]


def test_a_component_that_nobody_paid_gets_no_credit_and_the_critic_only_where_there_is_one(tokenizer):
    table, said, cfg = step(tokenizer)
    assert set(credit.split(table, said, cfg)[0].parts) == {"quality", "coverage", "kl", "critic", "mean"}
    table, said, cfg = step(tokenizer, **CASES["rloo"])
    assert set(credit.split(table, said, cfg)[0].parts) == {"quality", "coverage", "kl", "others"}
