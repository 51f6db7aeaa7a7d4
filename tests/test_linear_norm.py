"""`linear_all_reduce_norm` and the kernels behind it: right, equal on every rank, the same every time, captured."""

import itertools
import types

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib.linear import norm as linear_norm
from maco_lib.linear.norm import fastest_way
from maco_lib.overlap import LinearPlan, linear_all_reduce_norm

EPS = 1e-5
# (shape of x without K, N, K of all ranks), and sizes of decoding.
SHAPES = [((), 40, 5), ((3,), 132, 64), ((2, 150), 300, 77)]
DECODE = [((1,), 4096, 256), ((7,), 5120, 512), ((64,), 8192, 256), ((2, 128), 4096, 128), ((5,), 64, 8)]
NUM_GPUS = max(2, torch.cuda.device_count())


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if dist.get_backend() == "nccl" else torch.device("cpu")


class Example:
    """Operands that every rank draws alike, but for its share of K."""

    def __init__(self, rank, num_ranks, shape, n, k, dtype, seed=0, bias=True):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(device_of(rank), dtype)

        self.whole_x, self.whole_weight = normal(*shape, k), normal(n, k) / k**0.5
        self.x = self.whole_x.tensor_split(num_ranks, dim=-1)[rank]
        self.weight = self.whole_weight.tensor_split(num_ranks, dim=1)[rank]
        self.residual, self.norm_weight = normal(*shape, n), normal(n)
        self.bias = normal(n) if bias else None

    def run(self, plan="auto", **options):
        return linear_all_reduce_norm(
            self.x, self.weight, self.residual, self.norm_weight, EPS, self.bias, plan=plan, **options
        )

    def plain(self):
        """What it replaces: torch's linear layer and all-reduce, the addition and torch's norm."""
        total = torch.nn.functional.linear(self.x, self.weight, self.bias if dist.get_rank() == 0 else None)
        dist.all_reduce(total)
        return self.norm(total + self.residual), total + self.residual

    def norm(self, total):
        return torch.nn.functional.rms_norm(total, self.norm_weight.shape, self.norm_weight.to(total.dtype), EPS)

    def squared_errors(self, results) -> list[float]:
        """Of both results against float64, relative."""
        exact = self.whole_x.double() @ self.whole_weight.double().t() + self.residual.double()
        exact = exact if self.bias is None else exact + self.bias.double()
        errors = []
        for result, right in zip(results, (self.norm(exact), exact), strict=True):
            assert result.shape == right.shape and result.dtype == self.x.dtype and result.is_contiguous()
            errors.append(float((result.double() - right).square().sum() / right.square().sum()))
        return errors


def assert_equal_on_every_rank(results) -> None:
    for result in results:
        everyones = [torch.empty_like(result) for _ in range(dist.get_world_size())]
        dist.all_gather(everyones, result)
        assert all(torch.equal(theirs, result) for theirs in everyones)


def same(results, others) -> bool:
    return all(torch.equal(*pair) for pair in zip(results, others, strict=True))


def results_are_right(rank: int, num_ranks: int) -> None:
    shapes = SHAPES + (DECODE if device_of(rank).type == "cuda" else [])
    for plan, dtype in itertools.product(
        ("auto", LinearPlan("chunked", num_chunks=2)), (torch.float32, torch.bfloat16)
    ):
        ours, plain = torch.zeros(2), torch.zeros(2)
        for seed, (shape, n, k) in enumerate(shapes):
            for bias in (False, True):
                example = Example(rank, num_ranks, shape, n, k, dtype, seed, bias)
                results = example.run(plan, check=seed == 0)
                assert_equal_on_every_rank(results)
                kept = [result.clone() for result in results]
                assert same(example.run(plan), results) and same(kept, results), "not the same every time"
                ours += torch.tensor(example.squared_errors(results))
                plain += torch.tensor(example.squared_errors(example.plain()))
        assert (ours.sqrt() <= 1.2 * plain.sqrt()).all(), (plan, dtype, ours, plain)


def operands_are_not_touched(rank: int, num_ranks: int) -> None:
    example, other = (Example(rank, num_ranks, (30,), 304, 64, torch.float32) for _ in range(2))
    example.run()
    for name in ("x", "weight", "bias", "residual", "norm_weight"):
        assert torch.equal(getattr(example, name), getattr(other, name)), name


