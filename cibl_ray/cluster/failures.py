"""Which failures end a run on a cluster, and which do not."""

from __future__ import annotations

import re
from typing import Any

import ray.train
from ray.exceptions import RayActorError, RuntimeEnvSetupError
from ray.train import UserCallback

from cibl_ray.cluster.progress import RelayedProgress
from cibl_ray.world import PeerLostError
from pipelines.common.errors import UserError


class LostError(RuntimeError):
    """Workers were lost more often than they are replaced."""


class StopOnError(UserCallback):
    """Runs in Ray Train's controller. An error of the training itself ends the run; a lost worker is reported and replaced.

    Args:
        relay: Where to report.
    """

    def __init__(self, relay: Any) -> None:
        self._relay, self._told = relay, ""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray Train.

        Raises:
            UserError: The training itself failed. It names the rank and the cause.
        """
        lost = []
        for rank, error in sorted(worker_exceptions.items()):
            of_ray = type(error).__module__.partition(".")[0] == "ray"  # a dead process, a lost node, no answer
            if of_ray:
                lost.append(f"rank {rank}: {first_line(error)}")
            elif not isinstance(error, PeerLostError):
                name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                raise UserError(f"rank {rank}: {name}{error}")
        text = "a worker was lost" + (f" ({'; '.join(lost)})" if lost else "")
        if worker_exceptions and text != self._told:  # Ray may call again while the others end
            self._told = text
            progress = RelayedProgress(self._relay)
            progress.line(text)
            progress.finish()


def explain(error: Exception, failures: int) -> Exception:
    """The error to raise for one of Ray Train's.

    Args:
        error: What the trainer raised.
        failures: How many lost workers it was to replace.

    Returns:
        A UserError where the training itself or its start failed, a LostError where workers were lost, else `error`.
    """
    if isinstance(error, ray.train.ControllerError):
        failure = error.controller_failure
        if isinstance(failure, UserError):
            return failure
        if isinstance(failure, RuntimeEnvSetupError):
            return no_code(failure)
        return UserError(f"Ray Train could not run the workers: {type(failure).__name__}: {first_line(failure)}")
    if isinstance(error, ray.train.WorkerGroupError):
        lost = ", ".join(f"rank {rank} ({first_line(cause)})" for rank, cause in sorted(error.worker_failures.items()))
        return LostError(f"workers were lost {failures + 1} times, at last {lost}")
    if isinstance(error, RayActorError):
        return LostError(f"the process that controls the workers was lost: {first_line(error)}")
    return error


def no_code(error: RuntimeEnvSetupError) -> UserError:
    """The error for a node that cannot take in this installation's code.

    Args:
        error: Ray's, whose text is a traceback. Its last line has the cause.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    node = re.search(r"\[Node (\S+)\]", str(error))
    return UserError(
        f"{f'node {node[1]}' if node else 'a node'} could not unpack this installation's code: {lines[-1][:300]}; it needs "
        "some room in Ray's temporary folder (/tmp/ray by default)"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error of Ray's, at most 300 characters; the rest are details of the actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
