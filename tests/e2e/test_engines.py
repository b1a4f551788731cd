"""Every engine that an accelerate file can ask for computes what one process does, and trains live; on a CPU."""

import re
from pathlib import Path

import pytest
import test_many_learners as many
from test_many_learners import FILES, farthest, task  # noqa: F401

from cards_run import Run

many.ENGINES |= {name: (2, "DEEPSPEED") for name in ("zero0", "zero1", "zero3", "zero3_offload")} | {
    "fsdp2": (2, "FSDP")
}

ADAPTER = {"model.lora_rank": 4, "model.value": "lora", "run.checks": False}
CASES = {
    "shared": {"micro": 2, "shards": [5, 7], "export": True},
    "separate": {"micro": 2, "shards": [5, 7], "settings": {"model.value": "separate"}},
    # The reference is the base, and the stirred policy is not: no check of the first KL, nor of the log-probs.
    "adapter": {"micro": 2, "shards": [5, 7], "settings": ADAPTER, "export": True},
    "heads": {"micro": 2, "shards": [5, 7], "settings": {"model.value_heads": "components"}},
    # Each rank with the ids that its own tokens were drawn from; one has no row at all.
    "filtered": {"micro": 2, "shards": [0, 12], "settings": {"rollout.top_p": 0.9, "ppo.entropy_coef": 0.05}},
    "detached": {"micro": 2, "shards": [12, 0], "settings": {"model.value": "shared_detached"}},
}


def alone(case: dict) -> dict:
    return case | {"shards": [12]}


def engine_file(folder: Path, engine: str) -> Path:
    if engine != "zero0":
        return FILES / f"{engine}.yaml"
    file = folder / "zero0.yaml"
    file.write_text((FILES / "zero2.yaml").read_text().replace("zero_stage: 2", "zero_stage: 0"))
    return file


@pytest.fixture(scope="module")
def by_one(tmp_path_factory) -> dict[str, dict]:
    results = many.stored_batch(tmp_path_factory.mktemp("one"), "cpu", "llama-tied", list(map(alone, CASES.values())))
    return dict(zip(CASES, results, strict=True))


def compare(got: dict, want: dict) -> None:
    assert max(max(map(abs, x)) for x in want["gradients"].values()) > 0.05  # there is something to compare
    assert farthest(got["gradients"], want["gradients"]) < 1e-5, got["case"]
    for name, value in want["means"].items():
        if name in got["means"]:  # ZeRO-0 does not tell the norm
            assert got["means"][name] == pytest.approx(value, abs=1e-5), (got["case"], name)
    if "exported" in want:
        assert got["whole_at_once"] == 0  # a sync gathers, hands over and lets go
        # After one step of AdamW, whose size is that of the rate wherever the gradient is not about 0.
        assert farthest(got["exported"], want["exported"]) < 2e-3
        assert sum(sum(map(abs, x)) for x in got["exported"].values()) == pytest.approx(
            sum(sum(map(abs, x)) for x in want["exported"].values()), rel=1e-4
        )


