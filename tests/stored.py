"""Stored tables made up for tests of figures and report: two machines, written through the real store."""

import functools
import itertools
import math
import pathlib
import shutil
import tempfile

import pandas as pd

from study.harness.files import CHECKOUT
from study.harness.machine import Machine
from study.results.store import Store
from study.sections import registry as sections

MIB = 2**20
TEMPLATES = tempfile.TemporaryDirectory(prefix="maco-tests-stored-")
CONFIGURATIONS = {
    "Small compute, medium comm": (8, 1024),
    "Medium compute, large comm": (32, 2048),
    "Large compute, large comm": (32, 4096),
    "Large compute, very large comm": (64, 4096),
}


def overlap(speedup: float) -> pd.DataFrame:
    """Published configurations in both protocols and a sweep; two streams gain `speedup` in each."""
    points = [(name, *size, protocol) for name, size in CONFIGURATIONS.items() for protocol in ("device", "published")]
    points += [("sweep", *size, "device") for size in itertools.product((1, 4, 16, 64), (512, 1024, 2048))]
    rows = []
    for name, mib, n, protocol in points:
        comm, comp = 10.0 + 4 * mib, 6 * (n / 1024) ** 3
        sequential = comm + comp
        methods = {"sequential": 1.0, "two_stream": speedup}
        if protocol == "published":
            methods["sequential_unsynchronised"] = 1.01
        for method, gain in methods.items():
            time = sequential / gain
            rows.append({
                "configuration": name, "comm_bytes": mib * MIB, "matmul_n": n, "protocol": protocol, "method": method,
                "backend": "nccl",
                "t_comm_us": comm, "t_comp_us": comp, "t_seq_us": sequential, "t_overlap_us": time,
                "t_overlap_lo_us": time * 0.99, "t_overlap_hi_us": time * 1.01, "ideal_us": max(comm, comp),
                "clock_mhz": 1600.0 if method == "sequential" else 1470.0, "compute_clock_mhz": 1500.0,
                "speedup": gain, "speedup_lo": gain * 0.99, "speedup_hi": gain * 1.01,
                "fraction_of_ideal": max(comm, comp) / time, "eta": 0.5, "verdict": "helps",
            })  # fmt: skip
    return pd.DataFrame(rows)


def overlap_timeline() -> pd.DataFrame:
    spans = {"sequential": ((0.0, 130.0), (131.0, 380.0)), "two_stream": ((0.0, 150.0), (2.0, 400.0))}
    return pd.DataFrame([
        {
            "configuration": "Large compute, large comm", "comm_bytes": 32 * MIB, "matmul_n": 4096, "method": method,
            "rank": 0, "event": event, "lane": f"stream {event}", "name": "kernel", "category": category,
            "start_us": start, "duration_us": duration,
        }
        for method, both in spans.items()
        for event, (category, (start, duration)) in enumerate(zip(("comm", "compute"), both, strict=True))
    ])  # fmt: skip


def sm_sharing() -> pd.DataFrame:
    """SMs are free to hold for 40 % of the matmul; from then on, and taken by other means, they cost."""
    rows = []
    for asked in ("held", "sm_target", "carveout", "green_context"):
        taken = [("alone", 0, 0.0, 0.0)]
        for num_sms in (4, 32):
            if asked == "held":
                taken += [(asked, num_sms, part, max(0.0, part - 0.4) / 4) for part in (0.2, 0.4, 0.6, 0.8, 1.0)]
            else:
                taken.append((asked, num_sms, 1.0, 0.1))
        failed = asked == "green_context"
        for n, alone in ((1024, 10.0), (4096, 200.0)):
            rows += [
                {
                    "matmul_n": n, "asked": asked, "technique": technique, "num_sms": num_sms, "hold_part": part,
                    **{f"t_comp{end}_us": float("nan") if failed else alone * (1 + cost) * wide
                       for end, wide in (("", 1), ("_lo", 0.99), ("_hi", 1.01))},
                    "correct": not failed, "error": "RuntimeError: no green contexts here" if failed else "",
                }
                for technique, num_sms, part, cost in taken
            ]  # fmt: skip
    return pd.DataFrame(rows)


def overlap_eager(loss: float = 1.6) -> pd.DataFrame:
    """Eagerly, two streams take `loss` times as long as in a graph, and no longer where the all-reduce leads."""
    rows = []
    for name, (mib, n) in CONFIGURATIONS.items():
        for launched in ("graph", "eager"):
            for method, leads, gain in (("sequential", False, 1.0), ("two_stream", False, 1.5),
                                        ("two_stream", True, 1.5), ("auto", True, 1.8)):  # fmt: skip
                time = 300.0 / gain * (loss if launched == "eager" and not leads and gain > 1 else 1)
                rows.append({
                    "configuration": name, "comm_bytes": mib * MIB, "matmul_n": n, "launched": launched,
                    "method": method, "leads": leads, "t_seq_us": 300.0, "t_overlap_us": time,
                    "t_overlap_lo_us": time * 0.99, "t_overlap_hi_us": time * 1.01, "speedup": 300 / time,
                    "speedup_lo": 297 / time, "speedup_hi": 303 / time, "late_part": 0.0,
                })  # fmt: skip
    return pd.DataFrame(rows)


