"""tokenppo: RLHF in which every token is rewarded. The public face, for scripts and notebooks and for the command.

    import tokenppo

    def polite(completions, **_):
        return [1.0 if "please" in text else 0.0 for text in completions]

    run = tokenppo.train(model="Qwen/Qwen2.5-0.5B-Instruct", prompts=["Ask for salt."], rewards={"polite": polite},
                         optim={"lr": 1e-6})
    print(run.summary["eval"], run.folder)

`python -m tokenppo` and `tokenppo` are the command: see `tokenppo --help`. Nothing heavy is imported before it is used.
"""

import gc
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.train import RunResult
    from reward_server.placing import Span

__all__ = ["Span", "evaluate", "train"]

_PACKAGES = ("core", "trainer", "rollout", "reward_server", "launch")


def shadowed_package() -> str | None:
    """Why our packages cannot be used, in one line: one of their (generic) names belongs to somebody else here."""
    house = Path(__file__).resolve().parent
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [Path(p).resolve() for p in (spec.submodule_search_locations or [spec.origin])] if spec else []
        if places[:1] != [house / name]:
            found = str(places[0]) if places else "nothing"
            return (
                f"import {name} finds {found}, not tokenppo's {house / name}: it shadows a package of ours;"
                " rename it, start from another folder, or take its folder off PYTHONPATH"
            )
    return None


def refuse_if_shadowed() -> None:
    """Exit with code 2 and the path that shadows a package of ours, before anything of it is imported."""
    if problem := shadowed_package():
        print(f"tokenppo: {problem}", file=sys.stderr)
        raise SystemExit(2)


def claim_packages() -> None:
    """Start hook of Ray's workers: import our packages now, before Ray puts the driver's folder in front of them."""
    refuse_if_shadowed()
    collect_less_often()
    for name in _PACKAGES:
        importlib.import_module(name)


def collect_less_often() -> None:
    """For processes of ours: look for unreachable cycles every 50,000 new objects, not every 700.

    Importing torch and transformers makes millions that stay: a fifth of a process's start was spent on looking.
    """
    gc.set_threshold(50_000, 20, 10)


def __getattr__(name: str) -> Any:
    if name == "Span":
        from reward_server.placing import Span

        return Span
    raise AttributeError(f"module 'tokenppo' has no attribute {name!r}; it has {', '.join(__all__)}")


def train(
    *,
    model: str | dict[str, Any],
    rewards: dict[str, Any],
    prompts: list[Any] | None = None,
    held_out: list[Any] | None = None,
    config: str | Path | None = None,
    **sections: dict[str, Any],
) -> "RunResult":
    """Train with PPO in this process, on a local Ray that is started for it and ended after it.

    Args:
        model: `model.path`, or the section as a dict.
        rewards: name -> function, or `file.py:fn`, or a dict as in a config file whose `fn` may be a function.
        prompts: texts, lists of messages, or rows (dicts with `prompt` and further columns, which reach the rewards);
            None where `data={"path": ...}` or the config file names a dataset.
        held_out: prompts of the evaluations, in the same form.
        config: a YAML file; what is given here wins over it.
        sections: `optim={"lr": 1e-6}`, `run={"name": "first", "steps": 20}` and so on: see `tokenppo train --help`.
    Returns:
        RunResult with `folder` (config.yaml, metrics.jsonl, summary.json, best/, final/) and `summary`.
    Raises:
        core.faults.Fault: UserError for what cannot work as written, others by kind.
    """
    refuse_if_shadowed()
    from launch.train import train_in_process

    return train_in_process(
        model=model, rewards=rewards, prompts=prompts, held_out=held_out, config=config, sections=sections
    )


def evaluate(
    policy: str | Path,
    *,
    weights: str = "final",
    against: str | Path | None = None,
    config: str | Path | None = None,
    data: str | Path | None = None,
    prompts: int | None = None,
    samples: int = 1,
    metric: str | None = None,
    by: str | None = None,
) -> dict[str, Any]:
    """Answer held-out prompts with a policy, score the answers, and compare them with another policy's.

    Args:
        policy: path of a run folder or a model, or a hub id.
        weights: of a run: `final`, `best`, or `base` (the model it started from).
        against: `base`, `best`, `final` (of the same run), or what `policy` may be.
        config, data, prompts, samples, metric, by: as the options of `tokenppo eval --help`.
    Returns:
        what `tokenppo eval --json` prints: docs/evaluation.md. `["metrics"]["reward/total"]["policy"]["value"]` is a
        mean.
    Raises:
        core.faults.Fault: UserError for what cannot work as written, others by kind.
    """
    refuse_if_shadowed()
    from launch.cluster import prepare_environment

    prepare_environment()
    from launch.evaluate import evaluate
    from launch.evaluation_text import to_dict

    words = {"against": against, "config": config, "data": data}
    made = evaluate(
        str(policy),
        weights=weights,
        **{name: None if word is None else str(word) for name, word in words.items()},
        prompts=prompts,
        samples=samples,
        metric=metric,
        by=by,
    )
    return to_dict(*made)


def main() -> None:
    """The command `tokenppo`."""
    refuse_if_shadowed()
    collect_less_often()
    from launch.cli import main as cli

    raise SystemExit(cli(sys.argv[1:]))


if __name__ == "__main__":
    main()
