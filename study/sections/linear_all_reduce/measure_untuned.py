"""What `linear_all_reduce` chooses untuned, beside every plan there is: shapes drawn from a seed, each measured whole.

    torchrun --nproc-per-node 2 -m study.sections.linear_all_reduce.measure_untuned --out untuned_plans.json

M is drawn from 1 to 16384, evenly in its logarithm, so half of them are odd; N and K are of published models'
row-parallel layers, none as in section 5. The seed was fixed before any of them was measured. Each plan is checked,
then timed as `tune_linear` does.
"""

import argparse
import json
import os
import pathlib
import random
import time

import torch
import torch.distributed as dist

from maco_lib.comm import DTYPES
from maco_lib.kernels.tile_order import CTAS
from maco_lib.linear.measure import Shape
from maco_lib.linear.plan import LinearPlan
from maco_lib.linear.planner import Layer, LinearPlanner, planner
from maco_lib.linear.techniques.persistent_time import fastest_tiling
from maco_lib.timing import decided
from study.harness import worker
from study.sections.linear_all_reduce.methods import LAYERS

SEED, NUM_SHAPES = 25, 20
TIMEOUT_S = 300.0
MAX_EXPONENT = 14
# (hidden, heads x head dimension, intermediate).
WIDTHS = {
    "Qwen2.5-1.5B": (1536, 1536, 8960),
    "Qwen3-4B": (2560, 4096, 9728),
    "Qwen2.5-7B": (3584, 3584, 18944),
    "Gemma-2-9B": (3584, 4096, 14336),
    "Llama-3.1-8B": (4096, 4096, 14336),
    "Gemma-2-27B": (4608, 4096, 36864),
    "Qwen3-14B": (5120, 5120, 17408),
    "Mistral-Small-24B": (5120, 4096, 32768),
    "Yi-34B": (7168, 7168, 20480),
    "Qwen2.5-72B": (8192, 8192, 29568),
    "Llama-3.1-405B": (16384, 16384, 53248),
}
# Beside the drawn ones: where a plan that was predicted took 141 µs for sequential NCCL's 123 on 2 H200s.
KNOWN = ("Qwen2.5-7B down_proj", 777, 3584, 18944)


def shapes(seed: int = SEED, number: int = NUM_SHAPES) -> list[tuple[str, int, int, int]]:
    """(layer, M, N, K of all ranks)."""
    layers = [
        (f"{model} {layer}", hidden, k)
        for model, (hidden, attention, intermediate) in WIDTHS.items()
        for layer, k in (("o_proj", attention), ("down_proj", intermediate))
        if (hidden, k) not in LAYERS.values()
    ]
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        name, n, k = draw.choice(layers)
        found.append((name, round(2 ** draw.uniform(0, MAX_EXPONENT)), n, k))
    return found


def measured(
    layer: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup,
    budget_s: float,
) -> dict:  # fmt: skip
    """Times in µs of every plan that is right here, by name, and what would be chosen. Collective."""
    weight = torch.randn(n, k // group.size(), device=device).to(dtype)
    owner = planner(group, device)
    begin = time.perf_counter()
    known = owner.layer(weight)
    shape, plans = Shape(m, weight, group), owner.plans(known, m)
    faults = {plan: shape.fault(plan) for plan in plans if plan != owner.default}
    usable = [owner.default, *(plan for plan, why in faults.items() if not why)]
    matmul_us, times_us = shape.times_us(usable, budget_s=budget_s, min_iterations=10)
    return {
        "layer": layer, "m": m, "n": n, "k": k, "tp": group.size(), "matmul_us": matmul_us,
        "default": owner.default.name, "chosen": chosen(owner, known, m).name,
        "times_us": {plan.name: us for plan, us in times_us.items()},
        "faults": {plan.name: why for plan, why in faults.items() if why},
        "seconds": time.perf_counter() - begin,
    }  # fmt: skip


def chosen(owner: LinearPlanner, layer: Layer, m: int) -> LinearPlan:
    """What the planner takes untuned, with the tiling that the kernel takes here."""
    plan = owner.look_up(layer, m)
    if plan.technique != "persistent":
        return plan
    clusters = torch.cuda.get_device_properties(owner.device).multi_processor_count // CTAS
    return LinearPlan("persistent", tiling=str(fastest_tiling(m, layer.n, layer.k, owner.group.size(), clusters)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON of all shapes, written after each")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--shapes", type=int, default=NUM_SHAPES)
    parser.add_argument("--shrink", type=int, default=1, help="divide M, N and K by this, for a try on CPUs")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--budget-s", type=float, default=0.4, help="seconds of samples of a shape")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no shape after so many")
    options = parser.parse_args()
    num_ranks, kind = int(os.environ["WORLD_SIZE"]), "cuda" if torch.cuda.is_available() else "cpu"
    with worker.joined(num_ranks, kind, TIMEOUT_S) as (device, group):
        begin, rows = time.perf_counter(), []
        for layer, *sizes in [KNOWN, *shapes(options.seed, options.shapes)]:
            if decided(time.perf_counter() - begin, group) > options.seconds:
                break
            m, n, k = (max(1, size // options.shrink) for size in sizes)
            with torch.no_grad():
                row = measured(layer, m, n, k, DTYPES[options.dtype], device, group, options.budget_s)
            rows.append(row)
            if group.rank() == 0:
                name, before_us = min(row["times_us"], key=row["times_us"].get), row["times_us"][row["default"]]
                times = f"{name} {row['times_us'][name]:.1f} µs, default {before_us:.1f} µs"
                print(f"{layer}, M = {m}: {times}, {row['chosen']}, {row['seconds']:.1f} s", flush=True)
                options.out.write_text(json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n")
    if kind == "cpu":
        worker.leave()


if __name__ == "__main__":
    main()