@pytest.mark.slow
def test_one_stored_batch_under_ddp(by_one, tmp_path):
    for got, want in zip(
        many.stored_batch(tmp_path, "ddp", "llama-tied", list(CASES.values())), by_one.values(), strict=True
    ):
        compare(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kinds"),
    [
        ("zero0", ["shared"]),
        ("zero1", ["adapter"]),
        ("zero2", ["separate"]),
        ("zero3", list(CASES)),
        ("zero3_offload", ["separate"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_one_stored_batch_in_shards(by_one, tmp_path, engine, kinds):
    """Gradients within 1e-5 of one process; parameters are sharded in fact, however small."""
    cases = [CASES[kind] for kind in kinds]
    results = many.stored_batch(tmp_path, engine, "llama-tied", cases, file=engine_file(tmp_path, engine))
    for kind, got in zip(kinds, results, strict=True):
        compare(got, by_one[kind])
        # What DeepSpeed allocates for each micro-batch; by default 2 GB.
        assert got["bucket"] == (None if engine == "zero0" else sum(map(len, got["gradients"].values())))


@pytest.mark.slow
@pytest.mark.parametrize(("sparing", "kinds"), [("true", ["shared"]), ("false", list(CASES))], ids=["sparing", "all"])
def test_one_stored_batch_under_fsdp2(by_one, tmp_path, sparing, kinds):
    """Accelerate's own sharding, on a CPU because it is told that it is on GPUs; what is tied stays tied.

    `sparing`: as `accelerate config` writes it, where tied parameters are parted and must be tied again.
    """
    file = tmp_path / "fsdp2.yaml"
    text, n = re.subn("(fsdp_cpu_ram_efficient_loading): .*", rf"\1: {sparing}", (FILES / "fsdp2.yaml").read_text())
    assert n == 1
    file.write_text(text)
    cases = [CASES[kind] | {"reload": True} for kind in kinds]
    results = many.stored_batch(tmp_path, "fsdp2", "llama-tied", cases, file=file)
    for kind, got in zip(kinds, results, strict=True):
        compare(got, by_one[kind])
        assert got["came_back"]


@pytest.mark.slow
@pytest.mark.long(seconds=100)
def test_twenty_steps_end_at_the_same_parameters(tmp_path):
    """By SGD: the step is the gradient, so rounding stays rounding."""
    case = {
        "micro": 2,
        "shards": [5, 7],
        "updates": 20,
        "sgd": True,
        "settings": {"optim.lr": 0.01, "run.checks": False},
    }
    start, want = many.stored_batch(tmp_path, "cpu", "llama-tied", [alone(case) | {"updates": 1}, alone(case)])
    assert farthest(want["parameters"], start["parameters"]) > 1e-2
    for engine in ("ddp", "zero3"):
        (got,) = many.stored_batch(tmp_path, engine, "llama-tied", [case])
        assert farthest(got["parameters"], want["parameters"]) < 1e-5, engine


LIVE = ["--run.eval_every", "100", "--data.eval_prompts", "4"]


def train(task: Path, folder: Path, engine: str, *options: str) -> Run:  # noqa: F811
    return many.run(task, folder, engine, *LIVE, *options)


@pytest.mark.slow
@pytest.mark.long(seconds=90)
@pytest.mark.parametrize("engine", ["zero1", "zero3_offload"])
def test_the_other_files_train_too(task, tmp_path, engine):  # noqa: F811
    """cpu, ddp and zero2 train in test_many_learners.py, zero3 below."""
    it = train(task, tmp_path / "r", engine, "--run.save_every", "100")
    assert it.end(240) == 0, it.words()
    rows = it.rows()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["optim/grad_norm"] > 0 and row["logprob_diff/max"] < 1e-4 for row in rows)
    assert (it.folder / "final" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("late", ["0", "1"])
def test_fsdp_is_refused_on_a_cpu(task, tmp_path, monkeypatch, late):  # noqa: F811
    """In rank 0's words, whichever rank gets there first: the launcher ends all as soon as one has failed."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, time\nif os.environ.get('RANK') == '{late}': time.sleep(4)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused = train(task, tmp_path / "r", "fsdp2", "--resources.device", "cpu")
    assert refused.end(60) == 2, refused.words()
    (said,) = [line for line in refused.words().splitlines() if line.startswith("tokenppo: ")]
    assert "FSDP: on a CPU" in said and "zero3.yaml" in said
    assert "Traceback" not in refused.words() and not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options"),
    [
        pytest.param("zero3", [], marks=pytest.mark.long(seconds=130)),
        pytest.param(
            "cpu",
            ["--model.lora_rank", "4", "--model.value", "lora", "--optim.lr", "0.01"],
            marks=pytest.mark.long(seconds=130),
        ),
        ("zero3", ["--model.lora_rank", "4", "--optim.lr", "0.01"]),
    ],
    ids=["zero3", "adapter", "zero3-adapter"],
)
def test_a_run_goes_on_from_its_checkpoint(task, tmp_path, engine, options):  # noqa: F811
    """Two steps, then two more, are the four of one run but for rounding."""
    schedule = ["--optim.schedule", "constant"]
    first = train(task, tmp_path / "r", engine, *options, *schedule, "--run.steps", "2")
    assert first.end(240) == 0, first.words()
    again = train(task, tmp_path / "r", engine, *options, *schedule, "--run.steps", "4")
    assert again.end(240) == 0, again.words()
    rows = again.rows()
    assert again.summary()["resumed_from"] == 2 and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["logprob_diff/max"] < 1e-3 for row in rows)
    assert rows[2]["objective/kl"] != rows[0]["objective/kl"]  # it did not begin anew
