"""Operators of torch's own kind, which torch.compile keeps whole and a CUDA graph captures as they are.

What `torch.library.custom_op` makes of a function that changes none of its arguments and has no backward, without what
that does in every call: a quarter of what an eager `linear_all_reduce` costs the host beside the matmul. Nothing checks
that a result is a new tensor.
"""

import functools
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("maco", "FRAGMENT")


def custom_op(name: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Make the decorated function, whose schema follows from its annotations, `torch.ops.maco.<name>`.

    Its first argument is a tensor, of the type that it computes in: within torch.autocast, too.

    fake: gives what it returns, by the same arguments, without data. torch.compile does not look into the function,
    wherever it meets the operator. Returns the operator.
    """

    def make(function: Callable) -> Callable:
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))

        @functools.wraps(function)
        def run(x: torch.Tensor, *arguments):
            if not torch.is_autocast_enabled(x.device.type):
                return function(x, *arguments)
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *arguments)

        LIBRARY.impl(name, torch.compiler.disable(run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"maco::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.maco, name).default

    return make
