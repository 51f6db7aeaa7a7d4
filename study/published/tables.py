"""The published study's tables: `data/published/*.csv` holds them as printed, this module reads the numbers in them."""

import pathlib
import re

import pandas as pd

MIB = 2**20  # the published "8 MB" is 8 MiB: bf16 tensors of (2048, 2048), (4096, 4096), (8192, 4096)
ARMS = {"PyTorch Baseline": "transformers_eager", "vLLM": "vllm"}


def printed(root: pathlib.Path, name: str) -> pd.DataFrame:
    """`data/published/<name>.csv` as strings, exactly as printed. Raises OSError or ValueError naming the file."""
    path = root / "data" / "published" / f"{name}.csv"
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:
        raise ValueError(f"data/published/{name}.csv cannot be read: {error}") from None


def number(text: str) -> float:
    """The first number in a printed value: "~0.4 ms" -> 0.4. Raises ValueError naming the text when there is none."""
    found = re.search(r"\d+(\.\d+)?", text)
    if not found:
        raise ValueError(f"no number in the published value {text!r}")
    return float(found[0])


def numbers(root: pathlib.Path, name: str) -> pd.DataFrame:
    """The numbers of one printed table, with the units of our own tables, in the printed order.

    "overlap": configuration, comm_bytes, matmul_n, t_seq_us, t_overlap_us, speedup. "inference": arm, e2e_ms,
    tokens_per_s, speedup. "bandwidth": bytes, time_us, effective_gb_per_s (2 S / t, their formula), algbw_gb_per_s and
    busbw_gb_per_s (half of it: S / t, which at their two ranks is the busbw too).
    """
    table = printed(root, name)
    if name == "overlap":
        columns = {
            "configuration": table["configuration"],
            "comm_bytes": (table["comm_size"].map(number) * MIB).astype(int),
            "matmul_n": table["compute_size"].map(number).astype(int),
            "t_seq_us": table["sequential"].map(number) * 1e3,
            "t_overlap_us": table["overlapped"].map(number) * 1e3,
            "speedup": table["speedup"].map(number),
        }
    elif name == "inference":
        columns = {
            "arm": table["method"].map(ARMS),
            "e2e_ms": table["avg_latency"].map(number),
            "tokens_per_s": table["throughput"].map(number),
            "speedup": table["vs_baseline"].map(number),
        }
    elif name == "bandwidth":
        effective = table["effective_bandwidth"].map(number)
        columns = {
            "bytes": (table["tensor_size"].map(number) * MIB).astype(int),
            "time_us": table["allreduce_time"].map(number) * 1e3,
            "effective_gb_per_s": effective,
            "algbw_gb_per_s": effective / 2,
            "busbw_gb_per_s": effective / 2,
        }
    else:
        raise ValueError(f"the published study has no numbers in {name!r}; it has overlap, inference, bandwidth")
    return pd.DataFrame(columns)


def same_size(sizes: pd.Series, published_bytes: int) -> pd.Series:
    """Which `sizes` in bytes are the published one; a size rounded down to whole words per rank still is."""
    return (sizes - published_bytes).abs() <= 1e-3 * published_bytes
