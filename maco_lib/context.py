"""All state of a group of ranks on a device: what collectives and planners make once and use again.

    context = maco_lib.context.of(group, device)          # the group's default context, which public functions use
    context.prepare(weights, rows)                        # collective, once: then no call has to make anything
    context.close()

It holds what others make (`get`): shared memory, flags, inboxes, prepared launches, communicators, plans, calibration.
It knows nothing of what that is, so it is below everything that does. The registry of default contexts is the only
state of a module in this library.
"""

import ctypes
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from maco_lib.kernels.launch import Launches, driver
from maco_lib.timing import gather

T = TypeVar("T")


class Context:
    """Of `group` on `device`; made by `of`. It lives as long as the group, or until `close`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        # The group keeps its context, which must not keep it in turn: a gloo group left at exit aborts the process.
        self.reference, self.device = weakref.ref(group), device
        self.made: dict[Hashable, Any] = {}
        self.turns = on(device).turns
        self.together_at: set[Hashable] = set()
        self.calls = Launches()  # records of calls that have run (`overlap.calls`)

    @property
    def group(self) -> dist.ProcessGroup:
        """The group; RuntimeError where it is gone."""
        group = self.reference()
        if group is None:
            raise RuntimeError(f"the group of this context on {self.device} is gone")
        return group

    def get(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """What `make(context, *arguments)` gave the first time, and is kept for."""
        key = make, *arguments
        if key not in self.made:
            self.made[key] = make(self, *arguments)
        return self.made[key]

    def known(self, make: Callable[..., T], *arguments: Hashable) -> T | None:
        """What `get` has made, None where it has not."""
        return self.made.get((make, *arguments))

    def together(self, key: Hashable) -> None:
        """Wait on the host, the first time for a key, until every rank has come as far. Collective.

        What one rank compiles the others so wait for here, and not in a kernel, which does not wait for ever.
        """
        if key not in self.together_at and not capturing(self.device):
            gather(None, self.group)
            self.together_at.add(key)

    def forget(self, make: Callable[..., Any]) -> list[Any]:
        """Let go of everything that `make` made, and return it."""
        return [self.made.pop(key) for key in list(self.made) if key[0] is make]

    def prepare(self, weights: Sequence[torch.Tensor], rows: Sequence[int]) -> None:
        """Make all that `linear_all_reduce` and its norm need for these weights (N, K) and numbers of rows. Collective.

        Plans, shared memory, flags, kernels and launches: afterwards a call on such a shape, without a bias or with
        one, makes nothing, compiles nothing, and talks to no other rank on the host, so that a CUDA graph can be
        captured at once. Where a shape was tuned (`tune_linear`), with its tuned plan. Raises ValueError on what
        `tune_linear` refuses.
        """
        from maco_lib.overlap.prepare import prepare  # what is made is known there

        prepare(self, weights, rows)

    def close(self) -> None:
        """Let go of everything: of what is used by no kernel and no graph any more. Every rank calls it.

        The next call makes what it needs anew. Destroying the default group does as much for NCCL's communicators.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        gather(None, self.group)  # nor by a peer's kernels
        for made in reversed(self.made.values()):
            if hasattr(made, "destroy"):
                made.destroy()
        self.made.clear()
        self.calls.clear()
        REGISTRY.drop(self)


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


class OnDevice:
    """What all contexts of one device share: the turns of its streams, the side streams, a spare element."""

    def __init__(self, device: torch.device):
        self.device = device
        self.turns = Turns(device) if device.type == "cuda" else NoTurns()
        self.streams: dict[int, torch.cuda.Stream] = {}
        self.events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self.launches = Launches()  # of kernels that are no group's
        self.element: torch.Tensor | None = None

    def side_stream(self, priority: int) -> torch.cuda.Stream:
        """The stream for collectives of this priority, made once: those issued on it run in order."""
        if priority not in self.streams:
            self.streams[priority] = torch.cuda.Stream(self.device, priority=priority)
        return self.streams[priority]

    def fork_and_join(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Two events, for where a stream leaves the current one and comes back to it before anybody else's does."""
        if self.events is None:
            self.events = torch.cuda.Event(), torch.cuda.Event()
        return self.events

    def spare_element(self) -> torch.Tensor:
        """float32 (1,), that nobody reads."""
        if self.element is None:
            with torch.inference_mode(False):  # one made in inference mode could not be written to outside
                self.element = torch.zeros(1, device=self.device)
        return self.element


class Registry:
    """The default contexts by group and device, and what those of one device share."""

    def __init__(self):
        self.contexts: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Context]]
        self.contexts = weakref.WeakKeyDictionary()
        self.devices: dict[torch.device, OnDevice] = {}

    def of(self, group: dist.ProcessGroup, device: torch.device) -> Context:
        of_group = self.contexts.get(group)
        if of_group is None:
            of_group = self.contexts.setdefault(group, {})
        if device not in of_group:
            of_group[device] = Context(group, device)
        return of_group[device]

    def drop(self, context: Context) -> None:
        of_group = self.contexts.get(context.reference(), {})
        if of_group.get(context.device) is context:
            del of_group[context.device]


REGISTRY = Registry()


def of(group: dist.ProcessGroup | None, device: torch.device) -> Context:
    """The default context of `group` (None: all ranks) on this rank's device, made at the first call."""
    return REGISTRY.of(group or dist.group.WORLD, device)


def of_group(group: dist.ProcessGroup) -> list[Context]:
    """The contexts of a group that were made."""
    return list(REGISTRY.contexts.get(group, {}).values())


def on(device: torch.device) -> OnDevice:
    """What the contexts of a device share."""
    if device not in REGISTRY.devices:
        REGISTRY.devices[device] = OnDevice(device)
    return REGISTRY.devices[device]
