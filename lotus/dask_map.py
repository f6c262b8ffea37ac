"""Dask as what maps functions over shards: the one place that knows it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from selection.errors import Refused

LOCAL = "local"
"""In place of an address: workers of this machine, one a core, for as long as it takes."""


@contextmanager
def mapping(address: str) -> Iterator[Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]]:
    """A ``map`` by the workers of a scheduler (``tcp://HOST:8786``), or of this machine.

    Workers read the files by the names that they are given, so all must see them. What a scheduler and its workers send each
    other is trusted: whoever can reach them can run code there.

    Raises:
        Refused: Dask is not installed, or nobody answers at the address.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise Refused(f"--dask {address}: needs Dask: pip install 'lotus-vit[scale]'.") from None
    workers: dict[str, Any] = {"n_workers": os.cpu_count(), "threads_per_worker": 1, "dashboard_address": None}
    try:
        client = Client(LocalCluster(**workers) if address == LOCAL else address, timeout=10)
    except (OSError, ValueError, TimeoutError) as error:
        raise Refused(f"--dask {address}: no scheduler answers there ({error}). Start one: dask scheduler.") from None
    try:
        yield lambda function, items: client.gather(client.map(function, list(items), pure=False))
    finally:
        cluster = client.cluster
        client.close()
        if cluster is not None:
            cluster.close()
