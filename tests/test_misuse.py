"""Calls that make no sense, or less than they seem to: refused before anything is summed, and told what to do."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from maco_lib import comm
from maco_lib.overlap import (
    RowParallelLinear,
    linear_all_reduce,
    linear_all_reduce_norm,
    overlap,
    start,
    tune,
    tune_linear,
)
from maco_lib.overlap.validation import row_counts


@pytest.mark.parametrize("plan", [None, "auto"])
def test_a_product_in_place_of_a_function_is_refused_before_the_sum(plan):
    x, gradient = torch.ones(3, 3), torch.ones(5)
    for call in (overlap, tune):
        options = {"plan": plan} if call is overlap else {}
        with pytest.raises(ValueError, match=r"takes a function to run, not a Tensor: .*\(lambda: ..., tensor\)"):
            call(x @ x, gradient, **options)


def test_a_process_that_is_one_of_several_is_told_that_nothing_would_be_summed(monkeypatch):
    x = torch.ones(2, 3)
    calls = {
        "all_reduce": lambda: start(x),
        "linear_all_reduce": lambda: linear_all_reduce(x, x),
        "linear_all_reduce_norm": lambda: linear_all_reduce_norm(x, x, x @ x.t(), x[:, 0]),
        "tune_linear": lambda: tune_linear(x, [4]),
        "RowParallelLinear": lambda: RowParallelLinear.from_linear(torch.nn.Linear(4, 4)),
    }
    for call in calls.values():
        call()  # alone: nothing to sum
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"WORLD_SIZE is 2, but {name} is called before .*init_process_group"):
            call()


def test_tensors_that_require_gradients_are_refused_where_gradients_are_enabled():
    x = torch.ones(4, requires_grad=True)
    for call in (lambda: start(x), lambda: overlap(int, x), lambda: comm.all_reduce(x, "gloo")):
        with pytest.raises(ValueError, match="requires a gradient and all_reduce has no backward: use torch.no_grad"):
            call()
    with torch.no_grad():
        assert start(x).wait() is x and overlap(int, x) == (0, x)


@pytest.mark.parametrize(
    "rows", [np.array([4, 8]), (m for m in (4, 8)), range(4, 9, 4), [np.int32(4), 8], torch.tensor([4, 8])]
)
def test_numbers_of_rows_may_be_of_any_kind_of_integers(rows):
    assert row_counts(rows, "tune_linear") == [4, 8]


@pytest.mark.parametrize("rows", [5, [], [4, 0], [4.0], "48", np.array([1.5]), None])
def test_what_is_no_list_of_integers_is_named(rows):
    with pytest.raises(ValueError, match="num_rows = .* of tune_linear: it is a list of ints of 1 or more"):
        tune_linear(torch.ones(3, 4), rows)


def test_autocast_does_not_change_the_type_of_a_single_ranks_result():
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    residual, norm_weight = torch.randn(3, 4), torch.ones(4)
    wanted = linear_all_reduce(x, weight), linear_all_reduce_norm(x, weight, residual, norm_weight)
    compiled = torch.compile(lambda: linear_all_reduce(x, weight), backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_all_reduce(x, weight), wanted[0]) and torch.equal(compiled(), wanted[0])
        assert all(map(torch.equal, linear_all_reduce_norm(x, weight, residual, norm_weight), wanted[1]))


def misused(rank: int, num_ranks: int) -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8)
    gone = dist.new_group()
    dist.destroy_process_group(gone)
    mesh = dist.init_device_mesh("cpu", (num_ranks,)) if hasattr(dist, "init_device_mesh") else None
    wrong = [("tp", "is a str, not a ProcessGroup"), (gone, "was destroyed")]
    wrong += [(mesh, r"is a DeviceMesh, not a ProcessGroup or None; .* mesh.get_group")] * (mesh is not None)
    for group, message in wrong:
        for call in (
            lambda group: linear_all_reduce(x, weight, group=group),
            lambda group: linear_all_reduce_norm(x, weight, x @ weight.t(), weight[:, 0], group=group),
            lambda group: start(x, group=group),
            lambda group: overlap(int, x, group=group, check=True),
            lambda group: tune_linear(weight, [4], group),
            lambda group: tune(int, x, group),
        ):
            with pytest.raises(ValueError, match=message):
                call(group)

    # What the ranks sum under autocast is as without.
    wanted = linear_all_reduce(x, weight), *linear_all_reduce_norm(x, weight, torch.ones(3, 4), torch.ones(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_all_reduce(x, weight), *linear_all_reduce_norm(x, weight, torch.ones(3, 4), torch.ones(4))
    assert all(map(torch.equal, found, wanted))

    parameter = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="tensor requires a gradient"):
        comm.all_reduce(parameter, "gloo")
    assert (parameter == 1).all()
    with torch.no_grad():
        comm.all_reduce(parameter, "gloo")
    assert (parameter == num_ranks).all()

    assert list(tune_linear(weight, (m for m in (4, np.int64(2))))) == [2, 4]

    layer = RowParallelLinear(weight, group=dist.group.WORLD)
    other = copy.deepcopy(torch.nn.Sequential(layer))[0]
    assert other.group is layer.group and other.weight is not layer.weight and other.plan == layer.plan
    assert torch.equal(other(x), layer(x)) and other.weight.requires_grad is False
    with pytest.raises(pickle.PicklingError, match="save its state_dict"):
        pickle.dumps(layer)
    assert torch.equal(pickle.loads(pickle.dumps(RowParallelLinear(weight)))(x), layer(x))

    with torch.inference_mode():
        tensor = torch.ones(64)
    assert tune(lambda: x @ weight.t(), tensor, budget_s=0.01).backend == "gloo"
    assert (tensor == 1).all(), "as before"


def test_groups_that_are_none_autocast_and_copies_on_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("MACO_CACHE", str(tmp_path))
    run_ranks(misused)
