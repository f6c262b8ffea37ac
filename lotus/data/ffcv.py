"""The only door to FFCV: its writer, and its loader with every known fault wrapped.

What FFCV 1.0.2 does, and what is done about it here:

* It compiles a pipeline for every loader, for seconds. Here its compiler is off; the pipeline's one hot function is
  compiled once a process, and kept on disk for the next.
* Its own augmentations cannot be seeded. Ours are a table, computed by :mod:`lotus.data.views`, that the decoder reads.
* It hands out views of a ring of buffers. Here the decoder fills new memory, which the receiver owns.
* An exception in its thread leaves the consumer waiting for ever, and a live thread at the interpreter's end aborts the
  process. Here the thread hands its exception over, and is joined when an epoch ends or is given up.
* It sets torch and numba to as many threads as a loader has, at import, for each loader and each epoch. Here what was
  set stays set, and decoding has threads of its own.
* It reads foreign memory for a row that is not there. Rows are checked where they come in (sample_plan.py, loader.py), and so
  is every pointer of the file (format.py).
"""

from __future__ import annotations

import ctypes
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Empty, Full, SimpleQueue
from typing import Any
from unittest import mock

import numba
import numba.typed
import numpy as np
import numpy.typing as npt
import torch

from lotus.data.base import BaseLoader, Raw
from lotus.data.format import FIELDS, JPEG, META, Beton, Stored, TooLarge, damaged
from lotus.data.kept import NOTHING, Kept
from lotus.data.paint import paint
from lotus.data.sample_plan import Rows, SamplePlan
from lotus.data.views import Look, Table


@contextmanager
def _as_it_was() -> Iterator[None]:
    """Torch's and numba's number of threads stay what they are, whatever FFCV sets; and it warns nobody."""
    before = torch.get_num_threads(), numba.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


# FFCV keeps two constants in a numba dictionary, and compiling that takes nine tenths of its import. A plain one serves.
with _as_it_was(), mock.patch.object(numba.typed, "Dict", dict):
    import ffcv
    import ffcv.libffcv
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.state import State
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.writer import DatasetWriter

PIECE = 1 << 16
"""Pixels that a thread is given at a time, at least: some tenths of a millisecond of work."""


class FfcvWriter:
    """FFCV's writer, driven from this process, one image after another.

    Its own loop starts worker processes and waits for ever when one of them dies, of a bad image or a full disk. Here
    its parts are called one by one, and what they raise is raised.
    """

    def __init__(self, file: Path, capacity: int, page: int) -> None:
        fields = dict(zip(FIELDS, (RGBImageField(), IntField(), IntField())))
        self.theirs = DatasetWriter(str(file), fields, page_size=page, num_workers=1)
        self.theirs.num_samples = capacity
        self.theirs.prepare()
        shared = self.theirs.metadata_sm
        self._meta: npt.NDArray[np.void] | None = np.frombuffer(shared.buf, self.theirs.metadata_type, capacity)
        self._pages = MemoryAllocator(str(file), self.theirs.data_region_start, page)
        self._pages.__enter__()
        self._page, self._count = page, 0

    @staticmethod
    def fits(images: int) -> bool:
        """Whether /dev/shm, where FFCV keeps the metadata while it writes, has room; else a write there is a crash."""
        try:
            return shutil.disk_usage("/dev/shm").free > 1.1 * images * META.itemsize + (1 << 20)
        except OSError:
            return False

    def add(self, picture: Stored, label: int) -> None:
        size = len(picture.data)
        if size > self._page:
            raise TooLarge(size)
        assert self._meta is not None
        self._pages.set_current_sample(self._count)
        pointer, room = self._pages.malloc(size)
        room[:] = np.frombuffer(picture.data, np.uint8)
        self._meta[self._count] = ((picture.mode, picture.width, picture.height, pointer), label, self._count)
        self._count += 1

    def finish(self) -> None:
        self._pages.flush_page()
        self._pages.fp.close()
        self.theirs.header["num_samples"] = self._count  # fewer than planned where damaged images were left out
        self.theirs.finalize(self._pages.allocations)
        self.abandon()

    def abandon(self) -> None:
        if self._meta is not None:
            self._meta = None  # FFCV's shared memory cannot be closed while an array looks at it
            self._pages.fp.close()
            self.theirs.metadata_sm.close()
            self.theirs.metadata_sm.unlink()


class FfcvLoader(BaseLoader):
    """FFCV in the order of the sample plan, with our decoder."""

    kind = "ffcv"

    def __init__(
        self, beton: Beton, plan: SamplePlan, look: Look, device: torch.device, workers: int, kept: Kept = NOTHING
    ) -> None:
        super().__init__(beton, plan, look, device, workers, kept)
        self._table = np.zeros((len(self.beton), 7), np.int32)  # one line an image; filled for the rows of an epoch
        self._order = _Order()
        self._decoder = _Decoder(self, self._table)
        compiled = Compiler.is_enabled
        with _as_it_was(), self._on_device(), mock.patch("ffcv.loader.loader.OSCacheManager", _Mapped):
            Compiler.set_enabled(False)
            try:
                self._ffcv = ffcv.Loader(
                    str(self.beton.file),
                    batch_size=self.plan.micro,
                    num_workers=1,
                    os_cache=True,
                    drop_last=False,
                    seed=0,
                    pipelines={
                        "image": [self._decoder],
                        "label": [_Column(self.beton.labels)],
                        "index": [_Column(self.beton.index)],
                    },
                )
            finally:
                Compiler.set_enabled(compiled)
        self._ffcv.traversal_order = self._order

    def _ahead(self, rows: Rows, table: Table, sizes: Sequence[int]) -> Generator[Raw, None, None]:
        self._table[rows] = table
        self._order.rows = rows
        with self._on_device():
            epoch = Epoch(self._ffcv, self._ffcv.next_traversal_order(), sizes)
        try:
            for images, labels, index in epoch:
                yield Raw(images, labels, index)
        finally:
            epoch.close()
            epoch.join()

    def close(self) -> None:
        super().close()
        self._decoder.close()

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """FFCV makes its streams on the current GPU, which must be ours and not the first one."""
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                yield
        else:
            yield


