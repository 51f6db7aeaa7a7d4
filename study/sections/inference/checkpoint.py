"""The checkpoint that every inference engine loads: a local folder, a hub model, or random weights of published
dimensions.

Random weights are enough to time greedy decoding: the time depends on the shapes, not on the values. They are saved
once, so that every arm, and every later run, loads the very same file.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
import struct
import tempfile
from dataclasses import dataclass
from typing import Literal

from study.harness.files import default_cache
from study.models import MODELS, ModelDimensions

TINY = ModelDimensions("Qwen3-tiny", 256, 512, 2, 4, 2, 64, 32768, tied=True)
KNOWN_MODELS: dict[str, ModelDimensions] = {**MODELS, TINY.name: TINY}
HUB_OWNER = "Qwen"
HUB_TIMEOUT_S = 5.0
SEED = 20250704
# Scale of the layers' output matrices against Qwen3's 0.02. An attention output is an average over the context, the
# same at every step; kept small beside the MLP's, which depends on the last token, it does not lock greedy decoding
# onto one token.
ATTENTION_OUTPUT_SCALE, MLP_OUTPUT_SCALE = 0.5, 4.0
RECIPE = 1  # raise it whenever the random weights change: it is part of their folder's name
NUM_SPOTS, SPOT_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder in the Hugging Face layout. `num_parameters` counts the stored elements; `identity` is 16 hex
    digits that differ between checkpoints (see `identify`)."""

    path: pathlib.Path
    weights: Literal["local", "hub", "random"]
    name: str
    num_parameters: int
    identity: str


def check_model(model: str) -> None:
    """Raise ValueError, naming the known models, unless `model` can be resolved. Needs neither torch nor the
    network."""
    if _is_folder(model):
        weight_files(pathlib.Path(model).expanduser())
        return
    if model.removeprefix(f"{HUB_OWNER}/") in KNOWN_MODELS:
        return
    if model.count("/") == 1 and (not _offline() or _snapshot(model, local_files_only=True)):
        return
    offline = " (HF_HUB_OFFLINE is set: only what its cache holds)" if _offline() else ""
    raise ValueError(
        f"unknown model {model!r}: neither a folder, nor the OWNER/NAME of a hub model{offline}, "
        f"nor one of {', '.join(KNOWN_MODELS)}"
    )


def resolve(model: str, cache_dir: pathlib.Path | None = None) -> Checkpoint:
    """The checkpoint called `model`, made if need be in `cache_dir` ($MACO_CACHE, else ~/.cache/maco).

    A folder is taken as it is. A name is looked up in the hub's local cache, then among the random checkpoints made
    earlier (so that the arms of one study cannot differ because a network comes and goes), then on the hub, and at
    last is made with random weights. Raises ValueError for a folder that is not a checkpoint and for a name that none
    of these provides.
    """
    check_model(model)
    if _is_folder(model):
        return describe(pathlib.Path(model).expanduser().resolve(), "local", model)
    name = model.removeprefix(f"{HUB_OWNER}/")
    repository = model if "/" in model else f"{HUB_OWNER}/{model}"
    on_hub = name != TINY.name
    cache = cache_dir or default_cache()
    if cache is None:
        raise ValueError(f"there is no folder to keep {name} in: no home, and MACO_CACHE is not set")
    made = cache / "checkpoints" / f"{name}-random-{RECIPE}"
    if on_hub and (path := _snapshot(repository, local_files_only=True)):
        return describe(path, "hub", repository)
    if name in KNOWN_MODELS and made.exists():
        return describe(made, "random", name)
    if on_hub and not _offline() and (path := _snapshot(repository, local_files_only=False)):
        return describe(path, "hub", repository)
    if name not in KNOWN_MODELS:
        raise ValueError(f"model {model!r} cannot be had from the hub now; without it: {', '.join(KNOWN_MODELS)}")
    _make_random(KNOWN_MODELS[name], made)
    return describe(made, "random", name)


def weight_bytes(model: str) -> int | None:
    """Bytes of the model's bf16 weights, or of the folder's files; None for a hub model of unknown dimensions."""
    if _is_folder(model):
        return sum(file.stat().st_size for file in weight_files(pathlib.Path(model).expanduser()))
    dimensions = KNOWN_MODELS.get(model.removeprefix(f"{HUB_OWNER}/"))
    if dimensions is None:
        return None
    attention = 2 * dimensions.hidden * dimensions.head_dim * (dimensions.heads + dimensions.kv_heads)
    per_layer = attention + 3 * dimensions.hidden * dimensions.intermediate
    embeddings = dimensions.vocab * dimensions.hidden * (1 if dimensions.tied else 2)
    return 2 * (dimensions.layers * per_layer + embeddings)


