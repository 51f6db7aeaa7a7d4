"""The CUDA kernels compile with the NVRTC that torch brings to a GPU, whatever they are compiled for."""

import pytest
import torch

pytest.importorskip("cuda.bindings.nvrtc")

from maco_lib.kernels import compiled, decode, ll128, persistent
from maco_lib.linear.techniques.persistent_time import TILINGS, Tiling

BF16, FP16 = torch.bfloat16, torch.float16


def persistent_of(tiling: Tiling, num_ranks: int, dtype: torch.dtype = BF16, **options: bool) -> persistent.Constants:
    options = {"has_bias": False, "has_residual": False, **options}
    return persistent.Constants(tiling.columns, 2 if tiling.pairs else 1, num_ranks - 1, num_ranks, dtype, **options)


PERSISTENT = dict.fromkeys(
    [
        *(persistent_of(tiling, num_ranks) for tiling in TILINGS for num_ranks in (2, 4)),
        *(persistent_of(tiling, 3, FP16, has_bias=True, has_residual=True) for tiling in TILINGS),
        persistent_of(TILINGS[0], 2, trace=True),
        persistent_of(TILINGS[0], 2, strict=True),
    ]
)
DECODE = [
    decode.Constants(rows, cluster, boxes, num_ranks, dtype)
    for rows, cluster, boxes in ((8, 2, 2), (16, 1, 1), (32, 4, 4), (64, 2, 2))
    for num_ranks, dtype in ((2, BF16), (4, FP16))
]
LL128 = [
    ll128.Constants(num_ranks - 1, num_ranks, dtype, warps, passes, one_shot, norm)
    for num_ranks, one_shot in ((2, True), (4, False), (8, True))
    for dtype in ll128.KINDS
    for warps, passes, norm in ((16, 1, False), (9, 2, True))
]


@pytest.mark.parametrize("constants", [*PERSISTENT, *DECODE, *LL128], ids=str)
def test_it_compiles(constants):
    name = type(constants).__module__.rpartition(".")[2] + "_kernel"
    assert name.encode() in compiled.cubin(constants.source(), name)


def test_a_mistake_is_told_in_the_compilers_words():
    with pytest.raises(RuntimeError, match='mistaken.*identifier "nothing" is undefined'):
        compiled.cubin('extern "C" __global__ void mistaken(int* to) { *to = nothing; }', "mistaken")
