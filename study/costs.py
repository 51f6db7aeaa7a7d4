"""How long a matmul and an all-reduce of any size take alone, from a machine's own measurements."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

BYTES_PER_ELEMENT = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Curve:
    """Times in µs at measured sizes.

    Straight lines between them in logarithms of both; constant below the least, proportional above the greatest.
    """

    sizes: tuple[float, ...]
    times_us: tuple[float, ...]

    def __call__(self, size: float) -> float:
        if size > self.sizes[-1]:
            return self.times_us[-1] * size / self.sizes[-1]
        return math.exp(np.interp(math.log(size), np.log(self.sizes), np.log(self.times_us)))

    def without(self, index: int) -> "Curve":
        """The same without its measured size number `index`."""
        return Curve(*(tuple(np.delete(values, index).tolist()) for values in (self.sizes, self.times_us)))

    def left_out_error(self) -> float:
        """Median |predicted / measured − 1| of the inner sizes, each predicted from the others; NaN below 3 sizes."""
        errors = [abs(self.without(i)(self.sizes[i]) / self.times_us[i] - 1) for i in range(1, len(self.sizes) - 1)]
        return float(np.median(errors)) if errors else math.nan


@dataclass(frozen=True)
class MatmulCost:
    """time = max(time of a square matmul of as many operations, bytes moved / memory bandwidth): a measured roofline.

    `square`: µs by operations (2n³). `bytes_per_us`: memory copy, read and write counted. `error`: median
    |predicted / measured − 1| over the measured rectangular matmuls, which the model never sees (NaN if there are
    none).
    """

    dtype: str
    square: Curve
    bytes_per_us: float
    error: float = math.nan

    @property
    def element_bytes(self) -> int:
        return BYTES_PER_ELEMENT[self.dtype]

    def time_us(self, m: int, n: int, k: int) -> float:
        """Time in µs of (m, k) @ (k, n) on one device: operands read once, result written once."""
        moved = self.element_bytes * (m * k + k * n + m * n)
        return max(self.square(2.0 * m * n * k), moved / self.bytes_per_us)

    @classmethod
    def from_environment(cls, environment: pd.DataFrame, dtype: str = "bf16") -> "MatmulCost":
        """From the table `environment`; of a CPU the rows with the fewest threads, those of one rank.

        Raises ValueError if rows are missing.
        """
        good = environment[environment["error"].eq("") & environment["time_us"].gt(0)]
        good = good[good["threads"].eq(good["threads"].min())]
        matmul = good[good["quantity"].eq("matmul") & good["dtype"].eq(dtype)]
        is_square = matmul["m"].eq(matmul["n"]) & matmul["n"].eq(matmul["k"])
        square = matmul[is_square].sort_values("n")
        copy = good[good["quantity"].eq("memory_copy")]
        if square.empty or copy.empty:
            missing = f"square matmul of dtype {dtype!r}" if square.empty else "memory_copy"
            raise ValueError(
                f"table environment has no {missing}; measure it with: python -m study run --only environment --force"
            )
        curve = Curve(tuple(2.0 * square["n"].astype(float) ** 3), tuple(square["time_us"].astype(float)))
        cost = cls(dtype, curve, float(copy["value"].max()) * 1e3)
        errors = [abs(cost.time_us(row.m, row.n, row.k) / row.time_us - 1) for row in matmul[~is_square].itertuples()]
        return cls(dtype, curve, cost.bytes_per_us, float(np.median(errors)) if errors else math.nan)


@dataclass(frozen=True)
class AllReduceCost:
    """Time of an all-reduce over `ranks` by bytes per rank, with the fastest backend of each size or with `backend`.

    A curve through the measured sizes rather than a latency-bandwidth line, because libraries change algorithm and
    protocol with the size and a line through 8 KiB and 1 GiB misses the middle; `curve.left_out_error()` says how good
    it is.
    """

    backend: str
    ranks: int
    curve: Curve

    def time_us(self, num_bytes: float, ranks: int | None = None) -> float:
        """Time in µs to sum `num_bytes` per rank over `ranks` (default: as many as measured).

        For another number of ranks the size is scaled until each link carries as many bytes, 2(P−1)/P·S: an
        extrapolation that leaves the latency as it is.
        """
        return self.curve(self._scaled(num_bytes, ranks))

    def covers(self, num_bytes: float, ranks: int | None = None) -> bool:
        """Whether that size, scaled like this, lies between the least and the greatest measured."""
        return self.curve.sizes[0] <= self._scaled(num_bytes, ranks) <= self.curve.sizes[-1]

    def _scaled(self, num_bytes: float, ranks: int | None) -> float:
        return num_bytes * (busbw_factor(ranks) / busbw_factor(self.ranks) if ranks else 1.0)

    @classmethod
    def from_bandwidth(cls, bandwidth: pd.DataFrame, backend: str | None = None) -> "AllReduceCost":
        """From the table `bandwidth`. Raises ValueError if rows are missing."""
        rows = bandwidth[bandwidth["collective"].eq("all_reduce") & bandwidth["correct"] & bandwidth["time_us"].gt(0)]
        if backend is not None:
            rows = rows[rows["backend"].eq(backend)]
        if rows["bytes"].nunique() < 2:
            wanted = f"of backend {backend!r}" if backend else "of any backend"
            raise ValueError(
                f"table bandwidth has {rows['bytes'].nunique()} correct all_reduce sizes {wanted}, 2 are needed; "
                "measure them with: python -m study run --only bandwidth --force"
            )
        times = rows.groupby("bytes")["time_us"].min().sort_index()
        # busbw = algbw·2(P−1)/P gives the number of ranks that took part.
        ratio = (rows["busbw_gb_per_s"] / rows["algbw_gb_per_s"]).median()
        curve = Curve(tuple(times.index.astype(float)), tuple(times.astype(float)))
        return cls(backend or "fastest", round(2 / (2 - ratio)), curve)


def busbw_factor(ranks: int) -> float:
    """Bytes an all-reduce moves over each link per byte of the tensor, 2(P−1)/P (nccl-tests' definition)."""
    return 2 * (ranks - 1) / ranks
