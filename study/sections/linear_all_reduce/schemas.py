"""The columns of section 5's tables."""

import pandera.pandas as pa

from study.sections.linear_all_reduce.methods import CHAIN, HAND_OVER_LAUNCHES, LAYERS, MATMUL, OVERLAP

TIME = pa.Column(float, pa.Check.gt(0), nullable=True)
REAL = pa.Column(float, nullable=True)
COMMON = {
    "point_key": pa.Column(str),
    "layer": pa.Column(str, pa.Check.isin(list(LAYERS))),
    "m": pa.Column(int, pa.Check.gt(0)),
    "n": pa.Column(int, pa.Check.gt(0)),
    "k": pa.Column(int, pa.Check.gt(0)),
    "tp": pa.Column(int, pa.Check.ge(2)),
    "dtype": pa.Column(str),
    "method": pa.Column(str),
    "num_launches": pa.Column(int, pa.Check.ge(1)),
    "correct": pa.Column(bool),
    "error": pa.Column(str),
}
WITHOUT_METHOD = {name: column for name, column in COMMON.items() if name != "method"}
OPERATION = pa.Column(str, pa.Check.isin([MATMUL, CHAIN]))
SCHEMA = pa.DataFrameSchema(
    {
        **COMMON,
        "operation": OPERATION,
        "is_peer": pa.Column(bool),
        "technique": pa.Column(str),
        "backend": pa.Column(str),
        "plan": pa.Column(str),
        # By the planner's models, which are no more.
        "predicted_us": pa.Column(float, pa.Check.gt(0), nullable=True, required=False),
        "tiling": pa.Column(str),  # of the persistent kernel
        "timing": pa.Column(str, pa.Check.isin(["graph", "backlog", "host", ""])),
        **{f"{name}{bound}_us": TIME for name in ("time", "t_matmul") for bound in ("", "_lo", "_hi")},
        # Mean SM clocks: none on CPUs.
        "clock_mhz": pa.Column(float, pa.Check.gt(0), nullable=True),
        "matmul_clock_mhz": pa.Column(float, pa.Check.gt(0), nullable=True),
        "t_matmul_chunked_us": TIME,
        "t_comm_us": TIME,
        "t_comm_backend": pa.Column(str),
        "t_base_us": TIME,
        "ideal_us": TIME,
        "ect_us": REAL,
        "fraction_of_ideal": TIME,
        "speedup": TIME,
        "speedup_lo": REAL,
        "speedup_hi": REAL,
        # Against float64, Frobenius norms of the checked rows; the second of plain code over the default all-reduce.
        "relative_error": REAL,
        "base_error": REAL,
        "equal_on_ranks": pa.Column(bool),
        "num_sms": pa.Column(int, pa.Check.ge(0)),
    },
    strict=False,
    coerce=True,
)
TIMELINE_SCHEMA = pa.DataFrameSchema(
    {
        **COMMON,
        "rank": pa.Column(int, pa.Check.ge(0)),
        "event": pa.Column(int, pa.Check.ge(0)),
        "lane": pa.Column(str),
        "name": pa.Column(str),
        "category": pa.Column(str, pa.Check.isin(["comm", "compute", "fused"])),
        "timing": pa.Column(str, pa.Check.isin(["graph", "eager", "host", ""])),
        "start_us": pa.Column(float, pa.Check.ge(0)),
        "duration_us": pa.Column(float, pa.Check.ge(0)),
    },
    strict=False,
    coerce=True,
)
ENDURANCE_SCHEMA = pa.DataFrameSchema(
    {
        **COMMON,
        "operation": OPERATION,
        "num_repeats": pa.Column(int, pa.Check.ge(1)),
        "num_identical": pa.Column(int, pa.Check.ge(0)),
        "num_calls": pa.Column(int, pa.Check.ge(1)),
        "grown_bytes": pa.Column(int),
        "seconds": pa.Column(float, pa.Check.ge(0)),
    },
    strict=False,
    coerce=True,
)
HOST_COST_SCHEMA = pa.DataFrameSchema(
    {
        **WITHOUT_METHOD,
        "operation": pa.Column(str, pa.Check.isin([MATMUL, CHAIN, OVERLAP])),
        # False: of a shape that is met for the first time, everything shared being there.
        "prepared": pa.Column(bool),
        **dict.fromkeys(("host_us", "host_lo_us", "host_hi_us", "baseline_us", "ratio", "ratio_hi"), TIME),
    },
    strict=False,
    coerce=True,
)


HAND_OVER_SCHEMA = pa.DataFrameSchema(
    {
        **WITHOUT_METHOD,
        "launch": pa.Column(str, pa.Check.isin(HAND_OVER_LAUNCHES)),
        "strict": pa.Column(bool),
        "asked_tiles": pa.Column(int, pa.Check.ge(1)),
        # Over all ranks; of launches those that left a wrong bit, once for each rank where they did.
        **dict.fromkeys(("num_launches_done", "num_tiles", "num_wrong"), pa.Column(int, pa.Check.ge(0))),
        "seconds": pa.Column(float, pa.Check.ge(0), nullable=True),
    },
    strict=False,
    coerce=True,
)
STRICT_COST_SCHEMA = pa.DataFrameSchema(
    {
        **WITHOUT_METHOD,
        "timing": pa.Column(str, pa.Check.isin(["graph", "backlog", "host", ""])),
        **{f"{fence}{bound}_us": TIME for fence in ("default", "strict") for bound in ("", "_lo", "_hi")},
        # The strict fence's time over the default one's.
        **{f"ratio{bound}": TIME for bound in ("", "_lo", "_hi")},
    },
    strict=False,
    coerce=True,
)
