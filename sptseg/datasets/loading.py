"""Data sets read ahead by processes of their own: whatever room there is, and no fault of theirs goes unseen."""

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset, get_worker_info

from sptseg.system import cores

SHARED_MEMORY = "/dev/shm"  # where Linux has it; plain containers give it 64 MB, less than one batch


class Batches(Dataset[Any]):
    """`collate` of a data set's items at some positions; in its place what was raised, as from a process an error comes
    with its traceback as text."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, positions: Sequence[int]) -> Any:
        try:
            return self.collate([self.dataset[position] for position in positions])
        except (ValueError, OSError, MemoryError) as error:
            return error


def handed_over(batch: Any) -> Any:
    """Tensors go from process to process in shared memory; as arrays, through a pipe, where that lacks room: PyTorch
    loses a batch that does not fit, and waits for it for ever."""
    worker = get_worker_info()
    if worker is None:
        return batch
    size = sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    return batch if size < room() / (4 * worker.num_workers) else tree_map_only(Tensor, Tensor.numpy, batch)


def room() -> int:
    """Bytes free in shared memory."""
    if sys.platform != "linux":
        return sys.maxsize  # others set no such limit
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0


def own_process_group(_worker: int) -> None:
    """A loading process leaves the group that launcher and terminal send signals to; it still ends with its parent."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def read_batches(
    dataset: Dataset[Any],
    positions: Iterable[Sequence[int]],
    collate: Callable[[list[Any]], Any],
    workers: int,
    pin_memory: bool,
    ahead: int = 0,
) -> Iterator[Any]:
    """`collate` of the items at each entry of `positions`, in order, read ahead by `workers` processes.

    Of processes there are no more than cores. Each reads two entries ahead, or more, if all together are to read
    `ahead`. Raises what reading raised. Run it within `system.ended_helpers`."""
    if not 0 <= workers <= 1024:
        raise ValueError(f"workers is {workers}; wanted 0 to 1024")
    if workers and room() < 2**20:  # not enough for the processes' locks
        warnings.warn(f"{SHARED_MEMORY} has no room for {workers} workers; reading in this process", stacklevel=2)
        workers = 0
    workers = min(workers, cores())
    options = {"num_workers": workers, "worker_init_fn": own_process_group, "pin_memory": pin_memory}
    options["prefetch_factor"] = max(2, ahead // workers) if workers else None
    try:
        loader = iter(DataLoader(Batches(dataset, collate), None, sampler=positions, collate_fn=handed_over, **options))
    except OSError as error:
        raise OSError(f"no process that reads pictures can be started ({error}); read with 0 workers") from error
    return received(loader)


def received(loader: Iterator[Any]) -> Iterator[Any]:
    """What loading processes handed over; raises what they raised."""
    try:
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield tree_map_only(np.ndarray, torch.from_numpy, batch)
    except (ConnectionError, EOFError) as error:  # the system ended it between a batch and its tensors
        raise RuntimeError(f"DataLoader worker ended while it handed over a batch: {error!r}") from error
    finally:
        del loader  # the error's traceback would keep the processes
