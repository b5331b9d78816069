"""What a run on a cluster asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cibl_ray.cluster.storage import join
from cibl_ray.run.folder import resume_command
from pipelines.common.errors import UserError

FAILURES = 3  # lost workers replaced, by default


@dataclass(frozen=True)
class Options:
    """The command line's options.

    Attributes:
        workers: At least and at most how many.
        address: Of a cluster to join; None starts one on this machine.
        cpus: Of each worker; None: what fits.
        failures: Lost workers to replace before the run gives up.
        storage: URI under which copies of run folders are kept; None: no copy.
    """

    workers: tuple[int, int]
    address: str | None
    cpus: int | None
    failures: int
    storage: str | None = None

    def place(self, folder: Path) -> str | None:
        """The URI of a run's copy, or None."""
        return join(self.storage, folder.name) if self.storage is not None else None

    def resume_command(self, folder: Path) -> str:
        """The command that resumes a run."""
        least, most = self.workers
        workers = f"{least}-{most}" if most > least else least
        more = f" --address {self.address}" if self.address else ""
        more += f" --cpus-per-worker {self.cpus}" if self.cpus else ""
        more += f" --max-failures {self.failures}" if self.failures != FAILURES else ""
        return f"{resume_command(self.place(folder) or folder)} --cluster --workers {workers}{more}"


@dataclass(frozen=True)
class Shape:
    """The workers of a run.

    Attributes:
        workers: At least and at most how many.
        cpus: Of each.
        gpus: Whether each has a GPU.
        failures: Lost workers to replace before the run gives up.
    """

    workers: tuple[int, int]
    cpus: int
    gpus: bool
    failures: int


def parse_workers(text: str) -> tuple[int, int]:
    """Read '4' or '2-8'.

    Raises:
        UserError: It is neither.
    """
    low, _, high = text.partition("-")
    try:
        workers = int(low), int(high or low)
    except ValueError:
        workers = 0, 0
    if not 1 <= workers[0] <= workers[1]:
        raise UserError(f"--workers {text}: give a number of workers, or the least and the most, as in 2-8")
    return workers


def fitting_cpus(nodes: list[dict[str, float]], workers: tuple[int, int], gpus: bool) -> int:
    """The most CPUs that each worker can have, at least 1.

    As many workers as wanted, or as there is room for, must fit on the nodes.

    Args:
        nodes: The resources of each node, as Ray counts them.
        workers: At least and at most how many.
        gpus: Whether each needs a GPU.
    """
    wanted = max(workers[0], min(workers[1], places(nodes, 1, gpus)))
    most = int(max((node.get("CPU", 0) for node in nodes), default=1))
    return next((cpus for cpus in range(most, 1, -1) if places(nodes, cpus, gpus) >= wanted), 1)


def places(nodes: list[dict[str, float]], cpus: int, gpus: bool) -> int:
    """Count the workers that fit on the nodes.

    Args:
        nodes: Each node's resources by name, as Ray has them.
        cpus: CPUs of a worker.
        gpus: Whether a worker needs a GPU.

    Returns:
        How many fit.
    """
    return int(sum(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // 1 if gpus else float("inf")) for node in nodes))
