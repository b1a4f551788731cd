"""UnderWay: prompts of one learner rank between the moment they are taken and the batch that they are trained in.

    taken ──> written on, round after round ──> ready: all samples are over ──> a batch
              begun                             in the order in which they became ready; of one round, by ordinal

With `rollout.round_tokens` a response gets so many tokens in a round, under one version of the weights. Who is ready
when is decided by the responses alone, never by a clock. Values: each change makes a new one, so what a checkpoint
saves is what it was when it was looked at, whoever writes on meanwhile. A prompt is what counts, with all its samples.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from core.trajectory import PromptRequest, Trajectory


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """Example, two samples a prompt: prompt 3 is ready, of prompt 4 one sample is over and one holds some tokens, and
    prompt 5 was just taken:

        prompts  {3: (3/0, 3/1), 4: (4/0, 4/1), 5: (5/0, 5/1)}
        begun    {4/1: its tokens so far, 5/0: None, 5/1: None}
        ready    (3,)
    """

    prompts: dict[int, tuple[PromptRequest, ...]] = field(default_factory=dict)  # ordinal -> its samples, by k
    begun: dict[str, Trajectory | None] = field(default_factory=dict)  # uid of each that is not over -> its start
    ready: tuple[int, ...] = ()  # ordinals, the next one to be trained on first

    @property
    def writing(self) -> list[PromptRequest]:
        """Samples that are not over, by (ordinal, k)."""
        return [r for ordinal in sorted(self.prompts) for r in self.prompts[ordinal] if r.sample_uid in self.begun]

    @property
    def uids(self) -> set[str]:
        """Of all samples."""
        return {r.sample_uid for requests in self.prompts.values() for r in requests}

    @property
    def unfinished(self) -> list[Trajectory]:
        """What is there of the samples that are not over, by (ordinal, k). After a round all have begun."""
        return sorted((t for t in self.begun.values() if t is not None), key=lambda t: t.order)

    def take(self, requests: Iterable[PromptRequest]) -> "UnderWay":
        """With new prompts: all samples of each."""
        fresh: dict[int, tuple[PromptRequest, ...]] = {}
        for r in requests:
            fresh[r.ordinal] = (*fresh.get(r.ordinal, ()), r)
        assert not fresh.keys() & self.prompts.keys(), "a prompt is taken twice"
        begun = {r.sample_uid: None for of_prompt in fresh.values() for r in of_prompt}
        return replace(self, prompts=self.prompts | fresh, begun=self.begun | begun)

    def after_round(self, unfinished: Iterable[Trajectory]) -> "UnderWay":
        """After all of `writing` got more tokens: those that are not over now; the others are."""
        begun: dict[str, Trajectory | None] = {t.request.sample_uid: t for t in unfinished}
        assert begun.keys() <= self.begun.keys(), "what came back was not under way"
        waiting = self.prompts.keys() - set(self.ready)
        done = sorted(o for o in waiting if not any(r.sample_uid in begun for r in self.prompts[o]))
        return replace(self, begun=begun, ready=(*self.ready, *done))

    def batch(self, n_prompts: int) -> tuple[list[PromptRequest], "UnderWay"]:
        """The samples of the first prompts that are ready, by (ordinal, k), and what stays."""
        chosen = set(self.ready[:n_prompts])
        assert len(chosen) == n_prompts, f"{len(chosen)} of {n_prompts} prompts are ready"
        requests = [r for ordinal in sorted(chosen) for r in self.prompts[ordinal]]
        left = {ordinal: of for ordinal, of in self.prompts.items() if ordinal not in chosen}
        return requests, replace(self, prompts=left, ready=self.ready[n_prompts:])

    @classmethod
    def restored(cls, trajectories: Iterable[Trajectory], ready: Sequence[int]) -> "UnderWay":
        """From what a checkpoint has of each sample, over or not. Samples that were dropped have no row, and of a ready
        prompt there may be none."""
        prompts: dict[int, tuple[PromptRequest, ...]] = dict.fromkeys(ready, ())
        begun: dict[str, Trajectory | None] = {}
        for t in sorted(trajectories, key=lambda t: t.order):
            prompts[t.request.ordinal] = (*prompts.get(t.request.ordinal, ()), t.request)
            if t.finish_reason is None:
                begun[t.request.sample_uid] = t
        return cls(prompts=prompts, begun=begun, ready=tuple(ready))


@dataclass(frozen=True, kw_only=True)
class Written:
    """A batch of one rank whose responses are all written, and on their way to be scored."""

    requests: list[PromptRequest]  # of the batch
    pending: list[Any]  # what `submit` gave: of the batch, but for what was scored before, and of what is not in it yet
    seconds: float  # from the first call of a worker to the last response
    rounds: int = 1
    under_way: UnderWay = UnderWay()  # what is left


Saved = tuple[list[Trajectory], list[int]]  # what a checkpoint has of one rank: responses, and prompts that are ready


def deal(of_ranks: Sequence[Saved], n_ranks: int, rank: int, owner: Callable[[int], int]) -> Saved:
    """What of a checkpoint's is under way on `rank` now. `of_ranks`: as its ranks had it.

    With as many ranks as before, their own. Else all prompts are dealt out anew: the i-th of them goes to the rank of
    place i of a batch, `owner(i)`. For as many prompts were trained on as fill whole batches, so those that are under
    way are as many as follow after them, and every rank gets as many as it would have taken itself.
    """
    if len(of_ranks) == n_ranks:
        return of_ranks[rank]
    everything: list[Any] = [t for trajectories, _ in of_ranks for t in trajectories]
    ready = [ordinal for _, of_rank in of_ranks for ordinal in of_rank]
    ordinals = sorted({t.request.ordinal for t in everything} | {*ready})
    mine = {ordinal for i, ordinal in enumerate(ordinals) if owner(i) == rank}
    return [t for t in everything if t.request.ordinal in mine], [ordinal for ordinal in ready if ordinal in mine]