def errors_are_clear(rank: int, num_ranks: int) -> None:
    call = linear_all_reduce_norm
    x, weight, residual, scale = (torch.ones(*s, device=device_of(rank)) for s in ((4, 6), (8, 6), (4, 8), (8,)))
    wrong = [
        (lambda: call(x, weight, x, scale), r"residual has shape \(4, 6\) instead of \(4, 8\)"),
        (lambda: call(x, weight, residual, x[0]), r"norm_weight has shape \(6,\) instead of \(8,\)"),
        (
            lambda: call(x, weight, residual, scale.double()),
            "norm_weight is of torch.float64 instead",
        ),
        (lambda: call(x, weight, None, scale), "residual is a torch.Tensor, not NoneType"),
        (lambda: call(x, weight, residual, scale, plan="fast"), "plan = 'fast' is not a LinearPlan"),
        (lambda: call(x, weight, residual, scale.clone().requires_grad_()), "norm_weight requires a"),
    ]
    if x.device.type == "cpu":
        wrong.append((lambda: call(x, weight, residual, scale, plan="fused"), "'fused': .* are on cpu"))
    for mistake, message in wrong:
        with pytest.raises(ValueError, match=message):
            mistake()
    with pytest.raises(
        ValueError, match=r"rank 0 calls linear_all_reduce_norm\(1e-06, no bias; auto\).*, rank 1 calls"
    ):
        linear_all_reduce_norm(x[: 4 - rank], weight, residual[: 4 - rank], scale, check=True)
    # What one rank refuses, all are told of.
    with pytest.raises(ValueError, match=("" if rank else "rank 1 refuses .*") + r"residual has shape \(4, 6\)"):
        linear_all_reduce_norm(x, weight, x if rank else residual, scale, check=True)
    if x.device.type == "cpu":
        with pytest.raises(ValueError, match=("" if rank else "rank 1 refuses .*") + "'fused': .* are on cpu"):
            linear_all_reduce_norm(x, weight, residual, scale, plan="fused" if rank else "auto", check=True)


def group_of_one_sums_nothing(rank: int, num_ranks: int) -> None:
    groups = [dist.new_group([other]) for other in range(num_ranks)]
    example = Example(rank, num_ranks, (3,), 132, 64, torch.float32)
    operands = (example.x, example.weight, example.residual, example.norm_weight, EPS, example.bias)
    normed, total = linear_all_reduce_norm(*operands, group=groups[rank])
    alone = torch.nn.functional.linear(example.x, example.weight, example.bias) + example.residual
    torch.testing.assert_close(total, alone)
    torch.testing.assert_close(normed, example.norm(alone))


def everything(rank: int, num_ranks: int) -> None:
    results_are_right(rank, num_ranks)
    group_of_one_sums_nothing(rank, num_ranks)
    operands_are_not_touched(rank, num_ranks)
    errors_are_clear(rank, num_ranks)


def compiled(rank: int, num_ranks: int) -> None:
    fast = torch.compile(lambda *operands: linear_all_reduce_norm(*operands), fullgraph=True, dynamic=True)
    for num_rows in (300, 7):
        example = Example(rank, num_ranks, (num_rows,), 256, 64, torch.float32, bias=False)
        operands = (example.x, example.weight, example.residual, example.norm_weight, EPS)
        assert same(fast(*operands), linear_all_reduce_norm(*operands))
    name = dist.group.WORLD.group_name
    arguments = (*operands, None, name, "auto")
    torch.library.opcheck(torch.ops.maco.linear_all_reduce_norm, arguments)


def test_linear_all_reduce_norm_on_two_gloo_ranks():
    run_ranks(everything)


def test_linear_all_reduce_norm_is_compiled_as_one_graph():
    run_ranks(compiled)


def test_without_a_process_group_it_is_the_plain_layer_and_norm():
    x, weight, residual, scale = torch.randn(3, 4), torch.randn(8, 4), torch.randn(3, 8), torch.randn(8)
    normed, total = linear_all_reduce_norm(x, weight, residual, scale, EPS)
    torch.testing.assert_close(total, x @ weight.t() + residual)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(total, (8,), scale, EPS))