def describe(path: pathlib.Path, weights: Literal["local", "hub", "random"], name: str) -> Checkpoint:
    files = weight_files(path)
    num_parameters = sum(math.prod(entry["shape"]) for file in files for entry in _tensors(file).values())
    return Checkpoint(path, weights, name, num_parameters, identify(path, files))


def weight_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a checkpoint folder; raises ValueError naming the folder and what is wrong with it."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        index = path / "model.safetensors.index.json"
        shards = (
            json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            if index.exists()
            else ["model.safetensors"]
        )
        files = [path / name for name in sorted(set(shards))]
        for file in files:
            _tensors(file)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is not a checkpoint: {error}") from None
    if "model_type" not in config:
        raise ValueError(f"{path} is not a checkpoint: config.json has no model_type")
    return files


def identify(path: pathlib.Path, files: list[pathlib.Path]) -> str:
    """16 hex digits of the SHA-256 over config.json and each weight file's name, size and 64 spots of 64 KiB spread
    evenly from its first byte to its last: cheap for any size, and different for other weights."""
    digest = hashlib.sha256((path / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for spot in range(NUM_SPOTS):
                stream.seek(max(0, size - SPOT_BYTES) * spot // (NUM_SPOTS - 1))
                digest.update(stream.read(SPOT_BYTES))
    return digest.hexdigest()[:16]


def _tensors(file: pathlib.Path) -> dict[str, dict]:
    # The header of a safetensors file: its length in 8 bytes, little endian, then JSON with each tensor's dtype and
    # shape.
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > file.stat().st_size:
            raise ValueError(f"{file.name} is no safetensors file, or was cut off")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    if end != file.stat().st_size:
        raise ValueError(f"{file.name} should be {end} bytes long, and is {file.stat().st_size}")
    return header


def _is_folder(model: str) -> bool:
    return pathlib.Path(model).expanduser().exists() or model.startswith((".", "/", "~"))


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _snapshot(repository: str, local_files_only: bool) -> pathlib.Path | None:
    """Folder of the hub model `repository`, or None where it cannot be had. One short question decides: no retries."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        if not local_files_only:
            huggingface_hub.HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
        path = pathlib.Path(
            huggingface_hub.snapshot_download(
                repository, local_files_only=local_files_only, allow_patterns=["*.json", "*.safetensors"]
            )
        )
        weight_files(path)
    except (OSError, ImportError, HFValidationError, ValueError, _http_error()):
        return None  # ImportError: what a SOCKS proxy needs is not installed
    return path


def _http_error() -> type[Exception]:
    """The base class of the connection errors of whichever HTTP client this huggingface_hub uses."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__mro__[1]


def _make_random(dimensions: ModelDimensions, path: pathlib.Path) -> None:
    """Save a bf16 Qwen3 of these dimensions with normal weights (std 0.02) from a fixed seed."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=dimensions.hidden,
        intermediate_size=dimensions.intermediate,
        num_hidden_layers=dimensions.layers,
        num_attention_heads=dimensions.heads,
        num_key_value_heads=dimensions.kv_heads,
        head_dim=dimensions.head_dim,
        vocab_size=dimensions.vocab,
        tie_word_embeddings=dimensions.tied,
        rope_theta=dimensions.rope_theta,
        rms_norm_eps=dimensions.rms_norm_eps,
        max_position_embeddings=32768,
        initializer_range=0.02,
        dtype="bfloat16",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    making = tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-")
    with torch.random.fork_rng(devices=[]), making as temporary:
        torch.manual_seed(SEED)
        default, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.bfloat16)
        try:
            model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.mul_(ATTENTION_OUTPUT_SCALE)
                layer.mlp.down_proj.weight.mul_(MLP_OUTPUT_SCALE)
        model.generation_config = GenerationConfig()
        folder = pathlib.Path(temporary) / path.name
        model.save_pretrained(folder)
        try:
            os.replace(folder, path)
        except OSError:
            # Another process finished the same checkpoint first; the seed is fixed, so theirs is ours.
            if not path.exists():
                raise
            shutil.rmtree(folder)
