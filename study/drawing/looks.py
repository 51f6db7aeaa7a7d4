"""What every method, backend and arm is called and how it is drawn: one table of labels, colours and markers.

What is not in it is called by its own name, and drawn in a colour and marker that nothing in it has.
"""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

# Okabe and Ito's palette: told apart with every common colour blindness.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C"
LIGHT = "#D9D9D9"

# Those of `comm.mailed` are push above so many bytes (that module imports torch, this one must not): what they are
# called as a whole, and up to there.
PUSH_ABOVE = {"maco_ll": 2**18, "maco_ll128": 2**22}
ABOVE = "maco_push_128"
LINES_THEN_PUSH, IN_LINES = "lines to 256 KiB, then push", "one-shot in lines"
LONG_THEN_PUSH, IN_LONG_LINES = "lines of 128 B to 4 MiB, then push", "lines of 128 B"


@dataclass(frozen=True)
class Look:
    """The fixed appearance of one method, backend or arm."""

    label: str
    colour: str
    marker: str


LOOKS: dict[str, Look] = {
    # overlap methods
    "sequential": Look("sequential", BLACK, "s"),
    "sequential_unsynchronised": Look("sequential, no host wait", GREY, "s"),
    "two_stream": Look("two streams", BLUE, "o"),
    "two_stream_matmul_first": Look("two streams, matmul first", BLUE, "<"),
    "two_stream_priority": Look("two streams, priority", SKY, "^"),
    "two_stream_cta": Look("two streams, {n} CTAs", PURPLE, "P"),
    "nccl_symmetric_stream": Look("NCCL symmetric on a stream", SKY, "d"),
    "two_shot_stream": Look("two-shot on a stream", GREEN, "v"),
    "vllm_custom_stream": Look("vLLM's kernels on a stream", GREY, "p"),
    "maco_pull_8_stream": Look("pull, 8 CTAs, on a stream", GREEN, "P"),
    "maco_pull_8_left": Look("pull, 8 CTAs, SMs reserved", GREEN, ">"),
    "maco_push_64_stream": Look("push, 64 CTAs, on a stream", VERMILLION, "X"),
    "maco_push_128_stream": Look("push, 128 CTAs, on a stream", VERMILLION, "D"),
    "maco_staged_8_stream": Look("staged, 8 CTAs, on a stream", PURPLE, "s"),
    "maco_staged_12_stream": Look("staged, 12 CTAs, on a stream", PURPLE, "h"),
    "maco_staged_12_left": Look("staged, 12 CTAs, SMs reserved", PURPLE, ">"),
    "copy_engine_stream": Look("copy engine on a stream", ORANGE, "X"),
    "auto": Look("planner", VERMILLION, "*"),
    "auto_untuned": Look("planner, untuned", ORANGE, "*"),
    # matmul + all-reduce
    "sequential_gloo": Look("sequential, gloo", ORANGE, "s"),
    "sequential_nccl": Look("sequential, NCCL", BLUE, "s"),
    "sequential_nccl_two_kernels": Look("sequential, NCCL, norm in two kernels", BLUE, "D"),
    "sequential_nccl_symmetric": Look("sequential, NCCL symmetric", SKY, "d"),
    "sequential_one_shot": Look("sequential, symmetric one-shot", VERMILLION, ">"),
    "sequential_two_shot": Look("sequential, symmetric two-shot", GREEN, "<"),
    "sequential_vllm_custom": Look("sequential, kernels of vLLM", GREY, "H"),
    "sequential_maco_ll": Look(f"sequential, {LINES_THEN_PUSH}", PURPLE, "*"),
    "sequential_maco_ll128": Look(f"sequential, {LONG_THEN_PUSH}", BLUE, "*"),
    "sequential_maco_one_shot_64": Look("sequential, one-shot, 64 CTAs", ORANGE, ">"),
    "sequential_maco_push_64": Look("sequential, push, 64 CTAs", VERMILLION, "X"),
    "sequential_maco_push_128": Look("sequential, push, 128 CTAs", VERMILLION, "D"),
    "sequential_fastest": Look("sequential, fastest other all-reduce", BLACK, "D"),
    "chunked_nccl": Look("chunked, NCCL", SKY, "p"),
    **{f"chunked{n}_nccl": Look(f"{n} chunks, NCCL", SKY, marker) for n, marker in ((2, "2"), (4, "4"))},
    "async_tp": Look("torch async-TP", GREY, "v"),
    "chunked": Look("chunked", GREEN, "^"),
    **{
        f"chunked{n}_{backend}": Look(f"{n} chunks, {label}", colour, marker)
        for backend, label, colour in (
            ("gloo", "gloo", ORANGE),
            ("maco_staged_8", "staged, 8 CTAs", PURPLE),
            ("maco_push_64", "push, 64 CTAs", GREEN),
        )
        for n, marker in ((2, "2"), (4, "4"), (8, "8"))
    },
    "signalled": Look("signalled", ORANGE, "o"),
    "persistent": Look("persistent kernel", PURPLE, "P"),
    "decode": Look("decode kernels", PURPLE, "v"),
    "fused_norm": Look("fused with residual and norm", PURPLE, "h"),
    # communication backends
    "nccl": Look("NCCL", BLUE, "D"),
    "nccl_cta": Look("NCCL, {n} CTAs", PURPLE, "p"),
    "nccl_symmetric": Look("NCCL, symmetric buffers", SKY, "D"),
    "gloo": Look("gloo", ORANGE, "D"),
    "symm_mem_one_shot": Look("symmetric one-shot", VERMILLION, ">"),
    "symm_mem_two_shot": Look("symmetric two-shot", GREEN, "<"),
    "maco_ll": Look(LINES_THEN_PUSH, PURPLE, "*"),
    "maco_ll128": Look(LONG_THEN_PUSH, BLUE, "*"),
    "maco_one_shot_64": Look("one-shot, 64 CTAs", ORANGE, ">"),
    "maco_pull_8": Look("pull, 8 CTAs", GREEN, "P"),
    "maco_push_64": Look("push, 64 CTAs", VERMILLION, "X"),
    "maco_push_128": Look("push, 128 CTAs", VERMILLION, "D"),
    "maco_staged_8": Look("staged, 8 CTAs", PURPLE, "s"),
    "maco_staged_12": Look("staged, 12 CTAs", PURPLE, "h"),
    "copy_engine": Look("copy engine", ORANGE, "x"),
    "vllm_custom": Look("kernels of vLLM", GREY, "H"),
    # inference arms
    "transformers_eager": Look("transformers eager", BLACK, "h"),
    "transformers_compiled": Look("transformers compiled", ORANGE, "d"),
    "vllm_eager": Look("vLLM eager", SKY, "H"),
    "vllm": Look("vLLM", BLUE, "*"),
    # models
    "Qwen3-0.6B-Base": Look("Qwen3-0.6B", SKY, "v"),
    "Qwen3-8B": Look("Qwen3-8B", BLUE, "8"),
    "Qwen3-32B": Look("Qwen3-32B", BLACK, "d"),
    # verdicts
    "helps": Look("helps", GREEN, "P"),
    "hurts": Look("hurts", VERMILLION, "X"),
    "undecided": Look("undecided", GREY, "o"),
}
CTA_MARKERS = {1: "1", 2: "2", 4: "P", 8: "X", 16: "p", 24: "d", 32: "h"}
# What others are called, which no Markdown or formula looks into.
NAME = re.compile(r"[a-zA-Z0-9]+(_+[a-zA-Z0-9]+)*")
# What is left, which no name above has.
SPARE = [
    (colour, marker)
    for marker in "osD^v<>pPXhHd*8"
    for colour in (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY)
    if (colour, marker) not in {(look.colour, look.marker) for look in LOOKS.values()}
]


