"""The ledger: every number of a file is the number that the loop had for that token, and nothing is lost unsaid."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

import tiny_models
from core import config, ledger_table
from core.combine import Combined
from core.faults import UserError
from core.schema import Config
from core.trajectory import PromptRequest, Trajectory, sample_uid
from launch import run_folder
from trainer import ledger as module
from trainer.batch import TrainBatch
from trainer.ledger import Ledger, device_name, is_recorded

T = 6


def cfg_of(fraction: float = 1.0, **more: object) -> Config:
    return config.load(Path("configs/cards.yaml"), {"log.ledger": fraction} | more)


def trajectories(n: int, tokenizer) -> list[Trajectory]:
    """Responses of 2 to T tokens; the second token of every other one is an environment's."""
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        length = 2 + i % (T - 1)
        ids = rng.integers(1, 300, length)
        text = tokenizer.decode(ids.tolist())
        cuts = [round(len(text) * j / length) for j in range(length + 1)]
        mask = np.ones(length, dtype=bool)
        mask[1 : 2 if i % 2 else 1] = False
        out.append(
            Trajectory(
                request=PromptRequest(
                    ordinal=i // 2,
                    k=i % 2,
                    sample_uid=sample_uid("l", i // 2, i % 2),
                    prompt_ids=np.array([5, 6, 7 + i // 2]),
                    columns={"prompt": "a", "when": threading},  # nothing that JSON knows
                    seed=0,
                ),
                response_ids=ids,
                rollout_logprobs=-rng.random(length).astype(np.float32),
                action_mask=mask,
                token_offsets=np.array(list(zip(cuts, cuts[1:], strict=False))),
                policy_version=np.full(length, 3),
                finish_reason="stop" if i % 3 else "length",
                finished_at=0.0,
                component_rewards={"a": rng.random(length), "b": rng.random(length)},
                component_mask={"a": mask, "b": mask},
            )
        )
    return out


def filled(rows: list[Trajectory], seed: int = 1) -> tuple[TrainBatch, Combined, torch.Tensor]:
    """A batch with random numbers in every field, NaN where nothing may be read; components; new log-probs."""
    torch.manual_seed(seed)
    batch = TrainBatch.collate(rows)
    shape = batch.response_mask.shape

    def random() -> torch.Tensor:
        return torch.where(batch.response_mask, torch.randn(shape), torch.nan)

    names = ("old_logprobs", "ref_logprobs", "values", "token_rewards", "rewards", "advantages", "returns")
    batch = batch.fill(**{name: random() for name in names}, bootstrap_values=torch.randn(len(rows)))
    parts = {"a": random().double(), "b": random().double()}
    combined = Combined(
        token_rewards=batch.token_rewards, normalized=parts, weighted={name: 2 * x for name, x in parts.items()}
    )
    return batch, combined, random()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.make_tokenizer()


def written(folder: Path, cfg: Config, tokenizer, n: int = 8, rank: int = 0, step: int = 4):
    folder.mkdir(exist_ok=True)
    rows = trajectories(n, tokenizer)
    batch, combined, new = filled(rows)
    notes: list[str] = []
    book = Ledger(cfg, folder, tokenizer, notes.append, rank=rank, ranks=2)
    book.record(
        step, batch, rows, combined, new, {"a": 1.0, "b": 0.5}, {"kl_coef": 0.02}, {"credit/advantage_std": 2.0}, "d4"
    )
    book.close()
    assert notes == [] and not book.counters
    return rows, batch, combined, new


def test_every_number_is_that_of_its_token(tmp_path, tokenizer):
    rows, batch, combined, new = written(tmp_path, cfg_of(), tokenizer)
    table, (said,) = ledger_table.read(tmp_path, 4)
    assert said == {
        **{"step": 4, "rank": 0, "ranks": 2, "fraction": 1.0, "policy_digest": "d4"},
        **{"weights": {"a": 1.0, "b": 0.5}, "before": {"kl_coef": 0.02}, "credit": {"credit/advantage_std": 2.0}},
        **{"device": device_name("cpu"), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "config": cfg_of().model_dump(mode="json"),
    }
    got = table.to_pylist()
    assert [(r["ordinal"], r["k"]) for r in got] == [t.order for t in rows]
    tensors = {
        name: getattr(batch, name)
        for name in ("old_logprobs", "ref_logprobs", "values", "token_rewards", "rewards", "advantages", "returns")
    }
    tensors |= {"new_logprobs": new, "kl": batch.old_logprobs - batch.ref_logprobs}
    tensors |= {"ratio": (new - batch.old_logprobs).exp(), "importance": torch.ones_like(new)}
    for i, (row, t) in enumerate(zip(got, rows, strict=True)):
        mask = t.action_mask
        for name, x in tensors.items():
            assert [v is None for v in row[name]] == (~mask).tolist(), name
            np.testing.assert_allclose([v for v in row[name] if v is not None], x[i, : len(t)][mask], rtol=1e-6)
        for column, parts in (("normalized", combined.normalized), ("weighted", combined.weighted)):
            assert [name for name, _ in row[column]] == ["a", "b"]
            for name, values in row[column]:
                assert [v is None for v in values] == (~mask).tolist()
                known = [v for v in values if v is not None]
                np.testing.assert_allclose(known, parts[name][i, : len(t)][mask], rtol=1e-6)
        clipped = [
            None if not m else -a * min(max(r, 0.8), 1.2) > -a * r
            for m, a, r in zip(mask, batch.advantages[i], tensors["ratio"][i], strict=False)
        ]
        assert row["clipped"] == clipped
        assert row["bootstrap_value"] == pytest.approx(float(batch.bootstrap_values[i]))
        assert row["rollout_logprobs"] == pytest.approx(t.rollout_logprobs.tolist())
        assert dict(row["component_rewards"])["a"] == t.component_rewards["a"].tolist()
        assert "".join(row["tokens"]) == row["response_text"] == tokenizer.decode(t.response_ids.tolist())
        assert row["prompt_text"] == tokenizer.decode(t.request.prompt_ids.tolist())
    assert any(any(row["clipped"]) for row in got)


def test_ratio_and_weight_follow_the_algorithm(tmp_path, tokenizer):
    cfg = cfg_of(**{"rollout.max_staleness": 1})
    rows, batch, _, new = written(tmp_path / "stale", cfg, tokenizer)
    row = ledger_table.read(tmp_path / "stale", 4)[0].to_pylist()[0]
    np.testing.assert_allclose(row["ratio"], (new - batch.rollout_logprobs)[0, : len(rows[0])].exp(), rtol=1e-5)
    np.testing.assert_allclose(row["kl"], (batch.rollout_logprobs - batch.ref_logprobs)[0, : len(rows[0])], rtol=1e-5)
    cfg = cfg_of(**{"rollout.max_staleness": 1, "ppo.importance_cap": 1.1})
    written(tmp_path / "decoupled", cfg, tokenizer)
    row = ledger_table.read(tmp_path / "decoupled", 4)[0].to_pylist()[0]
    np.testing.assert_allclose(row["ratio"], (new - batch.old_logprobs)[0, : len(rows[0])].exp(), rtol=1e-5)
    weights = (batch.old_logprobs - batch.rollout_logprobs).exp().clamp(max=1.1)[0, : len(rows[0])]
    np.testing.assert_allclose(row["importance"], weights, rtol=1e-5)


def test_a_share_of_the_prompts_is_recorded_with_all_their_samples(tmp_path, tokenizer):
    cfg = cfg_of(0.3)
    chosen = [is_recorded(cfg, ordinal) for ordinal in range(4000)]
    assert 0.27 < np.mean(chosen) < 0.33
    other = cfg_of(0.3, **{"run.seed": 1})
    assert chosen != [is_recorded(other, ordinal) for ordinal in range(4000)]
    larger = cfg_of(0.6)
    assert all(is_recorded(larger, o) for o in range(4000) if chosen[o])  # a larger share has the smaller one's
    written(tmp_path, cfg, tokenizer, n=80)
    table, _ = ledger_table.read(tmp_path, 4)
    got = list(zip(table["ordinal"].to_pylist(), table["k"].to_pylist(), strict=True))
    assert got == [(ordinal, k) for ordinal in range(40) if chosen[ordinal] for k in (0, 1)]


def test_nothing_is_written_where_nothing_is_asked_for(tmp_path, tokenizer):
    written(tmp_path, cfg_of(0.0), tokenizer)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="nothing of step 4; it is empty; log.ledger is the share"):
        ledger_table.read(tmp_path, 4)


def test_files_of_all_ranks_are_one_table(tmp_path, tokenizer):
    rows = trajectories(8, tokenizer)
    for rank, mine in enumerate((rows[4:], rows[:4])):
        batch, combined, new = filled(mine)
        book = Ledger(cfg_of(), tmp_path, tokenizer, print, rank=rank, ranks=2)
        book.record(7, batch, mine, combined, new, {}, {}, {})
        book.close()
    table, said = ledger_table.read(tmp_path, 7)
    assert [s["rank"] for s in said] == [0, 1] and table.num_rows == 8
    assert table["sample_uid"].to_pylist() == [t.request.sample_uid for t in rows]
    with pytest.raises(UserError, match="nothing of step 8; it has steps 7 to 7"):
        ledger_table.read(tmp_path, 8)


def test_the_loop_never_waits_and_what_is_missing_is_said_once_and_counted(tmp_path, tokenizer, monkeypatch):
    go, real = threading.Event(), module.table_of

    def slow(*args):
        assert go.wait(30)
        return real(*args)

    monkeypatch.setattr(module, "table_of", slow)
    rows, notes = trajectories(4, tokenizer), []
    batch, combined, new = filled(rows)
    book = Ledger(cfg_of(), tmp_path, tokenizer, notes.append)
    for step in range(1, 9):  # one is being written, ROOM wait
        book.record(step, batch, rows, combined, new, {}, {}, {})
    go.set()
    book.close()
    kept = {ledger_table.step_of(path) for path in ledger_table.files(tmp_path)}
    assert len(kept) in (module.ROOM, module.ROOM + 1) and 1 in kept
    assert book.counters["ledger_missed"] == 8 - len(kept)
    (note,) = notes
    assert "training goes on" in note and "slow" in note


def test_a_disk_that_takes_nothing_costs_no_step(tmp_path, tokenizer):
    (tmp_path / "ledger").write_text("not a folder")
    rows, notes = trajectories(4, tokenizer), []
    batch, combined, new = filled(rows)
    book = Ledger(cfg_of(), tmp_path, tokenizer, notes.append)
    for step in (1, 2):
        book.record(step, batch, rows, combined, new, {}, {}, {})
    book.close()
    assert book.counters["ledger_missed"] == 2
    assert len(notes) == 1 and notes[0].startswith("warning: the ledger has nothing of step 1, training goes on: ")


def test_what_is_recorded_is_a_copy(tmp_path, tokenizer, monkeypatch):
    """The loop may go on with its tensors while the file is written."""
    go, real = threading.Event(), module.table_of
    monkeypatch.setattr(module, "table_of", lambda *args: go.wait(30) and real(*args))
    rows = trajectories(4, tokenizer)
    batch, combined, new = filled(rows)
    want = batch.advantages.clone()
    book = Ledger(cfg_of(), tmp_path, tokenizer, print)
    book.record(1, batch, rows, combined, new, {}, {}, {})
    for x in (batch.advantages, new, combined.weighted["a"]):
        x.fill_(99.0)
    go.set()
    book.close()
    row = ledger_table.read(tmp_path, 1)[0].to_pylist()[0]
    np.testing.assert_allclose(row["advantages"], want[0, : len(rows[0])])
    assert 99.0 not in row["new_logprobs"] and 99.0 not in dict(row["weighted"])["a"]


def test_a_run_that_goes_on_drops_the_steps_that_happen_again(tmp_path, tokenizer):
    for step in (1, 2, 3):
        written(tmp_path, cfg_of(), tokenizer, step=step)
    run_folder.drop_after(tmp_path, 2)
    assert [ledger_table.step_of(path) for path in ledger_table.files(tmp_path)] == [1, 2]


def test_another_version_is_refused(tmp_path, tokenizer):
    written(tmp_path, cfg_of(), tokenizer)
    (path,) = ledger_table.files(tmp_path)
    table = pyarrow.parquet.read_table(path)
    other = table.schema.metadata | {ledger_table.VERSION_KEY: b"0"}
    pyarrow.parquet.write_table(table.replace_schema_metadata(other), path)
    with pytest.raises(UserError, match="a ledger of version b'0', this tokenppo reads b'3'"):
        ledger_table.read(tmp_path, 4)


def test_rows_and_trajectories_must_be_the_same(tmp_path, tokenizer):
    rows = trajectories(4, tokenizer)
    batch, combined, new = filled(rows)
    book = Ledger(cfg_of(), tmp_path, tokenizer, print)
    with pytest.raises(AssertionError):
        book.record(1, batch, [*rows[1:], replace(rows[0])], combined, new, {}, {}, {})
    book.close()
