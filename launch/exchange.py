"""Exchange: a small actor through which learner ranks hand references to each other, each a Ray driver of its own.

    rank 0     post(("weights", r), [digests, bucket refs])               -> every rank r that drives workers
    rank d     post(("chunks", r), [chunk ref])                           -> its guest r, a rank without workers
    rank r     take(("weights", r))

References travel inside lists: so they arrive as references and their data stays where it is. `take` waits for the
next item of its box; the caller's deadline unblocks it. The actor ends with rank 0, which made it.
"""

import asyncio
from collections import defaultdict
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from core.faults import ProcessFault
from launch.reservation import on_node

Box = tuple[str, int]  # kind of content, rank that it is for


class ExchangeActor:
    def __init__(self) -> None:
        self._boxes: dict[Box, asyncio.Queue] = defaultdict(asyncio.Queue)

    async def post(self, box: Box, item: list[Any]) -> None:
        self._boxes[box].put_nowait(item)

    async def take(self, box: Box) -> list[Any]:
        return await self._boxes[box].get()


class Exchange:
    """The same on the driver's side, with deadlines."""

    def __init__(self, actor: Any, timeout_s: float) -> None:
        self._actor, self._timeout_s = actor, timeout_s

    @classmethod
    def create(cls, name: str, timeout_s: float) -> "Exchange":
        """The actor, under a name in a Ray namespace of the same name."""
        here = on_node(ray.get_runtime_context().get_node_id())  # another one may be lost
        remote = ray.remote(ExchangeActor).options(name=name, namespace=name, num_cpus=0, max_concurrency=1000, **here)
        exchange = cls(remote.remote(), timeout_s)
        ray.get(exchange._actor.__ray_ready__.remote(), timeout=timeout_s)
        return exchange

    @classmethod
    def join(cls, name: str, timeout_s: float) -> "Exchange":
        return cls(ray.get_actor(name, namespace=name), timeout_s)

    def post(self, box: Box, item: list[Any]) -> None:
        """Returns once the actor has it: the references in it are safe from then on."""
        self._wait(self._actor.post.remote(box, item), f"post {box}")

    def take(self, box: Box, timeout_s: float | None = None) -> list[Any]:
        return self._wait(self._actor.take.remote(box), f"take {box}", timeout_s)

    def _wait(self, answer: Any, what: str, timeout_s: float | None = None) -> Any:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            return ray.get(answer, timeout=timeout_s)
        except GetTimeoutError:
            raise ProcessFault(f"{what}: no other learner rank did its part within {timeout_s:g} s") from None
        except RayActorError as error:
            raise ProcessFault(f"{what}: the exchange between learner ranks is gone ({error})") from None
