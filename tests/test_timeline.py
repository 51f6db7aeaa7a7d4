"""The timeline of section 1: what a trace's events are, that a program's rows fit the table, rows of the figure."""

import os
import pathlib

import pandas as pd
import stored
import torch
import torch.distributed as dist
from ranks import run_ranks

from study.drawing.timeline import linear as linear_timeline
from study.drawing.timeline import overlap as timeline
from study.harness.spec import check_rows
from study.sections.overlap import section as overlap


def test_copies_and_our_kernels_are_communication_and_the_backlog_is_nothing():
    from study.sections.overlap.measure_timeline import describe, is_device_work

    trace = [
        ("kernel", "at::cuda::spin_kernel(long)"),
        ("cuda_runtime", "cudaGraphLaunch"),
        ("kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL"),
        ("kernel", "sum_shares_kernel"),
        ("gpu_memcpy", "Memcpy PtoP (Device -> Device)"),
        ("kernel", "void two_shot_all_reduce_kernel<c10::BFloat16>"),
        ("kernel", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"),
    ]
    events = [{"cat": cat, "name": name, "ts": 1.0, "dur": 2.0, "args": {"stream": 7}} for cat, name in trace]
    found = [describe(event) for event in events if is_device_work(event)]
    assert [event["category"] for event in found] == ["comm"] * 4 + ["compute"]
    assert {event["lane"] for event in found} == {"stream 7"}


def profiled(rank: int, num_ranks: int) -> None:
    from study.harness.worker import Context
    from study.sections.overlap import measure_timeline as overlap_timeline

    context = Context(rank, num_ranks, torch.device("cpu"), dist.group.WORLD, pathlib.Path(os.devnull))
    point = {
        "configuration": "sweep", "comm_bytes": 65536, "matmul_n": 128, "dtype": "bf16",
        "methods": "sequential,two_stream,two_shot_stream",
    }  # fmt: skip
    rows = pd.DataFrame(overlap_timeline.measure(point, context).rows).assign(point_key="k", num_launches=1)
    check_rows(overlap.TIMELINE, rows, "test")
    failed = rows[~rows["correct"]]
    assert failed["method"].tolist() == ["two_shot_stream"] and "GPUs" in failed["error"].iloc[0]
    seen = rows[rows["correct"]].groupby(["method", "rank"])["category"].agg(set)
    assert len(seen) == 2 * num_ranks and all(categories == {"comm", "compute"} for categories in seen)
    assert set(rows.loc[rows["correct"], "timing"]) == {"host"}


def test_a_profile_shows_both_sides_on_every_rank():
    run_ranks(profiled)


def test_what_overlaps_in_one_lane_is_drawn_apart():
    table = stored.overlap_timeline()
    before, numbers = timeline({"overlap_timeline": table}, "h200-x2")
    assert "timing" not in numbers, "stored timelines without it are still drawn"
    replayed = table.assign(lane="stream 7", timing="graph")
    figure, numbers = timeline({"overlap_timeline": replayed}, "h200-x2")
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["sequential: stream 7", "two streams: stream 7", ""]
    spans = [(bars.get_paths()[0].get_extents().y0, bars.get_facecolor()[0].tolist()) for bars in axis.collections]
    overlapped = spans[2:]
    assert len(spans) == 4 and overlapped[0][0] != overlapped[1][0] and overlapped[0][1] != overlapped[1][1]
    assert axis.get_title().endswith("graph replay") and set(numbers["timing"]) == {"graph"}
    assert len(before.axes[0].get_yticks()) == 4


def test_waiting_for_tiles_is_no_communication():
    table = stored.linear_timeline().assign(correct=True)
    table.loc[table["category"] == "comm", "name"] = "wait_tiles_kernel"
    figure, numbers = linear_timeline({"linear_timeline": table}, "h200-x2")
    assert numbers["category"].tolist() == ["compute", "wait", "fused"]
    assert "waiting for tiles" in [text.get_text() for text in figure.legends[0].get_texts()]