class _Mapped(OSCacheManager):
    """The file, mapped: all that the decoder needs of FFCV's memory.

    FFCV's own also builds dictionaries of every image, which takes seconds for a million; and compiling its reader of
    bytes marks numba's own type of byte arrays as read-only, for the whole process, after which numba no longer finds
    what it has compiled.
    """

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.ptrs = self.sizes = None
        self.context = OSCacheContext(self)

    def compile_reader(self) -> None:
        return None


class _Order(TraversalOrder):
    """The plan's order: what FFCV asks for at the beginning of an epoch."""

    def __init__(self) -> None:
        self.rows: Rows = np.zeros(0, np.int64)

    def sample_order(self, epoch: int) -> Rows:
        return self.rows


class Epoch(EpochIterator):
    """FFCV's thread of an epoch, which hands over its exceptions, ends when it is told to, and makes batches of any sizes."""

    _fault: BaseException | None = None

    def __init__(self, loader: ffcv.Loader, order: Rows, sizes: Sequence[int]) -> None:
        self._pieces = np.split(order, np.cumsum(sizes)[:-1])  # first, since the parent starts the thread
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            for number, rows in enumerate(self._pieces):
                if not self._hand_over(self.run_pipeline(number, rows, 0, None)):
                    return
        except BaseException as fault:  # whatever it is, the consumer must hear of it
            self._fault = fault
        self._hand_over(None)

    def _hand_over(self, result: Any) -> bool:
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(result, timeout=0.05)
                return True
            except Full:
                continue
        return False

    def __next__(self) -> Any:
        while True:
            alive = self.is_alive()  # asked before the queue: a thread may leave its last batch and end
            try:
                result = self.output_queue.get(timeout=0.5)
                break
            except Empty:
                if not alive:
                    raise RuntimeError("FFCV's thread has ended without a word") from self._fault
        if result is not None:
            return result
        if self._fault is not None:
            raise self._fault
        raise StopIteration


class _Column(IntDecoder):
    """A field of whole numbers for the rows of a batch."""

    def __init__(self, values: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self._values = values

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        return replace(previous_state, shape=(1,), dtype=self.dtype), None

    def generate_code(self) -> Callable[..., torch.Tensor]:
        return lambda rows, memory, metadata, storage: torch.from_numpy(self._values[rows])


class _Decoder(SimpleRGBImageDecoder):
    """Decode, cut, resize, shift, mirror and normalize, as the table says; see :mod:`lotus.data.views`."""

    def __init__(self, loader: BaseLoader, table: Table) -> None:
        super().__init__()
        beton = loader.beton
        packed = beton.modes == JPEG
        # Room for the largest JPEG of the file; raw images are read where they lie.
        self._room = int((3 * beton.heights * beton.widths)[packed].max(initial=1))
        self._file, self._size, self._workers = beton.file, loader.look.size, loader.workers
        self._blank, self._hold = loader.blank, beton.hold
        self._kept = tuple(loader.kept)  # numba knows a plain tuple as another type than a named one
        self._columns = (beton.modes, beton.heights, beton.widths, beton.pointers, beton.sizes, table)
        self._colors = np.ascontiguousarray(loader.levels), loader.fill
        look = loader.look
        how = ("", "bilinear", "bicubic").index(look.filter), float(look.crop), look.crop_mode == "squash"
        self._calls = *(ctypes.cast(call, ctypes.c_void_p).value for call in (_LIBRARY.imdecode, _LIBRARY.resize)), *how
        self._desks: SimpleQueue[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = SimpleQueue()
        for _ in range(self._workers):
            self._desks.put((np.empty(self._room, np.uint8), np.empty(3 * self._size**2, np.uint8)))
        self._least = max(1, PIECE // max(self._size**2, int(np.mean(beton.heights * beton.widths))))
        # For one worker too: libjpeg's state is kept by thread and never freed, and FFCV starts a thread every epoch.
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="lotus-loader")

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        shape = (3, self._size, self._size)
        return replace(previous_state, shape=shape, dtype=np.dtype("<f4")), None

    def generate_code(self) -> Callable[..., torch.Tensor]:
        def decode(rows: Rows, memory: None, metadata: object, storage: tuple[Any, ...]) -> torch.Tensor:
            images = self._blank(len(rows))
            planes, data = images.numpy(), np.asarray(storage[0])
            step = max(self._least, -(-len(rows) // (4 * self._workers)))
            starts = range(0, len(rows), step)

            def piece(start: int) -> int:
                desk = self._desks.get()
                if len(desk[1]) < 3 * planes.shape[-1] ** 2:  # a larger side than in the epochs before
                    desk = desk[0], np.empty(3 * planes.shape[-1] ** 2, np.uint8)
                try:
                    part = slice(start, start + step)
                    self._hold(rows[part])
                    return paint(
                        planes[part], rows[part], data, self._columns, self._kept, self._colors, desk, self._calls
                    )
                finally:
                    self._desks.put(desk)

            failed = [row for row in self._pool.map(piece, starts) if row >= 0]
            if failed:
                raise damaged(self._file, failed[0], "its JPEG cannot be decoded")
            return images

        return decode


_LIBRARY = ffcv.libffcv.lib
