"""The machine that a run is planned for: a known device by its data sheet, or the one that is here."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from searchqa_agents.launch import place
from searchqa_agents.loading import chosen_device
from searchqa_agents.plan_memory import human
from searchqa_envs.errors import ConfigurationError

if TYPE_CHECKING:
    from searchqa_agents.plan import Plan
    from searchqa_agents.settings import TrainSettings


class Device(NamedTuple):
    """What a device can do, by its data sheet: dense operations per second in bfloat16 and in plain float32, bytes per second, bytes."""

    bfloat16: float
    float32: float
    bandwidth: float
    memory: float


DEVICES = {
    "a100": Device(312e12, 19.5e12, 2.04e12, 80e9),  # NVIDIA A100 80GB SXM
    "h100": Device(989e12, 67e12, 3.35e12, 80e9),  # NVIDIA H100 SXM
    "h200": Device(989e12, 67e12, 4.8e12, 141e9),  # NVIDIA H200 SXM
    "h20": Device(148e12, 44e12, 4.0e12, 96e9),  # NVIDIA H20
}


class Machine(NamedTuple):
    """What a run is planned for."""

    kind: str
    """cpu or cuda"""
    name: str
    processes: int
    sharded: bool
    memory: float
    """bytes for each process"""
    update: float
    """operations per second of updates, at the peak"""
    read: float
    """of reading contexts, in the type of the weights"""
    bandwidth: float
    """bytes per second"""
    utilisation: float


def planned_machine(plan: Plan, settings: TrainSettings) -> Machine:
    """The machine that a run is planned for; its row and its warnings go into the plan. Raises ``ConfigurationError`` for settings that cannot be."""
    wanted = settings.plan
    processes = place().world_size if wanted.processes is None else wanted.processes
    if processes < 1:
        raise ConfigurationError(f"plan.processes must be at least 1, or null for those of this launch; got {processes}.")
    if not 0 < wanted.utilisation <= 1:
        raise ConfigurationError(f"plan.utilisation must be above 0 and at most 1; got {wanted.utilisation}.")
    for name in ("memory_gb", "flops_per_second", "bytes_per_second"):
        given = getattr(wanted, name)
        if given is not None and not 0 < given < math.inf:
            raise ConfigurationError(f"plan.{name} must be above 0 and finite, or null for the device's own; got {given}.")
    if wanted.device is not None and wanted.device not in (*DEVICES, "cpu"):
        raise ConfigurationError(
            f"plan.device must be one of {[*DEVICES, 'cpu']}, or null for the one that is here; got {wanted.device!r}."
        )
    sharded = settings.parallel == "fsdp2" and processes > 1
    if settings.parallel != "auto" and processes == 1:
        plan.warnings.append(
            f"parallel={settings.parallel} is for several processes, and a real start of one is refused: start it with torchrun, give parallel=auto, or "
            "plan for several with plan.processes=N."
        )
    kind, name = "cuda", wanted.device or ""
    if wanted.device in DEVICES:
        device, here = DEVICES[wanted.device], False
    else:
        place_here = "cpu" if wanted.device == "cpu" else chosen_device(settings.device)
        kind, here = ("cuda" if place_here.startswith("cuda") else "cpu"), True
        name, device = _this_device(kind, processes, measure=wanted.flops_per_second is None or wanted.bytes_per_second is None)
    half = getattr(settings.algo, "precision", "float32") == "bfloat16" or settings.dtype == "bfloat16"
    update = wanted.flops_per_second or (device.bfloat16 if half else device.float32)
    read = wanted.flops_per_second or (device.bfloat16 if settings.dtype == "bfloat16" else device.float32)
    limit = device.memory if wanted.memory_gb is None else wanted.memory_gb * 1e9
    bandwidth = wanted.bytes_per_second or device.bandwidth
    label = f"{processes} x {name}" + (" (this machine)" if here else "")
    plan.limit = limit
    form = "" if processes == 1 else ", FSDP2" if sharded else ", DDP"
    plan.add("Machine", label + form, f"{human(limit)} each, {update / 1e12:.3g} TFLOP/s in updates, {bandwidth / 1e9:.3g} GB/s")
    return Machine(kind, name, processes, sharded, limit, update, read, bandwidth, wanted.utilisation)


def _this_device(kind: str, processes: int, *, measure: bool) -> tuple[str, Device]:
    """What is here: on the CPU the memory that is free, shared by the processes, and speeds that a moment's work measures."""
    import torch

    if kind == "cuda":
        name = torch.cuda.get_device_name()
        free, total = torch.cuda.mem_get_info()
        known = next((device for word, device in DEVICES.items() if word in name.lower().replace("-", " ").split()), None)
        if known is not None:
            return name, known._replace(memory=float(total))
        rate, bandwidth = _measured_speed("cuda") if measure else (1.0, 1.0)
        return name, Device(rate, rate, bandwidth, float(free))
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next((line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable")), "")
        available = int(line.split()[1]) * 1024 if line else available
    rate, bandwidth = _measured_speed("cpu") if measure else (1.0, 1.0)
    return "CPU", Device(rate / processes, rate / processes, bandwidth / processes, float(available) / processes)


def _measured_speed(kind: str) -> tuple[float, float]:
    """Operations per second of a matrix product in float32, and bytes per second of a copy: the best of three."""
    import torch

    matrix = torch.ones(1024, 1024, device=kind)
    block = torch.ones(2**24, device=kind)
    rates, speeds = [], []
    for _ in range(3):
        begun = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        middle = time.perf_counter()
        float(block.clone()[0])
        rates.append(2 * 1024**3 / (middle - begun))
        speeds.append(2 * block.nbytes / (time.perf_counter() - middle))
    return max(rates), max(speeds)
