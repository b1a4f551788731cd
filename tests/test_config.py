"""The configuration: shipped files load, overrides win, and every mistake is one line with key, value and remedy."""

import re
from pathlib import Path

import pytest
import yaml

from core.config import from_tree, load, markdown, parse_override, to_yaml
from core.faults import UserError
from core.schema import leaf_keys
from launch import arguments, cluster

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
LEAST = {"model.path": "gpt2", "data.path": "p.jsonl", "rewards.mine.fn": "r.py:fn"}


def refusal(overrides: dict[str, object], config: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        load(config, LEAST | overrides)
    return str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_load_and_are_short(path):
    cfg = load(path)
    assert Path(cfg.model.path).is_absolute() and cfg.rewards

    def count(tree: object) -> int:
        return sum(count(v) for v in tree.values()) if isinstance(tree, dict) else 1

    assert count(yaml.safe_load(path.read_text())) <= 24


def test_there_are_shipped_configs():
    assert "cards.yaml" in [p.name for p in SHIPPED]


@pytest.mark.parametrize(
    ("placed", "works"),
    [({}, False), ({"placement": "apart"}, True), ({"placement": "apart", "gpus_per_worker": 0.5}, False)],
)
def test_nccl_wants_a_gpu_for_everybody(placed, works):
    cfg = load(None, LEAST | {"sync.transport": "collective"} | {f"rollout.{key}": x for key, x in placed.items()})
    cluster.refuse_transport(cfg, "cpu", 1)
    if works:
        cluster.refuse_transport(cfg, "cuda", 1)
    else:
        with pytest.raises(UserError, match="sync.transport = collective: NCCL wants a GPU for each"):
            cluster.refuse_transport(cfg, "cuda", 1)


@pytest.mark.parametrize("transport", ["collective", "cuda_ipc"])
def test_a_transport_that_waits_for_workers_is_refused_where_they_write_ahead(transport):
    how = {"sync.transport": transport, "rollout.max_staleness": 1}
    assert refusal(how).startswith(f"sync.transport = {transport}: the learner would wait for workers")
    load(None, LEAST | how | {"rollout.max_staleness": 0})
    load(None, LEAST | how | {"sync.transport": "object_store"})


def test_every_key_is_explained():
    assert len(leaf_keys()) > 50
    assert not [key for key, (_, _, text) in leaf_keys().items() if len(text) < 10]


def test_a_config_written_down_loads_to_the_same(tmp_path):
    cfg = load(None, LEAST | {"rewards.mine.options": {"n": 3}, "ppo.cliprange_high": "0.3", "run.name": "a1"})
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load(tmp_path / "config.yaml") == cfg


def test_paths_belong_to_the_file_or_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    file = tmp_path / "there" / "c.yaml"
    file.write_text(
        "model: {path: org/name}\ndata: {path: ../d.jsonl}\nrewards: {a: {fn: r.py:f}, b: {fn: pkg.mod:f}}\n"
    )
    cfg = load(file, {"data.eval_path": "e.jsonl", "rewards.c.fn": "./q.py:g"})
    assert cfg.data.path == str(tmp_path / "d.jsonl")
    assert cfg.data.eval_path == str(tmp_path / "here" / "e.jsonl")
    assert cfg.model.path == "org/name"  # no such path: a hub id
    assert cfg.rewards["a"].fn == f"{tmp_path}/there/r.py:f"
    assert cfg.rewards["b"].fn == "pkg.mod:f"
    assert cfg.rewards["c"].fn == f"{tmp_path}/here/q.py:g"
    assert cfg.run.dir == str(tmp_path / "here" / "runs")


def test_overrides_are_read_by_the_schema():
    args = arguments.parse(
        ["--optim.lr", "1e-6", "--run.deterministic", "--run.name=123", "--log.trackers", "[]", "--ppo.target_kl=null"]
        + ["--rewards.mine.options.n", "3", "--rewards.new.fn", "n.py:f", "--rewards.new.weight", "-0.5"]
    )
    cfg = load(None, LEAST | args.overrides)
    assert (cfg.optim.lr, cfg.run.deterministic, cfg.run.name, cfg.log.trackers) == (1e-6, True, "123", [])
    assert cfg.ppo.target_kl is None and cfg.rewards["mine"].options == {"n": 3} and cfg.rewards["new"].weight == -0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"optim.lrr": "1"}, ["optim.lrr", "optim.lr?"]),
        ({"rewards.mine.wieght": "1"}, ["rewards.mine.wieght", "rewards.mine.weight?"]),
        ({"lr": "1"}, ["lr", "optim.lr?"]),
        ({"optim.learning_rate": "1"}, ["optim.learning_rate", "did you mean optim.lr?"]),
        ({"optim.lr": "fast"}, ["optim.lr", "'fast'", "number"]),
        ({"optim.lr": "nan"}, ["optim.lr", "finite"]),
        ({"optim.lr": "-1"}, ["optim.lr", "greater than or equal to 0"]),
        ({"rollout.temperature": "0"}, ["rollout.temperature", "greater than 0"]),
        ({"ppo.gamma": "1.5"}, ["ppo.gamma", "less than or equal to 1"]),
        ({"optim.schedule": "cosin"}, ["optim.schedule", "'constant', 'linear' or 'cosine'"]),
        ({"ppo.target_kl": "6", "ppo.kl_horizon": "100"}, ["ppo.kl_horizon = 100", "256"]),
        ({"ppo.mini_batch_size": "60"}, ["ppo.mini_batch_size = 60", "256", "[32, 64]"]),
        (
            {"rollout.batch_size": "254", "rollout.n_samples_per_prompt": "4"},
            ["rollout.batch_size = 254", "[252, 256]"],
        ),
        ({"ppo.estimator": "rloo"}, ["ppo.estimator = rloo", "rollout.n_samples_per_prompt to 2"]),
        (
            {"ppo.estimator": "grpo", "rollout.n_samples_per_prompt": "4", "ppo.value_lambda": "1"},
            ["ppo.value_lambda = 1.0", "ppo.estimator grpo", "leave it out"],
        ),
        (
            {"ppo.estimator": "reinforce_pp", "ppo.bootstrap_cut": "true"},
            ["ppo.bootstrap_cut = true", "wants a critic"],
        ),
        ({"ppo.estimator": "ppo"}, ["ppo.estimator", "'gae', 'reinforce_pp', 'rloo' or 'grpo'"]),
        ({"rollout.top_p": "0"}, ["rollout.top_p", "greater than 0"]),
        ({"rollout.top_k": "0"}, ["rollout.top_k = 0", "at least 2", "null is off"]),
        ({"rollout.top_k": "1"}, ["rollout.top_k = 1", "nothing is learnt"]),
        ({"rollout.min_p": "1"}, ["rollout.min_p", "less than 1"]),
        ({"rollout.stop": "x"}, ["rollout.stop: there is no such key", "rollout.stop_strings"]),
        ({"ppo.kl_loss": "k1"}, ["ppo.kl_loss", "'k2' or 'k3'"]),
        ({"ppo.ptx_coef": "0.1"}, ["ppo.ptx_coef = 0.1", "data.ptx_path"]),
        ({"data.ptx_path": "texts.jsonl"}, ["data.ptx_path", "ppo.ptx_coef"]),
        ({"run.name": "../up"}, ["run.name = ../up", "letter or digit"]),
        ({"rewards.mine.weight": "0"}, ["weight 0"]),
        ({"rewards.total.fn": "r.py:f"}, ["rewards.total"]),
        ({"rewards.a-b.fn": "r.py:f"}, ["rewards.a-b"]),
        ({"model.path": None}, ["model.path", "string"]),
        ({"optim": "fast"}, ["optim", "'fast'"]),
    ],
)
def test_mistakes_are_one_line_with_key_and_remedy(overrides, words):
    text = refusal(overrides)
    assert "\n" not in text and not [w for w in words if w not in text], text


