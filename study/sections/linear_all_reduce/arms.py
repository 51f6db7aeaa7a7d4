"""The ways of section 5: each method as a function that runs its operation once, on the weight it is told."""

from collections.abc import Callable

import torch

from maco_lib import state as states
from maco_lib.comm import c10d
from maco_lib.linear.planner import planner
from maco_lib.linear.techniques.chunked import cut
from maco_lib.overlap import LinearPlan, linear_all_reduce, tune_linear
from study.sections.linear_all_reduce.methods import CHAIN, METHODS, Method
from study.sections.linear_all_reduce.problem import EPS, Outputs, Problem, Run

WAYS: dict[str, Callable[[Problem, Method], Run]] = {}


def way(make: Callable[[Problem, Method], Run]) -> Callable[[Problem, Method], Run]:
    WAYS[make.__name__] = make
    return make


def run_of(problem: Problem, operation: str, name: str) -> Run:
    """`run(number)` of a method: (result,), or of the chain (normed, residual_out), with weight `number` of `problem`.

    Collective. Raises ValueError, RuntimeError or ImportError, with the reason, where it cannot be used here.
    """
    method = METHODS[operation][name]
    run = WAYS[method.how](problem, method)
    return normed(problem, run, method.norm) if operation == CHAIN and method.how != "norm" else run


@way
def in_place(problem: Problem, method: Method) -> Run:
    operation = problem.operation(method.backend)
    product = operation.source.view(problem.m, problem.n)
    result = operation.result.view(problem.m, problem.n)

    def run(number: int) -> Outputs:
        torch.mm(problem.x, problem.weights[number].t(), out=product)
        operation.run()
        return (result,)

    return run


@way
def plan(problem: Problem, method: Method) -> Run:
    chosen = LinearPlan(**method.plan)
    return lambda number: (linear_all_reduce(problem.x, problem.weights[number], group=problem.group, plan=chosen),)


@way
def retired(problem: Problem, method: Method) -> Run:
    raise ValueError("this version has no such technique: it lost wherever it was measured (docs/tried.md)")


@way
def untuned(problem: Problem, method: Method) -> Run:
    owner = planner(problem.group, problem.device)
    layer = owner.layer(problem.weights[0])
    chosen = problem.chosen["auto_untuned"] = owner.look_up(layer, problem.m)
    return lambda number: (linear_all_reduce(problem.x, problem.weights[number], group=problem.group, plan=chosen),)


@way
def auto(problem: Problem, method: Method) -> Run:
    decision = tune_linear(problem.weights[0], [problem.m], problem.group)[problem.m]
    problem.chosen["auto"] = decision.chosen
    return lambda number: (linear_all_reduce(problem.x, problem.weights[number], group=problem.group, plan="auto"),)


@way
def norm(problem: Problem, method: Method) -> Run:
    from maco_lib.overlap import linear_all_reduce_norm

    def run(number: int) -> Outputs:
        weight, after = problem.weights[number], (problem.residual, problem.norm_weight, EPS)
        return linear_all_reduce_norm(problem.x, weight, *after, group=problem.group, plan=method.norm)

    return run


@way
def async_tp(problem: Problem, method: Method) -> Run:
    import torch.distributed._symmetric_memory

    if problem.device.type != "cuda":
        raise ValueError("torch's async-TP is for GPUs")
    if problem.m % problem.group.size():
        raise ValueError(f"{problem.m} rows cannot be scattered over {problem.group.size()} ranks")
    fused, name = torch.ops.symm_mem.fused_matmul_reduce_scatter, problem.group.group_name

    def run(number: int) -> Outputs:
        share = fused(problem.x, problem.weights[number].t(), "sum", 0, name)
        result = problem.x.new_empty(problem.m, problem.n)
        c10d.all_gather(result, share, group=problem.group)
        return (result,)

    return run


def normed(problem: Problem, run: Run, how: str) -> Run:
    """The chain of an operation that gives the sum: residual and RMSNorm after it."""

    def two_kernels(total: torch.Tensor) -> Outputs:
        residual = total + problem.residual
        return torch.nn.functional.rms_norm(residual, (problem.n,), problem.norm_weight, EPS), residual

    def one_kernel(total: torch.Tensor) -> Outputs:
        from maco_lib.kernels.add_rms_norm import add_rms_norm

        return add_rms_norm(total, problem.residual, problem.norm_weight, EPS, states.on(problem.device).launches)

    finish = one_kernel if how == "one_kernel" and problem.device.type == "cuda" else two_kernels
    return lambda number: finish(*run(number))


def described(problem: Problem, operation: str, name: str) -> str:
    """The name of the plan of a method that has run, "" where it has none."""
    method = METHODS[operation][name]
    if operation == CHAIN or method.how not in ("plan", "untuned", "auto"):
        return ""
    plan = problem.chosen[name] if name in problem.chosen else LinearPlan(**method.plan)
    if name == "auto" and problem.m in planner(problem.group, problem.device).layer(problem.weights[0]).unprepared:
        return "default plan: captured unprepared"
    return plan.name


def chunks_alone(problem: Problem, num_chunks: int) -> Run:
    """The matmul in the pieces of a chunked technique, and nothing else: what cutting it costs."""
    pieces = cut(problem.m, num_chunks)

    def run(number: int) -> Outputs:
        for rows in pieces:
            torch.mm(problem.x[rows], problem.weights[number].t(), out=problem.product[rows])
        return (problem.product,)

    return run
