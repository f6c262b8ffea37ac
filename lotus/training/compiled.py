"""The blocks of a model, compiled by torch: each by itself, which is quick since they are alike, and leaves names and hooks alone.

What differs in shape is compiled apart: blocks after a cut, pictures of another side (of the second one on torch makes a graph for any).
Beyond a bound torch would say nothing and compute the rest as before, so the bound follows from the model, and what came of it is told.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from typing import Any

import torch
from torch import Tensor, nn

from selection.errors import Refused

BACKEND = "inductor"
_A_BLOCK = 4
"""Graphs that a block may have of its own: for its first pictures, for any others, and both in evaluation."""
_FEWEST = 8  # torch's own bound
_TIMED = 3  # passes that are timed, after one that is not


class Compiled:
    """Blocks of ``model``, or all of it where it has none, until :meth:`release`.

    Raises:
        Refused: torch has nothing to compile with on this machine.
    """

    def __init__(self, model: nn.Module, *, place: str = "train") -> None:
        import torch._dynamo  # seconds, for those alone who ask for it

        _check(next(model.parameters()).device, place)
        blocks = getattr(model, "blocks", None)
        whole = not isinstance(blocks, nn.Sequential | nn.ModuleList)
        self._parts: list[nn.Module] = [model] if whole else list(blocks)  # type: ignore[arg-type]
        self._seen: Tensor | None = None
        self._hook = None if whole else blocks.register_forward_pre_hook(self._look)  # type: ignore[union-attr]
        self._before = torch._dynamo.config.recompile_limit, dict(_counted())
        most = _A_BLOCK * len(self._parts) + 1  # and one in which a block is timed
        torch._dynamo.config.recompile_limit = max(_FEWEST, most)  # timm makes it a million
        self._known: tuple[int, ...] | None = None  # what of it was told
        self._warned = 0
        for part in self._parts:
            part.compile(backend=BACKEND)

    def release(self) -> None:
        """As before."""
        torch._dynamo.config.recompile_limit = self._before[0]
        if self._hook is not None:
            self._hook.remove()
        for part in self._parts:
            part._compiled_call_impl = None

    def news(self) -> str:
        """What there is to tell, after an epoch: first what it brought, then what more was compiled; empty: nothing."""
        if self._known is None:
            text = self.sentence()
            self._known = self._since()  # what is timed may be compiled for that
            return text
        (graphs, broken, _), before = self._since(), self._known
        if (graphs, broken) == before[:2]:
            return ""
        self._known = self._since()
        more = f", in all broken in {broken} places" if broken > before[1] else ""
        return f"compiled: {graphs - before[0]} more, {graphs} graphs in all{more}"

    def warning(self) -> str:
        """That something is not compiled, as soon as it is so; empty: nothing more."""
        over = self._since()[2]
        if over == self._warned:
            return ""
        self._warned = over
        return (
            f"compiling ends for {over} function{'s' * (over != 1)}, beyond torch's bound of "
            f"{torch._dynamo.config.recompile_limit} graphs: what is new to them is computed as without it"
        )

    def _since(self) -> tuple[int, ...]:
        """Graphs, breaks in them and frames beyond the bound, since this was made."""
        now = _counted()
        return tuple(now[name] - self._before[1][name] for name in now)

    def sentence(self) -> str:
        """What it brought so far: the time of a block's forward and backward pass beside that of the same block as it was."""
        graphs, broken, over = self._since()
        told = f"compiled: {graphs} graph{'s' * (graphs != 1)} for {len(self._parts)} blocks"
        if self._seen is not None and not any("forward" in vars(part) for part in self._parts[0].modules()):
            # one that goes another way, e.g. on fewer tokens, has no time without the blocks around it
            plain, compiled = self._timed()
            told += f", a block takes {compiled / plain:.2f} x the time ({1e3 * plain:.1f} ms, {1e3 * compiled:.1f} ms compiled)"
        if broken:
            told += f", broken in {broken} places"
        if over:
            told += f"; {over} more were not compiled, beyond torch's bound of {torch._dynamo.config.recompile_limit}"
        return told

    def _look(self, blocks: nn.Module, given: tuple[Any, ...]) -> None:
        if blocks.training and isinstance(given[0], Tensor):
            self._seen = torch.empty_like(given[0], device="meta")

    def _timed(self) -> tuple[float, float]:
        """Seconds of the first block, as it was and compiled, on what it last saw of a training; nothing of it stays."""
        assert self._seen is not None
        block, device = self._parts[0], next(self._parts[0].parameters()).device
        with torch.random.fork_rng():
            tokens = torch.randn(self._seen.shape, device=device, dtype=self._seen.dtype, requires_grad=True)
            return _seconds(block._call_impl, block, tokens), _seconds(block, block, tokens)


def _seconds(call: Any, block: nn.Module, tokens: Tensor) -> float:
    wanted = [tokens, *(p for p in block.parameters() if p.requires_grad)]
    best = float("inf")
    for number in range(_TIMED + 1):
        _wait(tokens.device)
        began = time.perf_counter()
        torch.autograd.grad(
            call(tokens).float().sum(), wanted, allow_unused=True
        )  # gates, and what is summed up, stay as they are
        _wait(tokens.device)
        if number:
            best = min(best, time.perf_counter() - began)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _counted() -> dict[str, int]:
    """Graphs, breaks in them, and frames beyond the bound, in this process so far."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "beyond": beyond(),
    }


def beyond() -> int:
    """Frames that torch went on without compiling, beyond its bound, in this process so far: some versions count them by themselves,
    others among all that cannot be compiled."""
    counters = torch._dynamo.utils.counters
    named = sum(count for text, count in counters["unimplemented"].items() if "recompile limit" in text.lower())
    return named + sum(counters["recompile_limit"].values())


def _check(device: torch.device, place: str) -> None:
    if BACKEND != "inductor":
        return
    if device.type == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise Refused(
            f"{place}.compile: on a CPU torch compiles with a C++ compiler, and there is none on the PATH. Install g++, or set "
            f"{place}.compile=false."
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise Refused(
            f"{place}.compile: on a GPU torch compiles with triton, which is not installed. Run: pip install triton, or set "
            f"{place}.compile=false."
        )
