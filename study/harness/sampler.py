"""Clocks, power and temperature while something runs, so that a throttled measurement can be told from a good one."""

import statistics
import threading
from typing import Any, Self

import psutil
import pynvml

from maco_lib import nvml


class Sampler:
    """Samples every visible GPU (or the CPU) in a thread, from `with Sampler() as sampler:` to the end of the block.

    `sampler.summary()` then gives, per device, the number of samples and the median, least and greatest value of each
    quantity: {"num_samples": 40, "period_s": 0.5, "devices": [{"sm_clock_mhz": {"median": 1980, "min": …, "max": …},
    …}]}. Quantities a device does not report are left out.
    """

    def __init__(self, period_s: float = 0.5):
        self.period_s = period_s
        self._samples: list[list[dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with nvml.session() as answers:
            gpus = nvml.handles() if answers else []
            while True:
                self._samples.append([sample_gpu(handle) for handle in gpus] if gpus else [sample_cpu()])
                if self._stop.wait(self.period_s):
                    return

    def summary(self) -> dict[str, Any]:
        devices = []
        for readings in zip(*self._samples, strict=True):
            quantities = sorted(set().union(*readings))
            values = {name: [reading[name] for reading in readings if name in reading] for name in quantities}
            devices.append(
                {
                    name: {"median": round(statistics.median(series), 1), "min": min(series), "max": max(series)}
                    for name, series in values.items()
                }
            )
        return {"num_samples": len(self._samples), "period_s": self.period_s, "devices": devices}


def sample_gpu(handle) -> dict[str, float]:
    """One reading of one GPU: clocks in MHz, power in W, temperature in degrees Celsius, busy time in percent."""
    power = nvml.ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    reading = {
        "sm_clock_mhz": nvml.ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        "memory_clock_mhz": nvml.ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        "power_w": None if power is None else power / 1000,
        "temperature_c": nvml.ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        "utilization_percent": getattr(nvml.ask(pynvml.nvmlDeviceGetUtilizationRates, handle), "gpu", None),
    }
    return {name: value for name, value in reading.items() if value is not None}


def sample_cpu() -> dict[str, float]:
    """One reading of the CPU: clock in MHz (where the kernel reports it), load of all cores in percent."""
    frequency = psutil.cpu_freq()
    reading = {"utilization_percent": psutil.cpu_percent()}
    if frequency is not None and frequency.current:
        reading["clock_mhz"] = round(frequency.current, 1)
    return reading
