"""RoundPlan: how batches are written in rounds (`rollout.round_tokens`), on each learner rank by itself.

    step s   take prompts ─> round ─> round ... until as many prompts are ready as a batch has ─> batch of step s
                              └ every response that is not over gets `tokens` more

Legend: N ranks. Ranks never ask each other: ordinal o stands at place p = o mod `prompts_per_step` of a batch, and
belongs to rank p mod N. So every rank takes as many prompts in each step as it trains on, and what is under way besides
(`rollout.extra_prompts`, the first places) is dealt out evenly too.
"""

from dataclasses import dataclass

from core.trajectory import PromptRequest


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    tokens: int  # that a response gets in a round at most
    prompts_per_step: int  # of all ranks
    chunk_size: int
    rank: int = 0
    n_ranks: int = 1

    def owner(self, place: int) -> int:
        """The rank of the prompt at a place of a batch; places go on in the next batch."""
        return place % self.prompts_per_step % self.n_ranks

    @property
    def quota(self) -> int:
        """Prompts of this rank in every batch."""
        return sum(self.owner(place) == self.rank for place in range(self.prompts_per_step))

    def of_rank(self, requests: list[PromptRequest]) -> list[PromptRequest]:
        """Those of newly taken prompts, of all ranks, that are written on this one."""
        return [request for request in requests if self.owner(request.ordinal) == self.rank]

    def chunks(self, requests: list[PromptRequest]) -> list[list[PromptRequest]]:
        """What is written together in a round, by one worker: samples of this rank, in order."""
        return [requests[i : i + self.chunk_size] for i in range(0, len(requests), self.chunk_size)]