def test_whether_it_is_one_kernel_does_not_depend_on_a_ranks_share_of_k(monkeypatch):
    monkeypatch.setattr(linear_norm, "unavailable", lambda name, device, group: "")
    monkeypatch.setattr(linear_norm, "fastest_way", lambda *size: True)
    group = types.SimpleNamespace(size=lambda: 2)
    for k in (0, 5):
        assert linear_norm.unfusable(torch.ones(4, k), torch.ones(8, k), group) == ""
    assert "nothing to sum" in linear_norm.unfusable(torch.ones(0, 5), torch.ones(8, 5), group)


def test_few_bytes_go_in_one_shot_many_in_two_and_too_many_not_at_all():
    assert fastest_way(1, 8192, 2) is fastest_way(1, 16384, 8) is True
    assert fastest_way(256, 16384, 2) is True
    assert fastest_way(256, 16384, 4) is False
    assert fastest_way(257, 8192, 2) is None and fastest_way(1, 2**18, 2) is None


def kernels_are_right(rank: int, num_ranks: int) -> None:
    """Every kind of kernel, with rows that do not divide among the ranks, in any order, and 1000 times."""
    from maco_lib import state as states
    from maco_lib.comm.mailbox import Mailbox
    from maco_lib.kernels.inbox import has_room
    from maco_lib.kernels.sum_norm import sum_norm

    device = device_of(rank)
    box = states.of(dist.group.WORLD, device).get(Mailbox).box
    kinds = [{"one_shot": one} for one in (False, True)]

    def run(operands, how):
        return sum_norm(*operands, EPS, box, **how)

    cases = []
    for seed, (num_rows, n) in enumerate([(1, 4096), (2, 8192), (3, 64), (7, 5120), (61, 8192), (256, 4096)]):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            generator = torch.Generator(device).manual_seed(seed)
            drawn = [torch.randn(num_rows, n, generator=generator, device=device) for _ in range(num_ranks + 1)]
            *products, residual = (tensor.to(dtype) for tensor in drawn)
            scale = torch.randn(n, generator=generator, device=device).to(dtype)
            sums = products[0].float()
            for product in products[1:]:
                sums = sums + product.float()  # not in place: of float32 it is the first product itself
            total = (sums + residual.float()).to(dtype)
            exact = torch.nn.functional.rms_norm(total.double(), (n,), scale.double(), EPS)
            for how in kinds:
                if not has_room(num_rows, n * dtype.itemsize // 8, num_ranks, how["one_shot"]):
                    continue
                normed, got = run((products[rank], residual, scale), how)
                assert torch.equal(got, total), (num_rows, n, dtype, how)
                assert ((normed - exact).abs() <= 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all(), how
                assert_equal_on_every_rank((normed,))
                cases.append(((products[rank], residual, scale), how, normed))
    order = torch.randint(len(cases), (1000,), generator=torch.Generator().manual_seed(1)).tolist()
    num_wrong = torch.zeros((), dtype=torch.int64, device=device)
    for number in order:
        operands, how, normed = cases[number]
        num_wrong += (run(operands, how)[0] != normed).sum()
    assert int(num_wrong) == 0


def captured(rank: int, num_ranks: int) -> None:
    examples = [Example(rank, num_ranks, *shape, torch.bfloat16, seed) for seed, shape in enumerate(DECODE)]
    wanted = [example.run() for example in examples]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = [example.run("fused") for example in examples]
    for _ in range(3):
        for pair in results:
            for result in pair:
                result.zero_()
        graph.replay()
        assert all(same(*pairs) for pairs in zip(results, wanted, strict=True))
        assert same(examples[1].run(), wanted[1]), "an eager call between replays"
    torch.cuda.synchronize()
    graph.reset()


def unlike_weights(rank: int, num_ranks: int) -> None:
    """A rank whose weight cannot be read by the matmul that sends meets the others all the same."""
    for seed, (shape, n, k) in enumerate(DECODE[:3]):
        example = Example(rank, num_ranks, shape, n, k, torch.bfloat16, seed)
        wanted = example.run()
        if rank == 0:
            example.weight = torch.nn.functional.pad(example.weight, (0, 1))[:, :-1]
        results = example.run()
        assert_equal_on_every_rank(results)
        for result, right in zip(results, wanted, strict=True):
            torch.testing.assert_close(result, right, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu(num_gpus=2)
@pytest.mark.parametrize(
    "program", [everything, compiled, kernels_are_right, captured, unlike_weights], ids=lambda program: program.__name__
)
def test_linear_all_reduce_norm_on_every_gpu(program):
    run_ranks(program, NUM_GPUS, backend="nccl", timeout_s=240)
