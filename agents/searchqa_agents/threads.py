"""How many threads numpy and torch use, in this process and in those it starts."""

from __future__ import annotations

import logging
import os
import sys

from searchqa_envs.errors import ConfigurationError

logger = logging.getLogger(__name__)

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What libraries read when they are loaded."""


def set_threads(threads: int | None) -> None:
    """Limit the threads of numpy's and torch's libraries, whether or not they are loaded yet, also for processes that this one starts; None for no limit.

    Raises
    ------
    ConfigurationError
        If ``threads`` is less than 1.
    """
    if threads is None:
        return
    if threads < 1:
        raise ConfigurationError(f"threads must be at least 1; got {threads}. threads=null sets no limit.")
    from threadpoolctl import threadpool_limits

    for name in VARIABLES:
        os.environ[name] = str(threads)
    threadpool_limits(limits=threads)  # of those that are loaded
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.set_num_threads(threads)
        if torch.get_num_interop_threads() != threads:
            try:
                torch.set_num_interop_threads(threads)
            except RuntimeError as error:  # can be set only once, and not while they are at work
                logger.debug("The threads between operations stay as they are: %s", error)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def too_many_threads(jobs: int, threads: int | None, own_cores: int) -> str | None:
    """What to say where ``jobs`` side by side with ``threads`` each want more cores than there are; None where they do not."""
    each = own_cores if threads is None else threads
    if jobs <= 1 or jobs * each <= own_cores:
        return None
    fitting = max(1, own_cores // jobs)
    way = (
        f"threads={fitting} gives each its share"
        if fitting < each
        else "begin fewer at a time (hydra.launcher.n_jobs; with submitit_local hydra.sweeper.max_batch_size)"
    )
    return f"{jobs} jobs side by side, each with {each} thread{'s' if each > 1 else ''}, want {jobs * each} cores, and this machine has {own_cores}: {way}."