def linear_all_reduce(fraction: float = 0.92, ours: float = 1.1) -> pd.DataFrame:
    """Two layers at few and many rows: the persistent kernel and the planner reach `fraction` of the ideal, and the
    chain gains `ours` over the fastest peer."""
    rows = []
    for layer, n, k in (("Qwen3-8B o_proj", 4096, 4096), ("Qwen3-32B down_proj", 5120, 25600)):
        for m in (1, 64, 2048, 8192):
            matmul, comm = 5 + m * n * k / 1.2e9, 8 + m * n / 1.5e5
            times = {"sequential_nccl": matmul + 1.3 * comm, "sequential_two_shot": matmul + comm}
            if m > 256:
                times |= {"async_tp": math.nan, "chunked4_maco_staged_8": matmul + 0.6 * comm,
                          "persistent": max(matmul, comm) / fraction}  # fmt: skip
            times["auto"] = min(time for time in times.values() if time == time)
            operations = {"matmul_all_reduce": times}
            if m <= 256:
                chain = {name: time + 4 for name, time in times.items() if name.startswith("sequential")}
                operations["matmul_all_reduce_norm"] = {
                    **chain, **dict.fromkeys(("fused_norm", "auto"), min(chain.values()) / ours),
                }  # fmt: skip
            for operation, found in operations.items():
                rows += [
                    {
                        "layer": layer, "m": m, "n": n, "k": k, "tp": 2, "operation": operation, "method": method,
                        "technique": "persistent" if method == "persistent" else "sequential",
                        "is_peer": method.startswith("sequential") or method == "async_tp",
                        "plan": "persistent" if method == "auto" else "", "predicted_us": time * 1.1,
                        "tiling": "2x64-staggered" if method == "persistent" else "",
                        "time_us": time, "time_lo_us": time * 0.99, "time_hi_us": time * 1.01, "t_matmul_us": matmul,
                        "t_comm_us": comm, "t_comm_backend": "symm_mem_two_shot", "ideal_us": max(matmul, comm),
                        "t_matmul_chunked_us": matmul * 1.1 if method.startswith("chunked") else math.nan,
                        "clock_mhz": 1600.0 if method.startswith("sequential") else 1440.0, "matmul_clock_mhz": 1500.0,
                        "t_base_us": found["sequential_nccl"], "speedup": found["sequential_nccl"] / time,
                        "fraction_of_ideal": max(matmul, comm) / time, "ect_us": time - matmul,
                        "relative_error": 0.002, "base_error": 0.002, "num_sms": 132, "num_launches": 3,
                        "correct": time == time, "error": "" if time == time else "RuntimeError: not here",
                    }
                    for method, time in found.items()
                ]  # fmt: skip
    return pd.DataFrame(rows)


def linear_timeline() -> pd.DataFrame:
    spans = {
        "sequential_nccl": [("compute", 0.0, 300.0), ("comm", 301.0, 100.0)],
        "persistent": [("fused", 0.0, 330.0)],
    }
    return pd.DataFrame([
        {
            "layer": "Qwen3-32B down_proj", "m": 4096, "n": 5120, "k": 25600, "method": method, "rank": 0,
            "event": event, "lane": "stream 7", "name": "kernel", "category": category, "start_us": start,
            "duration_us": duration, "timing": "graph",
        }
        for method, events in spans.items()
        for event, (category, start, duration) in enumerate(events)
    ])  # fmt: skip


def linear_endurance() -> pd.DataFrame:
    return pd.DataFrame([
        {
            "layer": "Qwen3-8B o_proj", "m": 1024, "n": 4096, "k": 4096, "method": method, "num_repeats": 1000,
            "operation": "matmul_all_reduce", "num_identical": 1000, "num_calls": 10_000, "grown_bytes": grown,
        }
        for method, grown in (("persistent", 0), ("chunked4_maco_staged_8", 2**21))
    ])  # fmt: skip


def inference() -> pd.DataFrame:
    latencies = {"transformers_eager": 1000.0, "transformers_compiled": 140.0, "vllm_eager": 400.0, "vllm": 62.0}
    return pd.DataFrame([
        {
            "arm": arm, "batch": batch, "prompt_tokens": 6, "new_tokens": 32, "model": "Qwen3-0.6B-Base",
            "weights": "random", "e2e_ms": time, "e2e_lo_ms": time * 0.98, "e2e_hi_ms": time * 1.02,
            "ttft_ms": time * 0.1, "tpot_ms": time * 0.9 / 31, "tokens_per_s": 32e3 * batch / time,
            "speedup": 1000 / time,
        }
        for arm, time in latencies.items()
        for batch in (1, 8)
    ])  # fmt: skip


