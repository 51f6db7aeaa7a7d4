"""`linear_all_reduce` as a user meets it: right, equal on every rank, compiled, in a module, clear about errors."""

import gc
import itertools
import re

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib.linear.plan import candidates
from maco_lib.linear.techniques.chunked import cut
from maco_lib.overlap import LinearPlan, RowParallelLinear, linear_all_reduce

PLANS = [None, LinearPlan("chunked", num_chunks=2), LinearPlan("chunked", num_chunks=3)]
# (shape of x without K, N, K of all ranks): odd and uneven ones, a vector, three dimensions, decode and a few chunks.
SHAPES = [((), 37, 5), ((3,), 129, 64), ((2, 150), 301, 77), ((389,), 256, 130)]


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")


class Example:
    """Operands that every rank draws alike; `x` and `weight` are this rank's share of K, as uneven as can be."""

    def __init__(self, rank, num_ranks, shape, n, k, dtype, seed=0, bias=True, residual=True):
        generator, device = torch.Generator().manual_seed(seed), device_of(rank)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.whole_x, self.whole_weight = normal(*shape, k), normal(n, k)
        self.bias, self.residual = normal(n) if bias else None, normal(*shape, n) if residual else None
        # Seen as a slice of a larger tensor, as users have it: not contiguous.
        self.x = self.whole_x.tensor_split(num_ranks, dim=-1)[rank]
        self.weight = self.whole_weight.tensor_split(num_ranks, dim=1)[rank]

    def run(self, plan=None, **options) -> torch.Tensor:
        return linear_all_reduce(self.x, self.weight, self.bias, self.residual, plan=plan, **options)

    def plain(self) -> torch.Tensor:
        """What it replaces: torch's linear layer and all-reduce."""
        total = torch.nn.functional.linear(self.x, self.weight)
        dist.all_reduce(total)
        for term in (self.bias, self.residual):
            total = total if term is None else total + term
        return total

    def squared_error(self, result: torch.Tensor) -> float:
        """Against float64, relative to the exact result."""
        exact = self.whole_x.double() @ self.whole_weight.double().t()
        for term in (self.bias, self.residual):
            exact = exact if term is None else exact + term.double()
        assert result.shape == exact.shape and result.dtype == self.x.dtype and result.is_contiguous()
        return float((result.double() - exact).square().sum() / exact.square().sum())


def assert_equal_on_every_rank(result: torch.Tensor) -> None:
    everyones = [torch.empty_like(result) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, result)
    assert all(torch.equal(theirs, result) for theirs in everyones)


def plans_here(rank: int) -> list[LinearPlan | None]:
    names = comm.available("all_reduce", device_of(rank), dist.group.WORLD)[1:]
    chunks = (("sequential", 1), ("chunked", 2), ("chunked", 3))
    return PLANS + [LinearPlan(how, name, num) for name in names for how, num in chunks]


def takes(plan: LinearPlan | None, dtype: torch.dtype) -> bool:
    name = plan.backend if plan else ""
    return not name or dtype in getattr(comm.backend(name), "dtypes", comm.DTYPES.values())


def results_are_right(rank: int, num_ranks: int) -> None:
    for plan, dtype in itertools.product(plans_here(rank), (torch.float32, torch.bfloat16)):
        if not takes(plan, dtype):
            continue
        ours = plain = 0.0
        for seed, (shape, n, k) in enumerate(SHAPES):
            for bias, residual in itertools.product((False, True), repeat=2):
                example = Example(rank, num_ranks, shape, n, k, dtype, seed, bias, residual)
                result = example.run(plan, check=seed == 0)
                assert_equal_on_every_rank(result)
                kept = result.clone()
                assert torch.equal(example.run(plan), result) and torch.equal(kept, result), "not the same every time"
                error = example.squared_error(result)
                assert error <= (2 * num_ranks * torch.finfo(dtype).eps) ** 2 * k, (plan, dtype, shape, bias, residual)
                ours, plain = ours + error, plain + example.squared_error(example.plain())
        assert ours**0.5 <= 1.2 * plain**0.5, (plan, dtype)


