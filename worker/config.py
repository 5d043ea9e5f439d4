"""How one shard schedules: frozen, checked once, handed down whole."""

from __future__ import annotations

from dataclasses import dataclass

from pagetable.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ShardConfig:
    """Limits of a shard's scheduler.

    Attributes:
        num_blocks: pages that the pool holds, over all groups.
        num_stages: of the pipeline: so many plans may be in flight.
        async_scheduling: one plan more: it is made while those before it run, from tokens that are not known yet, and
            ranks fill them in.
        max_model_len: prompt and output tokens of one sequence.
        max_num_seqs: sequences that hold pages at the same time.
        max_num_batched_tokens: query tokens of one step; running decodes come first, prefill chunks share the rest.
        max_num_partial_prefills: prompts that may be computed in part at the same time.
        deterministic: a token's logits depend on its sequence alone, bit for bit: not on the batch, on how prompts are
            cut into chunks, or on the number of threads.
        kv_cache_dtype: of pages: "auto", that of the weights, or "int8".
        preallocate_kv_cache: a CPU's pool takes its memory when it is made, not as its pages are first written.
        max_waiting: requests in the queue; one more is refused.
        max_pool_share: what one sequence may hold of the pool while others wait for pages (never binds on the oldest).
        max_preemptions: after so many a sequence comes back only when it cannot be preempted again.
    """

    num_blocks: int
    block_size: int = 16
    num_stages: int = 1
    async_scheduling: bool = False
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_num_partial_prefills: int = 8
    enable_prefix_caching: bool = True
    deterministic: bool = False
    kv_cache_dtype: str = "auto"
    preallocate_kv_cache: bool = False
    max_waiting: int = 16384
    max_pool_share: float = 0.5
    max_preemptions: int = 3

    def __post_init__(self) -> None:
        for name in (
            "num_blocks",
            "block_size",
            "num_stages",
            "max_model_len",
            "max_num_seqs",
            "max_num_partial_prefills",
            "max_waiting",
            "max_preemptions",
        ):
            value = getattr(self, name)
            if not value >= 1:
                raise ConfigError(name, value, "be at least 1")
        if not 0 < self.max_pool_share <= 1:
            raise ConfigError("max_pool_share", self.max_pool_share, "be above 0 and at most 1")
        least = self.max_num_seqs + self.block_size
        if self.max_num_batched_tokens < least:
            raise ConfigError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"be at least max_num_seqs + block_size = {least}, so that a prompt advances beside all decodes",
                "raise it or lower max_num_seqs",
            )
        if self.max_model_len > self.num_blocks * self.block_size:
            raise ConfigError(
                "max_model_len",
                self.max_model_len,
                f"be at most the pool's {self.num_blocks} blocks of {self.block_size} tokens"
                f" = {self.num_blocks * self.block_size}",
                "lower it or give the pool more memory",
            )

    @property
    def max_in_flight(self) -> int:
        """Plans that have been made and not retired, at most."""
        return self.num_stages + self.async_scheduling