def environment(link_limit: bool) -> pd.DataFrame:
    rows = [("matmul", "bf16", n, 700.0 * min(1, n / 4096), "TFLOP/s") for n in (1024, 4096)]
    rows += [("memory_copy", "", 0, 4000.0, "GB/s"), ("peer_write", "", 0, 390.0, "GB/s")]
    rows += [("peer_read", "", 0, 372.0, "GB/s")] + [("link_limit", "", 0, 450.0, "GB/s")] * link_limit
    return pd.DataFrame([
        {
            "quantity": quantity, "device": "cuda:0", "peer": "", "dtype": dtype, "m": n, "n": n, "k": n, "bytes": 0,
            "threads": 0, "value": value, "value_lo": value, "value_hi": value, "unit": unit, "time_us": 1.0,
            "source": "measured",
        }
        for quantity, dtype, n, value, unit in rows
    ])  # fmt: skip


def bandwidth() -> pd.DataFrame:
    rows = []
    for collective, factor in (("all_reduce", 1.0), ("all_gather", 0.5)):
        for size in (8192, MIB, 8 * MIB, 32 * MIB, 64 * MIB):
            time = 16 + size / 270e3
            rate = size / time / 1e3
            rows.append({
                "collective": collective, "backend": "nccl", "bytes": size, "time_us": time, "time_lo_us": time * 0.98,
                "time_hi_us": time * 1.02, "algbw_gb_per_s": rate, "busbw_gb_per_s": rate * factor,
            })  # fmt: skip
    return pd.DataFrame(rows)


def derived(store: Store, name: str) -> None:
    """Compute and write every derived table as a notebook does, from the tables already stored."""
    for section in sections.SECTIONS.values():
        for table in section.derived:
            inputs = {needed: store.read(name, needed) for needed in table.inputs}
            rows = table.compute(inputs, section.parameters())
            store.write_table(name, table, rows, {"inputs_sha256": ""})


def completed(table, rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` with every column of the schema that they lack, filled with an allowed value."""
    rows = rows.copy()
    for name, column in table.schema.columns.items():
        if name in rows:
            continue
        kind = str(column.dtype)
        allowed = [value for check in column.checks for value in check.statistics.get("allowed_values", [])]
        default = "" if "str" in kind else True if "bool" in kind else 2 if "int" in kind else 1.0
        rows[name] = f"{name}-{len(rows)}" if name == "point_key" else "" if "" in allowed else [*allowed, default][0]
    return rows


def study(root: pathlib.Path, speedup: float = 1.6) -> Store:
    """A study below `root` with the published tables and one complete machine, h200-x2."""
    shutil.copytree(template(speedup), root, dirs_exist_ok=True)
    return Store(root)


@functools.cache  # checking the tables takes seconds
def template(speedup: float) -> pathlib.Path:
    root = pathlib.Path(TEMPLATES.name, str(speedup))
    shutil.copytree(CHECKOUT / "data" / "published", root / "data" / "published")
    store, name = Store(root), "h200-x2"
    description = {
        "cpu": "a CPU", "cores": 32, "ram_bytes": 2**38, "os": "Linux", "gpus": ["NVIDIA H200"] * 2, "link": "NVLink",
        "link_limit_gb_per_s": 450.0,
        "gpu_memory_bytes": 2**37,
    }  # fmt: skip
    store.claim(Machine("cuda", 2, name, "0" * 16, 2**37, description), name)
    tables = {
        "environment": environment(link_limit=True), "overlap": overlap(speedup), "inference": inference(),
        "overlap_timeline": overlap_timeline(), "sm_sharing": sm_sharing(), "bandwidth": bandwidth(),
        "overlap_eager": overlap_eager(),
        "linear_all_reduce": linear_all_reduce(), "linear_timeline": linear_timeline(),
        "linear_endurance": linear_endurance(),
    }  # fmt: skip
    for table_name, rows in tables.items():
        _, table = sections.table(table_name)
        store.write_table(name, table, completed(table, rows), {"keys": []})
    derived(store, name)
    for section in sections.SECTIONS:
        settle(store, section, "complete")
    return root


def settle(store: Store, section: str, state: str, error: str = "") -> None:
    """Record a verdict of one section."""
    record = store.record("h200-x2", section)
    verdict = {"state": state, "error": error, "at": "2026-11-22T12:00:00+00:00", "seconds": 60.0, "run": "test"}
    store.write_record("h200-x2", section, {**record, "profile": "full", "parameters": {}, "verdict": verdict})