def look(name: str) -> Look:
    """The appearance of `name`, the same in every figure; `..._cta<N>` differs in its marker by N.

    One that is not in the table has its name as its label, and of `SPARE` what follows from the name. Raises ValueError
    on what is no name, as a table of others' making may hold.
    """
    if name in LOOKS:
        return LOOKS[name]
    family = re.fullmatch(r"(\w+_cta)(\d+)", name)
    if family and family[1] in LOOKS:
        base, count = LOOKS[family[1]], int(family[2])
        return Look(base.label.format(n=count), base.colour, CTA_MARKERS.get(count, base.marker))
    if not NAME.fullmatch(name):
        raise ValueError(f"no label for {name!r}: a name is of letters and digits, with _ between them")
    return Look(name, *SPARE[zlib.crc32(name.encode()) % len(SPARE)])


def label_at(name: str, num_bytes: float) -> str:
    """The label of `name` where it sums `num_bytes`: in lines or by push, not both."""
    for lines, most in PUSH_ABOVE.items():
        if name.endswith(lines) and num_bytes > most:
            name = name.removesuffix(lines) + ABOVE
    return look(name).label.replace(LINES_THEN_PUSH, IN_LINES).replace(LONG_THEN_PUSH, IN_LONG_LINES)


def ordered(names: Iterable[str]) -> list[str]:
    """The names once each, in the order of LOOKS, CTA variants by their number; then those that are not in it."""
    families = {name: number for number, name in enumerate(LOOKS)}

    def place(name: str) -> tuple[int, int, str]:
        count = re.search(r"_cta(\d+)$", name)
        family = families.get(re.sub(r"_cta\d+$", "_cta", name), len(families))
        return family, int(count[1]) if count else 0, name

    return sorted(set(names), key=place)
