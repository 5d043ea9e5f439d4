"""Ways: how the ranks of a shard talk to each other, where there is more than one way. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from pagetable.errors import ConfigError

COLLECTIVES = ("auto", "gloo")
TABLE_BROADCASTS = ("auto", "sockets", "torch")


@dataclass(frozen=True, slots=True)
class Ways:
    """Equal on all ranks of a shard.

    Attributes:
        collectives: of hidden rows, sums and partial attention. "auto": shared memory between ranks of one host, gloo
            between hosts; "gloo": everywhere.
        table_broadcast: of plans, and with them of table changes. "sockets": one to each rank; "torch":
            torch.distributed; "auto": shared memory to the ranks of the leader's host, sockets to others.

    Errors: ConfigError where a value is none of those.
    """

    collectives: str = "auto"
    table_broadcast: str = "auto"

    def __post_init__(self) -> None:
        for field, choices in (("collectives", COLLECTIVES), ("table_broadcast", TABLE_BROADCASTS)):
            if getattr(self, field) not in choices:
                raise ConfigError(field, getattr(self, field), f"be one of {', '.join(choices)}")

    @property
    def plans_by_torch(self) -> bool:
        return self.table_broadcast == "torch"

    @property
    def plans_in_memory(self) -> bool:
        """To ranks that share memory with the leader."""
        return self.table_broadcast == "auto"

    @property
    def shares_memory(self) -> bool:
        return self.collectives == "auto"