def results_are_fresh(rank: int, num_ranks: int) -> None:
    """No later call writes into an earlier result, and nothing is left behind by calls of changing shapes."""
    first = Example(rank, num_ranks, (300,), 140, 32, torch.float32)
    results = [(first.run(plan), first.run(plan)) for plan in plans_here(rank)]
    before = None
    for step in range(200):
        plan = PLANS[step % len(PLANS)]
        Example(rank, num_ranks, (1 + 7 * step % 300,), 1 + 13 * step % 400, 32, torch.float32, step).run(plan)
        if step == 20:
            before = num_live_tensors()
    # gloo's threads let go of the last calls' tensors a little later; a leak would be one a call, 179 here.
    assert num_live_tensors() - before < 20, f"{num_live_tensors() - before} more tensors are alive than 179 calls ago"
    assert all(torch.equal(one, other) for one, other in results)


def num_live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def operands_are_not_touched(rank: int, num_ranks: int) -> None:
    for plan in PLANS:
        example, same = (Example(rank, num_ranks, (300,), 301, 64, torch.float32) for _ in range(2))
        example.run(plan)
        for name in ("x", "weight", "bias", "residual"):
            assert torch.equal(getattr(example, name), getattr(same, name)), name


def module_drops_in(rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(75, 40).to(device_of(rank))
    x, residual = torch.randn(2, 9, 75).to(device_of(rank)), torch.randn(2, 9, 40).to(device_of(rank))
    share = x.tensor_split(num_ranks, dim=-1)[rank]
    with torch.no_grad():
        wanted = linear(x)
    for plan in PLANS:
        layer = RowParallelLinear.from_linear(linear, plan=plan)
        assert set(layer.state_dict()) == {"weight", "bias"} and layer.weight.shape == (40, share.shape[-1])
        torch.testing.assert_close(layer(share), wanted)
        torch.testing.assert_close(layer(share, residual), wanted + residual)
    with pytest.raises(ValueError, match="in_features = 1 "):
        RowParallelLinear.from_linear(torch.nn.Linear(1, 4))


def compiled(rank: int, num_ranks: int) -> None:
    torch.manual_seed(0)
    device, linear = device_of(rank), torch.nn.Linear(64, 256).to(device_of(rank))
    layer = RowParallelLinear.from_linear(linear, plan=LinearPlan("chunked", num_chunks=2))

    def block(x, residual):  # nothing that has to be generated in C++, which takes a quarter of a minute
        return linear_all_reduce(x, layer.weight, None, layer(x, residual), dist.group.WORLD, plan=None)

    fast = torch.compile(block, fullgraph=True, dynamic=True)
    for num_rows in (300, 7):
        x, residual = torch.randn(num_rows, 64 // num_ranks, device=device), torch.ones(num_rows, 256, device=device)
        with torch.no_grad():
            torch.testing.assert_close(fast(x, residual), block(x, residual))
    name = dist.group.WORLD.group_name
    operands = (torch.randn(3, 4, device=device), torch.randn(5, 4, device=device), None, None)
    torch.library.opcheck(torch.ops.maco.linear_all_reduce, (*operands, name, "sequential"))


def errors_are_clear(rank: int, num_ranks: int) -> None:
    x, weight = torch.ones(4, 6, device=device_of(rank)), torch.ones(5, 6, device=device_of(rank))
    meta = torch.ones(5, 6, device="meta")
    unusable = "maco_push_64" if x.device.type == "cpu" else "gloo"
    for call, message in [
        (lambda: linear_all_reduce(x[:, :5], weight), r"x has shape \(4, 5\) instead of \(..., 6\)"),
        (lambda: linear_all_reduce(x, weight[0]), r"weight has shape \(6,\) instead of \(N, K\)"),
        (lambda: linear_all_reduce(x, weight, x[0]), r"bias has shape \(6,\) instead of \(5,\)"),
        (lambda: linear_all_reduce(x, weight, None, x), r"residual has shape \(4, 6\) instead of \(4, 5\)"),
        (lambda: linear_all_reduce(x, weight.double()), "weight is of torch.float64 instead of x's torch.float32"),
        (lambda: linear_all_reduce(x.int(), weight.int()), "x is of torch.int32; the types are torch.bfloat16"),
        (lambda: linear_all_reduce(x, meta), f"weight is on meta instead of x's {x.device}"),
        (lambda: linear_all_reduce([1.0], weight), "x is a torch.Tensor, not list"),
        (lambda: linear_all_reduce(x, weight, plan="fast"), "plan = 'fast' is not a LinearPlan, 'auto' or None"),
        (lambda: linear_all_reduce(x, weight.clone().requires_grad_()), "weight requires a gradient"),
        (lambda: linear_all_reduce(x, weight, plan=LinearPlan(backend="mpi")), "unknown backend 'mpi'.*nccl, "),
        (lambda: linear_all_reduce(x, weight, plan=LinearPlan(backend=unusable)), f"backend '{unusable}'"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    if x.device.type == "cuda":
        with pytest.raises(ValueError, match="x is on cpu, but the nccl group works on cuda"):
            linear_all_reduce(x.cpu(), weight.cpu())
    for rows, plan in ((4 + rank, "auto"), (4, PLANS[rank])):
        with pytest.raises(ValueError, match="the ranks disagree: rank 0 calls linear_all_reduce.*, rank 1 calls"):
            linear_all_reduce(x.new_ones(rows, 6), weight, plan=plan, check=True)
    # What one rank refuses, all are told of.
    for mistake, message in [
        ({"plan": LinearPlan(backend=unusable)}, f"backend '{unusable}'"),
        ({"plan": "fast"}, "plan = 'fast' is not a LinearPlan"),
        ({"bias": x[0]}, r"bias has shape \(6,\) instead of \(5,\)"),
        ({"x": [1.0]}, "x is a torch.Tensor, not list"),
    ]:
        with pytest.raises(ValueError, match=("" if rank else "rank 1 refuses the call: .*") + message):
            linear_all_reduce(**{"x": x, "weight": weight} | (mistake if rank else {}), check=True)


def group_of_one_is_the_plain_layer(rank: int, num_ranks: int) -> None:
    groups = [dist.new_group([other]) for other in range(num_ranks)]
    a, b, c, d = (torch.randn(*shape, device=device_of(rank)) for shape in ((4, 6), (5, 6), (5,), (4, 5)))
    assert torch.equal(linear_all_reduce(a, b, c, d, groups[rank]), torch.nn.functional.linear(a, b, c) + d)
    with pytest.raises(ValueError, match="not in the group"):
        linear_all_reduce(a, b, group=groups[1 - rank])


def everything(rank: int, num_ranks: int) -> None:
    results_are_right(rank, num_ranks)
    results_are_fresh(rank, num_ranks)
    operands_are_not_touched(rank, num_ranks)
    module_drops_in(rank, num_ranks)
    errors_are_clear(rank, num_ranks)
    group_of_one_is_the_plain_layer(rank, num_ranks)


def test_linear_all_reduce_on_two_gloo_ranks():
    run_ranks(everything)


def test_linear_all_reduce_is_compiled_as_one_graph():
    run_ranks(compiled)


def test_without_a_process_group_it_is_the_plain_layer():
    a, b, residual = torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 5)
    wanted = torch.nn.functional.linear(a, b) + residual
    assert torch.equal(linear_all_reduce(a, b, residual=residual), wanted)
    assert torch.equal(RowParallelLinear(b)(a, residual), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"technique": "fused"}, "unknown technique 'fused'; the techniques are sequential, chunked"),
        ({"technique": "chunked", "num_chunks": 0}, "num_chunks = 0: for chunked it is an int of 2 or more"),
        ({"technique": "chunked"}, "num_chunks = 1: for chunked it is an int of 2 or more"),
        ({"num_chunks": 3}, "num_chunks = 3: for sequential it is 1"),
    ],
)
def test_a_wrong_plan_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearPlan(**options)


