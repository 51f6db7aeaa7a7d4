"""The figures of the study: drawn from stored tables only, equal byte for byte for equal data."""

import pathlib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from study.drawing import style, timeline
from study.published import tables as published
from study.results.store import DataError, Store
from study.sections.bandwidth import figures as bandwidth
from study.sections.environment import figures as environment
from study.sections.inference import figures as inference
from study.sections.linear_all_reduce import figures as linear_all_reduce
from study.sections.overlap import figure_sm_sharing as sm_sharing
from study.sections.overlap import figure_techniques as techniques
from study.sections.overlap import figures as overlap
from study.sections.when_to_overlap import figures as when_to_overlap

Draw = Callable[[Mapping[str, pd.DataFrame], str], tuple[Figure, pd.DataFrame]]


@dataclass(frozen=True)
class FigureSpec:
    """One figure: its section, and the tables it is drawn from ("published.X" is the published study's).

    `optional` tables add to the figure where the machine has them.
    """

    name: str
    section: str
    tables: tuple[str, ...]
    caption: str
    draw: Draw
    optional: tuple[str, ...] = ()


FIGURES: dict[str, FigureSpec] = {
    spec.name: spec
    for spec in (
        FigureSpec(
            "environment_ceilings", "environment", ("environment",),
            "Measured ceilings of this machine, against which everything else is judged.",
            environment.ceilings,
        ),
        FigureSpec(
            "overlap_published", "overlap", ("overlap", "published.overlap"),
            "The four published configurations: time of every method with its 95 % interval and its speedup over the "
            "sequential arm, in both protocols. Dashed: the ideal, max(T_comp, best T_comm).",
            overlap.published_configurations,
        ),
        FigureSpec(
            "overlap_techniques", "overlap", ("overlap", "published.overlap"),
            "How near each technique comes to the ideal, max(T_comp, best T_comm), in the published configurations: "
            "fraction of ideal in the device protocol, with the 95 % interval of the overlapped time; bold: the best.",
            techniques.techniques,
        ),
        FigureSpec(
            "overlap_sm_sharing", "overlap", ("sm_sharing",),
            "A matmul's time when multiprocessors (on a CPU: cores) are taken from it, over its time alone: held by "
            "another kernel for a part of that time, or for all of it by other means. Dotted: what counts as free.",
            sm_sharing.slowdown,
        ),
        FigureSpec(
            "overlap_synchronisation", "overlap", ("overlap", "published.overlap"),
            "The published protocol's speedup in two parts: what comes from removing the host's wait between the two "
            "sequential steps, and what comes from the overlap.",
            overlap.synchronisation,
        ),
        FigureSpec(
            "overlap_heatmap", "overlap", ("overlap",),
            "Collective size × matmul size: the ideal speedup, the measured one, and the fraction of ideal reached.",
            overlap.heatmap,
        ),
        FigureSpec(
            "overlap_timeline", "overlap", ("overlap_timeline",),
            "Profiler lanes of rank 0 on a common time axis, sequential above overlapped. Both sides are ready at the "
            "same moment there, so either may begin first, on each rank for itself.",
            timeline.overlap,
        ),
        FigureSpec(
            "inference_latency", "inference", ("inference", "published.inference"),
            "End-to-end latency of batch 1 per arm, split into time to first token and the remaining tokens; 95 % "
            "interval of the sum. Diamonds: the published latencies, of other hardware.",
            inference.latency,
        ),
        FigureSpec(
            "inference_attribution", "inference", ("inference_attribution", "inference", "published.inference"),
            "Two ways from transformers eager to vLLM at batch 1, step by step; the factors of a way multiply to the "
            "whole. Compiled: static cache and torch.compile, with CUDA graphs on GPUs.",
            inference.attribution,
        ),
        FigureSpec(
            "inference_batch", "inference", ("inference",),
            "Throughput and time per output token over batch size. Dashed: batch 1 scaled linearly.",
            inference.batch,
        ),
        FigureSpec(
            "bandwidth_busbw", "bandwidth", ("bandwidth",),
            "All-reduce: time of small messages and bus bandwidth of large ones, per backend; below: bus bandwidth of "
            "the other collectives. Lines across: the machine's limits.",
            bandwidth.busbw, optional=("environment",),
        ),
        FigureSpec(
            "bandwidth_published", "bandwidth", ("bandwidth", "published.bandwidth"),
            "The published sizes: effective bandwidth (2 S / t), algbw and busbw, measured and published; lines: the "
            "machine's limits of the busbw.",
            bandwidth.published_sizes, optional=("environment",),
        ),
        FigureSpec(
            "when_map", "when_to_overlap", ("when_to_overlap",),
            "Where overlap helps, hurts, or is undecided, per method measured on the whole grid, and the border that "
            "the model predicts.",
            when_to_overlap.verdict_map,
        ),
        FigureSpec(
            "when_prediction", "when_to_overlap", ("when_to_overlap",),
            "Predicted over measured overlapped time with the interval of the prediction; filled: held out of the fit.",
            when_to_overlap.prediction,
        ),
        FigureSpec(
            "when_models", "when_to_overlap", ("model_shares",),
            "Share of communication in a layer, and the predicted and ideal gain from overlapping it, per model.",
            when_to_overlap.models,
        ),
        FigureSpec(
            "linear_fraction", "linear_all_reduce", ("linear_all_reduce",),
            "Matmul + all-reduce: max(T_matmul, best T_comm) over the time, the fastest method of each kind, with the "
            "95 % interval of the time. Dashed: the fraction to be reached at many rows.",
            linear_all_reduce.fraction,
        ),
        FigureSpec(
            "linear_speedup", "linear_all_reduce", ("linear_all_reduce",),
            "Matmul + all-reduce: speedup over the matmul and then the default all-reduce, the fastest method of each "
            "kind.",
            linear_all_reduce.speedup,
        ),
        FigureSpec(
            "linear_chain", "linear_all_reduce", ("linear_all_reduce",),
            "Matmul + all-reduce + residual + RMSNorm at few rows: time of one run, the weights not in the cache.",
            linear_all_reduce.chain,
        ),
        FigureSpec(
            "linear_timeline", "linear_all_reduce", ("linear_timeline",),
            "Matmul + all-reduce: profiler lanes of rank 0 on a common time axis, technique above technique.",
            timeline.linear,
        ),
    )
}  # fmt: skip


