"""Section 2: greedy decoding of exactly `new_tokens` tokens by four engines from one checkpoint, one arm a process.

Times are the host's clock around the whole call, from token ids in host lists to token ids in host lists; see
`engines` for how each arm's first token is timed. After the timing the tokens are judged by a float32 reference
(`reference`).
"""

import math
import random
from typing import Any

from maco_lib.stats import median_interval
from study.harness.worker import Context, Result, Samples, main
from study.sections.inference.checkpoint import Checkpoint, resolve
from study.sections.inference.engines.engine import Engine, Generation
from study.sections.inference.engines.start import start

# "The future of artificial intelligence is" in Qwen's tokens: the published prompt.
PUBLISHED_PROMPT = [785, 3853, 315, 20443, 11229, 374]
PROMPT_SEED = 11
NUM_FIRST_TOKENS = 32
MAX_CHECKED = 4
NUMBERS = (
    "e2e_ms", "e2e_lo_ms", "e2e_hi_ms", "ttft_ms", "tpot_ms", "tokens_per_s", "start_s", "parameters_millions",
    "reference_gap",
)  # fmt: skip


def make_prompts(batch: int, prompt_tokens: int, vocab_size: int) -> list[list[int]]:
    """[batch][prompt_tokens] token ids, the same for every arm; a larger batch begins with the smaller one's prompts.

    The first is the published prompt, cut off or continued with random ids to the asked length. The others are random
    throughout: equal prompts would let an engine share work that real requests do not share.
    """
    prompts = []
    for request in range(batch):
        ids = random.Random(f"{PROMPT_SEED}/{request}")
        prompts.append([ids.randrange(vocab_size) for _ in range(prompt_tokens)])
    head = PUBLISHED_PROMPT[:prompt_tokens]
    prompts[0][: len(head)] = head
    return prompts


def measure(point: dict[str, Any], context: Context) -> Result:
    """One batch of one arm: one row; E2E, TTFT and TPOT of every repetition as samples. A failing arm is a row that
    says so."""
    row: dict[str, Any] = dict.fromkeys(NUMBERS, math.nan)
    row.update(weights="", checkpoint="", engine="", threads=0, first_tokens="", correct=False)
    try:
        samples = run(point, context, row)
    except Exception as error:  # whatever an engine raises is this arm's result, and the other arms go on
        context.state["failure"] = error if "engine" not in context.state else None
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        samples = []
    return Result([row], samples)


def run(point: dict[str, Any], context: Context, row: dict[str, Any]) -> list[Samples]:
    """Fill `row` for one point and return the samples; raises RuntimeError when an engine gave not what was asked."""
    arm, batch, new_tokens = point["arm"], point["batch"], point["new_tokens"]
    checkpoint = the_checkpoint(point, context)
    row.update(weights=checkpoint.weights, checkpoint=checkpoint.identity)
    row["parameters_millions"] = checkpoint.num_parameters / 1e6
    engine = the_engine(point, context, checkpoint)
    row.update(engine=engine.version, threads=engine.threads, start_s=engine.start_s)
    prompts = make_prompts(batch, point["prompt_tokens"], vocab_size(checkpoint))
    times: list[Generation] = []
    for repetition in range(point["num_warmups"] + point["num_repeats"]):
        warming = repetition < point["num_warmups"]
        context.note(f"{arm}, batch {batch}: {'warming up' if warming else 'measuring'}")
        generation = engine.generate(prompts, new_tokens)
        counts = {len(tokens) for tokens in generation.tokens}
        if len(generation.tokens) != batch or counts != {new_tokens}:
            raise RuntimeError(f"{arm} gave {sorted(counts)} new tokens for {len(generation.tokens)} requests, "
                               f"asked for {new_tokens} for {batch}")  # fmt: skip
        if not warming:
            times.append(generation)
    row["first_tokens"] = " ".join(map(str, times[-1].tokens[0][:NUM_FIRST_TOKENS]))
    context.note(f"{arm}, batch {batch}: checking against the float32 reference")
    row["reference_gap"] = check(prompts, times[-1].tokens, context, checkpoint)
    e2e = [1e3 * generation.e2e_s for generation in times]
    ttft = [1e3 * generation.ttft_s for generation in times]
    pairs = zip(e2e, ttft, strict=True) if new_tokens > 1 else []
    tpot = [(total - first) / (new_tokens - 1) for total, first in pairs]
    row["e2e_ms"], row["e2e_lo_ms"], row["e2e_hi_ms"] = median_interval(e2e)
    row["ttft_ms"] = median_interval(ttft)[0]
    row["tpot_ms"] = median_interval(tpot)[0] if tpot else math.nan
    row["tokens_per_s"] = batch * new_tokens / row["e2e_ms"] * 1e3
    row["correct"] = True
    labels = {"arm": arm, "batch": batch}
    quantities = {"e2e_ms": e2e, "ttft_ms": ttft, "tpot_ms": tpot}
    return [Samples(quantity, [values], labels) for quantity, values in quantities.items() if values]


def the_checkpoint(point: dict[str, Any], context: Context) -> Checkpoint:
    """The checkpoint of this process's points, found or made once."""
    if point["model"] not in context.state:
        context.note(f"finding or making the checkpoint {point['model']}")
        context.state[point["model"]] = resolve(point["model"])
    return context.state[point["model"]]


def the_engine(point: dict[str, Any], context: Context, checkpoint: Checkpoint) -> Engine:
    """The engine of this process's arm, started once; a start that failed is not tried again for the next batch."""
    if failure := context.state.get("failure"):
        raise failure
    if "engine" not in context.state:
        context.note(f"starting {point['arm']}")
        max_tokens = point["prompt_tokens"] + point["new_tokens"]
        context.state["engine"] = start(
            point["arm"], str(checkpoint.path), point["dtype"], str(context.device), max_tokens, context.step
        )
    return context.state["engine"]


def vocab_size(checkpoint: Checkpoint) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(checkpoint.path).vocab_size


def check(prompts: list[list[int]], tokens: list[list[int]], context: Context, checkpoint: Checkpoint) -> float:
    """The largest gap to the reference over up to four requests, the first and the last among them; see
    `Reference.gap`.

    Raises RuntimeError when it is beyond the tolerance.
    """
    from study.sections.inference.reference import TOLERANCE, Reference

    if "reference" not in context.state:
        context.state["reference"] = Reference(str(checkpoint.path))
    last = len(prompts) - 1
    requests = sorted({round(place * last / (MAX_CHECKED - 1)) for place in range(MAX_CHECKED)})
    gaps = []
    for request in requests:
        context.step()
        gaps.append(context.state["reference"].gap(prompts[request], tokens[request]))
    gap = max(gaps)
    if gap > TOLERANCE:
        raise RuntimeError(f"a chosen token lies {gap:.3g} standard deviations below the float32 reference's choice")
    return gap


if __name__ == "__main__":
    main(measure)
