"""The processes of a launch: who they are, where they compute, and the few words they exchange outside the model.

One World lives as long as the launch; every stage of a chain builds its own Backend on it.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from pipeline.backend.place import Place
from pipeline.backend.stop import StopFlag, Stopped
from shards.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)
FLIGHT_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
COLLECTIVES_RECORDED = 2000


@dataclass(frozen=True)
class World:
    """Rank `rank` of `size`, training on `device` by `strategy` ("ddp", "fsdp" or "deepspeed").

    It talks over `group` (None: the launch's); `background` is for what is said beside the training."""

    strategy: str
    rank: int
    size: int
    device: torch.device
    stop: StopFlag = field(default_factory=StopFlag)
    place: Place = field(default_factory=Place)
    group: dist.ProcessGroup | None = None
    background: dist.ProcessGroup | None = None

    @property
    def nodes(self) -> int:
        """Machines of the launch, as the launcher numbers ranks on them."""
        return max(1, self.size // int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def apart(self) -> "World":
        """The same ranks over the background's group: collectives of two threads in one group would mix."""
        return dataclasses.replace(self, group=self.background)

    def barrier(self) -> None:
        if self.size > 1:
            self.sum([0.0])

    def sum(self, values: Iterable[float]) -> list[float]:
        """Element-wise sum over ranks, in float64 on the CPU: it waits for the ranks, never for a device."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total, group=self.group)
        self.goes_on()
        return total.tolist()

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of a tensor of one shape on all of them, in place, on its own device."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        self.goes_on()
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor, which has the shape that all have, in place, on its own device."""
        if self.size > 1:
            dist.broadcast(tensor, src=0, group=self.group)
        self.goes_on()
        return tensor

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        self.goes_on()
        return values

    def from_main(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        self.goes_on()
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, which alone does it, on every rank; so is the UserError that it raises."""
        done: T | None = None
        failed: UserError | None = None
        if self.is_main:
            try:
                done = work()
            except UserError as error:
                failed = error
        done, failed = self.from_main((done, failed))
        if failed:
            raise failed
        return done  # type: ignore[return-value]

    def goes_on(self) -> None:
        """Some progress of this rank, while others wait for it."""
        self.place.goes_on()

    def should_stop(self) -> bool:
        """Whether any rank was signalled to stop; the same answer on every rank."""
        return self.poll(0)[0]

    def poll(self, count: int) -> tuple[bool, int]:
        """Whether any rank was signalled to stop, and the sum of all ranks' `count`; the same on every rank."""
        signalled, total = self.sum([float(self.stop.raised), float(count)])
        return signalled > 0, int(total)

    def reach(self, label: str) -> None:
        """A place that ranks may stop at. Raises Stopped, on every rank, where any was signalled to stop."""
        self.place.at(label)
        if self.should_stop():
            raise Stopped(label)


def start(
    device: str = "auto",
    processes: int = 0,
    stop: StopFlag | None = None,
    place: Place | None = None,
    timeout: timedelta = TIMEOUT,
) -> World:
    """Joins the launch that `accelerate launch`, torchrun or plain python began.

    device "cpu", "cuda" or "auto" (CUDA where there is one); `processes` > 0 is the world size to insist on; `stop` and
    `place` are known to others already; a collective fails after `timeout`.
    Raises UserError where CUDA was asked for and is not there, or the launcher started another number of processes.
    """
    device = _choose_device(device)
    strategy = _take_strategy(os.environ)
    if device == "cpu":
        # DeepSpeed picks its accelerator when it is first imported; on a CUDA machine it would not be the CPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not any(name in os.environ for name in FLIGHT_RECORDER):
        os.environ[FLIGHT_RECORDER[0]] = str(COLLECTIVES_RECORDED)
    if not dist.is_initialized():
        _join_group(device, timeout)
    state = PartialState(cpu=device == "cpu")
    background = dist.new_group(backend="gloo", timeout=timeout, group_desc="background")
    told = stop or StopFlag(), place or Place()
    world = World(strategy, state.process_index, state.num_processes, state.device, *told, background=background)
    _check(world, processes)
    world.stop.listen()
    return world


def _choose_device(device: str) -> str:
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError(
            "runtime.device is 'cuda', but torch sees no CUDA device here (torch.cuda.is_available() is False): "
            "run on a GPU machine with its driver, or pass --runtime.device cpu (slow; --debug for a laptop-sized run)"
        )
    return "cuda" if available and device != "cpu" else "cpu"


def _take_strategy(environment: "os._Environ[str]") -> str:
    """What the launch file asks for. FSDP's variables are removed: PartialState and Accelerator would act on them,
    and on the CPU silently run DDP or N jobs of one process; our FSDP2 is `fully_shard` called directly."""
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        for name in [name for name in environment if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
            del environment[name]
        return "fsdp"
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "deepspeed"
    return "ddp"


def _join_group(device: str, timeout: timedelta) -> None:
    """The process group of the launch; of one, without a launcher, so that nothing later needs to ask.

    CPU tensors travel over gloo also on GPU machines: agreeing on something never waits for a device.
    """
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def _check(world: World, processes: int) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if world.size != launched:
        raise UserError(
            f"the launcher started {launched} processes (WORLD_SIZE), but Accelerate formed a world of {world.size}: "
            "each would train alone on the same samples; start through a launch file of ds_configs/"
        )
    if processes and world.size != processes:
        raise UserError(
            f"runtime.processes asks for {processes} ranks, but the launcher started {world.size} ('accelerate launch "
            "--cpu' always starts one, silently); start through a launch file of ds_configs/, which names num_processes"
        )