def test_what_is_missing_is_named_by_the_option_that_gives_it():
    with pytest.raises(UserError) as error:
        load(None, {})
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "model.path",
        "data.path",
        "rewards.NAME.fn",
    ]


def test_mistakes_in_the_file_name_file_and_line(tmp_path):
    assert "no such file" in refusal({}, tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("model:\n  path: [\n")
    assert "broken.yaml:3" in refusal({}, tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "list" in refusal({}, tmp_path / "list.yaml")


@pytest.mark.parametrize("argv", [["--lr", "1"], ["optim.lr=1"], ["--config"]])
def test_what_is_no_option_is_refused(argv):
    with pytest.raises(UserError):
        arguments.parse(argv)


def test_a_key_given_twice_in_a_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: {lr: 1.0e-3}\nrun: {steps: 3}\noptim: {schedule: constant}\n")
    assert "c.yaml:3" in refusal({}, tmp_path / "c.yaml") and "`optim` appears twice" in refusal(
        {}, tmp_path / "c.yaml"
    )


def test_numbers_of_a_file_are_numbers_without_a_point_too(tmp_path):
    (tmp_path / "c.yaml").write_text("rewards: {mine: {fn: r.py:f, options: {scale: 1e-3, n: 4, name: e5}}}\n")
    assert load(tmp_path / "c.yaml", LEAST).rewards["mine"].options == {"scale": 1e-3, "n": 4, "name": "e5"}


def test_parse_override_knows_null_and_yaml():
    assert parse_override("ppo.target_kl", "null") is None and parse_override("ppo.target_kl", "none") is None
    assert parse_override("ppo.scale_values", "none") == parse_override("rewards.mine.normalize", "none") == "none"
    assert parse_override("log.trackers", "[wandb]") == ["wandb"]
    with pytest.raises(UserError, match="YAML"):
        parse_override("log.trackers", "[wandb")


def test_from_tree_refuses_a_component_without_a_function():
    with pytest.raises(UserError, match="rewards.a.fn"):
        from_tree({"model": {"path": "m"}, "data": {"path": "d"}, "rewards": {"a": {"weight": 1}}})


def test_the_page_of_keys_is_generated_and_whole():
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == markdown(), "python -m core.config > docs/configuration.md"
    for key in leaf_keys():
        head, leaf = key.rsplit(".", 1)
        assert f"| `{leaf}` |" in page.split(f"## {head}\n")[1].split("\n## ")[0]
    assert "| `gamma` | float | `1.0` | >= 0, <= 1 | Discount per token. |" in page
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 6 for line in page.splitlines() if line.startswith("| `"))


def test_filters_that_are_on_are_named_for_an_engine_that_cannot_say_what_they_kept():
    assert load(None, LEAST).rollout.untold_filter is None
    rollout = load(None, LEAST | {"rollout.top_p": "0.9", "rollout.stop_strings": ["x"]}).rollout
    key, value, remedy = rollout.untold_filter
    assert (key, value) == ("rollout.top_p", 0.9) and "leave the filter out" in remedy
    assert rollout.filters == {"top_p": 0.9}
    assert load(None, LEAST | {"rollout.top_k": "5", "rollout.min_p": "0.1"}).rollout.filters == {
        "top_k": 5,
        "min_p": 0.1,
    }
