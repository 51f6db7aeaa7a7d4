"""All-reduce by torch's own symmetric-memory kernels: peers read each other's buffers.

One-shot: every rank reads all of every peer's tensor, (P - 1) S bytes in one step; wins at small sizes. Two-shot: every
rank sums its share, then reads the others' sums, 2 (P - 1) S / P bytes; wins over NCCL at medium and large sizes on few
GPUs, with 24 CTAs. Both need GPUs that can reach each other's memory; bf16 or fp32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from maco_lib.comm.symmetric import Region, SymmetricAllReduce


@dataclass(frozen=True)
class OneShot(SymmetricAllReduce):
    """Out of place: the peers read the input to the end. Needs GPUs as TwoShot, bf16 or fp32."""

    in_place = False

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        torch.ops.symm_mem.one_shot_all_reduce_out(source, "sum", group.group_name, result)


@dataclass(frozen=True)
class TwoShot(SymmetricAllReduce):
    """In place. Needs GPUs of one host that can access each other's memory, bf16 or fp32."""

    def reduce(self, region: Region, source: torch.Tensor, result: torch.Tensor, group: dist.ProcessGroup) -> None:
        torch.ops.symm_mem.two_shot_all_reduce_(source, "sum", group.group_name)


BACKENDS = (OneShot("symm_mem_one_shot"), TwoShot("symm_mem_two_shot"))
PLACE = 2
