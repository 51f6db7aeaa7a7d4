"""All state of a group of ranks on a device: what collectives and planners make once and use again.

    state = states.of(group, device)        # the default one, which public functions use; `maco_lib.context` to users

It holds what others make (`get`): shared memory, flags, inboxes, prepared launches, communicators, plans.
It knows nothing of what that is, so it is below everything that does. The registry of default states is the only
state of a module in this library.
"""

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from maco_lib.kernels.launch import Launches
from maco_lib.timing import gather
from maco_lib.turns import NoTurns, Turns, capturing

T = TypeVar("T")


class State:
    """Of `group` on `device`; made by `of`. It lives as long as the group, or until `close`."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        # The group keeps its state, which must not keep it in turn: a gloo group left at exit aborts the process.
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
            raise RuntimeError(f"the group of this state on {self.device} is gone")
        return group

    def get(self, make: Callable[..., T], *arguments: Hashable) -> T:
        """What `make(state, *arguments)` gave the first time, and is kept for."""
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


class OnDevice:
    """What all states of one device share: the turns of its streams, the side streams, a spare element."""

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
    """The default states by group and device, and what those of one device share."""

    def __init__(self):
        self.states: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, State]]
        self.states = weakref.WeakKeyDictionary()
        self.devices: dict[torch.device, OnDevice] = {}

    def of(self, group: dist.ProcessGroup, device: torch.device) -> State:
        of_group = self.states.get(group)
        if of_group is None:
            of_group = self.states.setdefault(group, {})
        if device not in of_group:
            of_group[device] = State(group, device)
        return of_group[device]

    def drop(self, state: State) -> None:
        of_group = self.states.get(state.reference(), {})
        if of_group.get(state.device) is state:
            del of_group[state.device]


REGISTRY = Registry()


def of(group: dist.ProcessGroup | None, device: torch.device) -> State:
    """The default state of `group` (None: all ranks) on this rank's device, made at the first call."""
    return REGISTRY.of(group or dist.group.WORLD, device)


def of_group(group: dist.ProcessGroup) -> list[State]:
    """The states of a group that were made."""
    return list(REGISTRY.states.get(group, {}).values())


def on(device: torch.device) -> OnDevice:
    """What the states of a device share."""
    if device not in REGISTRY.devices:
        REGISTRY.devices[device] = OnDevice(device)
    return REGISTRY.devices[device]
