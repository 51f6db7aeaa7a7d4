"""The order in which the streams of a GPU run what waits for other ranks, and cheap questions about streams."""

import ctypes
from collections.abc import Callable

import torch

from maco_lib.kernels.launch import driver


class Turns:
    """The order in which the streams of a GPU run what waits for other ranks: one after the other, as it was issued.

    Collectives share flags and memory, and some need all SMs: two that run side by side on one GPU, and begin in
    another order on another, would wait for each other for ever. Issued in one order on every rank, each on whatever
    stream, they run in that order everywhere. Costs nothing as long as they are on one stream.

    A replayed graph is ordered by the caller: it counts for nothing here.
    """

    def __init__(self, device: torch.device):
        self.device, self.index = device, device.index or 0
        self.streams: dict[int, torch.cuda.Stream] = {}  # by the driver's handle: torch takes 3 µs to make one anew
        self.stream: int | None = None  # of the last turn
        self.end: torch.cuda.Event | None = None  # of the last turn, where streams alternate
        self.has_ended, self.captured_in = False, 0  # whether `end` was recorded, and in which capture
        self.unawaited: torch.cuda.Event | None = None  # of the last planned one that nobody has waited for
        self.watches: list[Callable[[], None]] = []  # each raises RuntimeError where a rank did not come

    def current(self) -> torch.cuda.Stream:
        """The current stream of the device."""
        handle = torch._C._cuda_getCurrentRawStream(self.index)
        stream = self.streams.get(handle)
        if stream is None:
            stream = self.streams[handle] = torch.cuda.current_stream(self.device)
        return stream

    def take(self) -> None:
        """What the current stream does from now on comes after the turn before.

        Raises RuntimeError while a graph is captured if that is a planned collective that was begun before, and that
        nobody has waited for; and where a rank did not come.
        """
        self.check()
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        if stream != self.stream:
            self.switch(stream)
        self.has_ended = False

    def give(self) -> None:
        """The turn has been issued: a turn on another stream need not wait for what this one does next."""
        if self.end is not None:
            stream = self.current()
            self.captured_in, self.has_ended = capture_of(stream), True
            self.end.record(stream)

    def switch(self, stream: int) -> None:
        if self.stream is not None:
            last, capture = stream_of(self.stream, self.device), capture_of(self.current())
            if capture == capture_of(last):
                self.wait_for(last, capture)
            elif capture and self.unawaited is not None:
                raise RuntimeError("a planned collective was begun before this capture: wait() for it first")
        self.stream = stream

    def wait_for(self, last: torch.cuda.Stream, capture: int) -> None:
        if self.end is None:
            self.end = torch.cuda.Event()
        if not self.has_ended:
            self.end.record(last)
        elif self.captured_in != capture:
            return  # in a capture that is over: of no kernel that runs, or runs in this capture
        self.current().wait_event(self.end)

    def awaited(self, event: torch.cuda.Event) -> None:
        """The current stream waits for a collective that was begun, whose end is `event`."""
        self.current().wait_event(event)
        if self.unawaited is event:
            self.unawaited = None

    def check(self) -> None:
        """Raise RuntimeError where a kernel of this device has given up (`comm.watch`)."""
        for check in self.watches:
            check()


def stream_of(handle: int, device: torch.device) -> torch.cuda.Stream:
    """The stream by the driver's handle."""
    return torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)


def capturing(device: torch.device) -> bool:
    """Whether the current stream is being captured in a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def capture_of(stream: torch.cuda.Stream) -> int:
    """The number of the capture that a stream is in, 0 where it is in none."""
    if not stream.cuda_stream:
        return 0  # the default stream cannot be captured
    status, number = ctypes.c_int(), ctypes.c_uint64()
    handle, none = ctypes.c_void_p(stream.cuda_stream), ctypes.c_void_p()
    error = driver().cuStreamGetCaptureInfo_v2(handle, ctypes.byref(status), ctypes.byref(number), none, none, none)
    if error:
        raise RuntimeError(f"asking whether a stream is captured: error {error} of the driver")
    return number.value if status.value == 1 else 0


class Within:
    """`with Within(stream, turns):` as torch.cuda.stream, at a tenth of its cost to the host."""

    __slots__ = ("inner", "outer", "turns")

    def __init__(self, stream: torch.cuda.Stream, turns: Turns):
        self.inner, self.turns = stream, turns

    def __enter__(self) -> None:
        if torch._C._cuda_getDevice() == self.turns.index:
            self.outer = self.turns.current()
            set_stream(self.inner)
        else:
            self.outer = torch.cuda.stream(self.inner)
            self.outer.__enter__()

    def __exit__(self, *error: object) -> None:
        if isinstance(self.outer, torch.cuda.Stream):
            set_stream(self.outer)
        else:
            self.outer.__exit__(*error)


def set_stream(stream: torch.cuda.Stream) -> None:
    torch._C._cuda_setStream(stream.stream_id, stream.device_index, stream.device_type)


class NoTurns:
    """On a CPU, where nothing runs by itself."""

    def check(self) -> None:
        """Nothing."""

    def take(self) -> None:
        """Nothing."""

    def give(self) -> None:
        """Nothing."""
