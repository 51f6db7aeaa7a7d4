"""Dimensions of the published models of the study: the one place that says them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDimensions:
    """A decoder of the Qwen3 family.

    `hidden`, `intermediate`, `head_dim` are widths in elements; `tied`: the embedding is also the output's matrix.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6


# Published configurations of Qwen3 (config.json of each model).
MODELS = {
    model.name: model
    for model in (
        ModelDimensions("Qwen3-0.6B-Base", 1024, 3072, 28, 16, 8, 128, 151936, tied=True),
        ModelDimensions("Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936, tied=False),
        ModelDimensions("Qwen3-32B", 5120, 25600, 64, 64, 8, 128, 151936, tied=False),
    )
}


def model_dimensions(name: str) -> ModelDimensions:
    """The dimensions of the model called `name`; raises ValueError with the known names."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(MODELS)}")
    return MODELS[name]
