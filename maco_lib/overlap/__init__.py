"""Work beside a collective (`api`), by a plan (`execute`) that was measured (`planner`)."""

import importlib

_HOMES = {
    "overlap": "maco_lib.overlap.api",  # run a computation and a collective side by side
    "start": "maco_lib.overlap.api",  # start a collective, go on, wait later
    "Handle": "maco_lib.overlap.execute",  # a collective in flight
    "Plan": "maco_lib.overlap.plan",  # one way to do it: backend, order, stream
    "tune": "maco_lib.overlap.planner",  # find the fastest plan at once
    "decisions": "maco_lib.overlap.plan",  # how plans were chosen
    "linear_all_reduce": "maco_lib.linear.op",  # a matmul and the all-reduce of its result, as one operation
    "linear_all_reduce_norm": "maco_lib.linear.norm",  # that, the residual and the RMSNorm, for decoding
    "tune_linear": "maco_lib.linear.planner",  # find its fastest plans at once
    "LinearPlan": "maco_lib.linear.plan",  # one way to do that
    "RowParallelLinear": "maco_lib.linear.layer",  # a layer that does it
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"maco_lib.overlap has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
