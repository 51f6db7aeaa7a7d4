"""One decoder layer under tensor parallelism (Megatron's split): its matmuls, its all-reduces, and their time.

Attention itself, norms and activations are left out: the share of communication given here is an upper bound, the more
so the longer the context.
"""

from study.costs import AllReduceCost, MatmulCost
from study.models import ModelDimensions

ALL_REDUCES_PER_LAYER = 2


def layer_matmuls(model: ModelDimensions, tokens: int, tp: int) -> dict[str, tuple[int, int, int]]:
    """(m, n, k) of the matmuls of one layer on one rank, by the name of the projection.

    Raises ValueError if `tp` does not divide the heads, the key-value heads and the intermediate width.
    """
    for what, count in (("heads", model.heads), ("kv_heads", model.kv_heads), ("intermediate", model.intermediate)):
        if count % tp:
            raise ValueError(f"tp = {tp} does not divide {what} = {count} of {model.name}")
    queries, keys = model.heads * model.head_dim // tp, model.kv_heads * model.head_dim // tp
    intermediate = model.intermediate // tp
    return {
        "qkv_proj": (tokens, queries + 2 * keys, model.hidden),
        "o_proj": (tokens, model.hidden, queries),
        "gate_up_proj": (tokens, 2 * intermediate, model.hidden),
        "down_proj": (tokens, model.hidden, intermediate),
    }


def layer_times_us(
    model: ModelDimensions, tokens: int, tp: int, matmul: MatmulCost, all_reduce: AllReduceCost
) -> tuple[float, float]:
    """(t_comm, t_comp) in µs of one layer on one of `tp` ranks.

    t_comp: all its matmuls. t_comm: an all-reduce of (tokens, hidden) after o_proj and one after down_proj.
    """
    num_bytes = tokens * model.hidden * matmul.element_bytes
    t_comp = sum(matmul.time_us(*shape) for shape in layer_matmuls(model, tokens, tp).values())
    return ALL_REDUCES_PER_LAYER * all_reduce.time_us(num_bytes, tp), t_comp
