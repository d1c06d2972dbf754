"""The ranks of one process group: what they exchange, and how many bytes leave this one."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


class Transfer(NamedTuple):
    """A tensor on its way here."""

    tensor: torch.Tensor
    works: list[dist.Work]
    sent: torch.Tensor  # must stay unchanged until it has left

    def wait(self) -> torch.Tensor:
        """The tensor, once it is here and what was sent has left."""
        for work in self.works:
            work.wait()
        return self.tensor


class Ranks:
    """This process among the ranks that share something; alone, it needs no process group.

    Args:
        members: their ranks in the world, in the order of the group.
        rank: this process's place among them.
        group: their process group, None for one rank.
    """

    def __init__(self, members: Sequence[int], rank: int, group: dist.ProcessGroup | None = None) -> None:
        assert group is not None or len(members) == 1, f"the ranks {list(members)} need a process group"
        self.members = tuple(members)
        self.rank = rank
        self.group = group
        self.bytes_sent = 0  # to other ranks, since the start or since a reader set it to 0

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.members)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (n, ...): part i goes to rank i, and part i of the result came from rank i."""
        assert tensor.shape[0] == self.size
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        dist.all_to_all_single(received, tensor, group=self.group)
        self.bytes_sent += (self.size - 1) * tensor[0].numel() * tensor.element_size()
        return received

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, which have one shape."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in self.members]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        self.bytes_sent += (self.size - 1) * tensor.numel() * tensor.element_size()
        return parts

    def pass_on(self, tensor: torch.Tensor) -> Transfer:
        """Send to the next rank of the ring, receive the same shape from the one before; others work meanwhile."""
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        after, before = self.members[(self.rank + 1) % self.size], self.members[self.rank - 1]
        send = dist.P2POp(dist.isend, tensor, after, group=self.group)
        receive = dist.P2POp(dist.irecv, received, before, group=self.group)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return Transfer(received, dist.batch_isend_irecv([send, receive]), tensor)
