"""Scorer: all components of a configuration; the same object behind Ray, HTTP and `tokenppo check-reward`."""

import asyncio
from collections.abc import Callable, Iterable

from core.faults import RewardFault
from core.schema import RewardConfig
from reward_server.components import Component, Placed, ScoreRequest, load_component, score_components


class Scorer:
    def __init__(self, rewards: dict[str, RewardConfig], functions: dict[str, Callable] | None = None) -> None:
        """`functions`: callables of the user's script by component name; they win over `fn`.

        Raises UserError for a component that is not there or does not take its options.
        """
        functions = functions or {}
        # One event loop for its whole life: connections of `async` components stay open from batch to batch.
        # Not asyncio.Runner: on the main thread it writes out the last answer, rewards and all, to restore SIGINT.
        self._loop = asyncio.new_event_loop()
        self._components = {
            name: Component(
                name,
                functions[name] if name in functions else load_component(spec.fn),
                spec.options,
                spans=spec.spans,
                observations=spec.observations,
            )
            for name, spec in rewards.items()
        }

    @property
    def names(self) -> list[str]:
        return list(self._components)

    @property
    def parts(self) -> list[Callable]:
        """The functions and objects behind the components."""
        return [component.fn for component in self._components.values()]

    def setup(self, device: str) -> None:
        """Have every component load what it needs. `device`: `cpu` or `cuda`. Raises UserError."""
        for component in self._components.values():
            component.setup(device)

    def score(self, request: ScoreRequest, names: Iterable[str] | None = None) -> dict[str, list[Placed | RewardFault]]:
        """Of each component, or of those in `names`: for each sample its raw rewards, or the fault it has instead."""
        wanted = self.names if names is None else names
        return score_components([self._components[name] for name in wanted], request, self._loop.run_until_complete)

    def close(self) -> None:
        for component in self._components.values():
            component.close(self._loop.run_until_complete)
        self._loop.close()
