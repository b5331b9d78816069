"""What machine this is."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from cibl_ray.bundle.targets import cpu_info
from cibl_ray.config import RunConfig
from pipelines.common.cores import usable_cores
from pipelines.common.errors import UserError


def resolve(config: RunConfig) -> RunConfig:
    """Decide device, precision and compilation by what this machine has, where the configuration leaves them to 'auto'.

    Every other 'auto' stays. It is decided where what it depends on is known:

    - `train.precision` and `train.compile` of a long run, again: `training.arithmetic.decide`, which times a few steps.
    - `loader.cache`: `training.setup.settle`, by the images and the memory of all workers.
    - `loader.kind`: `pipelines.loaders.make`, as a loader is opened.
    - `train.batch_norm`: `training.batch_norm.keeps_statistics`.
    - `train.head_start`: `training.trainer.Trainer`, as it makes the network.
    - `train.tau`: `training.tau.normalize_head`, by the validation images.
    - `train.folds`: `training.folds.folds_of`, by the validation images.

    Args:
        config: The configuration.

    Returns:
        The configuration without 'auto' in `train.device`, `train.precision` and `train.compile`.

    Raises:
        UserError: `train.device` is 'cuda' and no GPU is visible.
    """
    device = config.train.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is 'cuda', but no CUDA device is visible; set it to 'cpu' or 'auto'")
    precision = config.train.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    return config.with_train(device=device, precision=precision, compile=config.train.compile is True)


def resolve_here(config: RunConfig) -> RunConfig:
    """As `resolve`, for a finished run: on a GPU where this machine has one, whatever device the run was trained on."""
    return resolve(config.with_train(device="auto"))


def has_bf16(device: str) -> bool:
    """Whether a device multiplies bf16 in hardware. A GPU without that emulates it, slower than float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bf16()


def describe(device: str) -> str:
    """The GPU's name, or the CPU's and how many threads torch uses of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The processor's name."""
    names = {line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.machine()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware (AVX512-BF16 or AMX); elsewhere bf16 is slower than float32."""
    flags = cpu_info()
    return "avx512_bf16" in flags or "amx_bf16" in flags


@contextlib.contextmanager
def enough_memory(task: str, remedy: str) -> Iterator[None]:
    """Run a task that may need more memory than the machine or the device has.

    Args:
        task: What is done, for the error.
        remedy: What the user can change.

    Raises:
        UserError: There is too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) and not out_of_memory(error.__cause__):
            raise
        raise UserError(f"out of memory in {task}; {remedy}") from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, and then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def one_thread_a_core() -> Iterator[ThreadPoolExecutor]:
    """Threads, one for each core, in which torch computes by itself.

    For work on many images that do not depend on each other. No core waits for another, as they do within one operation: where
    other processes have a part of the cores, that makes several threads slower than one.
    """
    with one_thread(), ThreadPoolExecutor(usable_cores(), initializer=lambda: torch.set_num_threads(1)) as pool:
        yield pool


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory, the machine's or the device's, did not suffice."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next allocation, where it can.

    A training step frees and allocates the same tensors again. Giving them back to the kernel in between costs the CPU some
    percent of its time in page faults.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# What PyTorch's CPU allocator, CUDA itself and its libraries say; the last two where several processes share a GPU.
_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