EVERY_PLAN = [
    *candidates("cpu", comm.BACKENDS), *candidates("cuda", comm.BACKENDS),
    LinearPlan(), LinearPlan("chunked", num_chunks=4), LinearPlan("persistent"),
]  # fmt: skip


@pytest.mark.parametrize("plan", dict.fromkeys(EVERY_PLAN), ids=str)
def test_a_plan_has_one_name_of_ascii_that_reads_back(plan):
    assert plan.name == str(plan) and plan.name.isascii() and not re.search(r"[\s,]", plan.name)
    assert LinearPlan.parse(plan.name) == plan


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("sequential, nccl", "sequential:nccl"),
        ("sequential, default backend", "sequential"),
        ("chunked, 4 along m, maco_staged_8", "chunked:4:maco_staged_8"),
        ("chunked, 2 along m, default backend", "chunked:2"),
        ("persistent", "persistent"),
        ("persistent, 2 × 64 staggered evened", "persistent:2x64-staggered-evened"),
        ("persistent, 64", "persistent:64"),
        ("decode", "decode"),
    ],
)
def test_what_older_tables_call_a_plan_is_read(stored, name):
    assert LinearPlan.parse(stored) == LinearPlan.parse(name) and str(LinearPlan.parse(stored)) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("auto", "'auto' is not the name of a plan; names are sequential[:BACKEND]"),
        ("signalled, 4 along m, maco_staged_8", "is not the name of a plan; names are"),
        ("chunked", "'chunked' is not the name of a plan; names are"),
        ("chunked:four:nccl", "'chunked:four:nccl' is not the name of a plan: invalid literal"),
        ("chunked:1:nccl", "num_chunks = 1: for chunked it is an int of 2 or more"),
        ("persistent:2x96-evened", "tiling = '2x96-evened': for persistent it is '', '64', '2x64'"),
        ("decode:nccl", "backend = 'nccl': decode sums by itself"),
        ("sequential:nccl:4:4:4:4", "'sequential:nccl:4:4:4:4' is not the name of a plan; names are"),
    ],
)
def test_a_wrong_name_is_named(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LinearPlan.parse(name)


def test_compiled_code_does_not_look_into_the_operator_where_a_graph_breaks_around_it():
    seen = []

    def backend(module, example_inputs):
        seen.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    @torch._dynamo.disable(recursive=False)
    def uncompiled(x, weight):
        return torch.ops.maco.linear_all_reduce(x, weight, None, None, "", "sequential")

    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    doubled = torch.compile(lambda: 2 * uncompiled(x, weight), backend=backend)
    torch.testing.assert_close(doubled(), 2 * x @ weight.t())
    assert [len(functions) for functions in seen] == [1], seen  # the product by 2, nothing of the operator's body


def test_chunks_are_whole_tiles_and_fewer_where_the_tiles_are_fewer():
    lengths = {(length, num): [piece.stop - piece.start for piece in cut(length, num)]
               for length, num in ((1024, 4), (1000, 3), (300, 8), (128, 2), (1, 4))}  # fmt: skip
    assert lengths == {
        (1024, 4): [256] * 4,
        (1000, 3): [384, 384, 232],
        (300, 8): [128, 128, 44],
        (128, 2): [128],
        (1, 4): [1],
    }


def captured(rank: int, num_ranks: int) -> None:
    example = Example(rank, num_ranks, (512,), 384, 256, torch.bfloat16)
    for plan in plans_here(rank):
        example.run(plan)  # buffers, communicators and kernels are made before the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = example.run(plan)
        result.zero_()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert example.squared_error(result) ** 0.5 <= 1.2 * example.squared_error(example.plain()) ** 0.5, plan
        assert_equal_on_every_rank(result)
        graph.reset()


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize("program", [everything, compiled, captured], ids=lambda program: program.__name__)
def test_linear_all_reduce_on_two_gpus(program):
    run_ranks(program, backend="nccl", timeout_s=180)