class FigureError(DataError):
    """Stored data from which a figure cannot be drawn though all its tables are there: a fault of the figure."""


def figure_spec(name: str) -> FigureSpec:
    """The figure called `name`; raises ValueError with the valid names."""
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; the figures are {', '.join(FIGURES)}")
    return FIGURES[name]


def draw(store: Store, machine_name: str, figure_name: str) -> tuple[Figure, pd.DataFrame]:
    """Draw one figure of one machine: the figure and the numbers in it.

    Raises DataError naming the table and the machine when an input is missing or damaged, or has nothing to draw, and
    FigureError when drawing fails: a figure that cannot be drawn ends nothing but itself.
    """
    spec = figure_spec(figure_name)
    tables = {}
    present = [name for name in spec.optional if (store.data / machine_name / f"{name}.csv").exists()]
    for name in (*spec.tables, *present):
        try:
            source, _, table = name.rpartition(".")
            tables[name] = published.numbers(store.root, table) if source else store.read(machine_name, table)
        except (DataError, OSError, ValueError) as error:
            raise DataError(f"figure {figure_name} of {machine_name} needs the table {name}: {error}") from None
    try:
        with style.styled():
            return spec.draw(tables, machine_name)
    except style.NothingToDraw as error:
        raise DataError(f"figure {figure_name} of {machine_name}: {error}") from None
    except Exception as error:
        raise undrawn(figure_name, machine_name, error) from error


def render(store: Store, machine_name: str, figure_name: str) -> dict[str, bytes]:
    """One figure of one machine as svg, pdf, png and csv, not written. Raises as `draw`."""
    figure, data = draw(store, machine_name, figure_name)
    try:
        return style.rendered(figure, data)
    except Exception as error:
        raise undrawn(figure_name, machine_name, error) from error


def write(store: Store, machine_name: str, figure_name: str) -> list[pathlib.Path]:
    """Draw one figure and write figures/<machine>/<name>.{svg,pdf,png,csv}; returns the paths. Raises as `draw`."""
    return style.save(render(store, machine_name, figure_name), store.figures / machine_name, figure_name)


def undrawn(figure_name: str, machine_name: str, error: Exception) -> FigureError:
    """What to raise for an error of any kind; the traceback, for who mends it, goes to stderr."""
    traceback.print_exception(error)
    return FigureError(f"figure {figure_name} of {machine_name} could not be drawn: {type(error).__name__}: {error}")
