"""A model as ONNX: written, held to the model by its numbers, told what it wants of its images, and in 8 bits.

B images of a batch, S side of the model's input, C classes.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lotus import files
from lotus.vit.preprocessing import Preprocessing

Input = Literal["float32", "uint8"]
TOLERANCE = 1e-4
"""Largest difference of a logit between torch and onnxruntime, absolute below 1 and relative above."""
BATCHES = (1, 2, 7)
"""On which both sides must agree; one of them was traced."""
OPSET = 18
_IN_8_BITS = ["MatMul", "Gemm", "Conv"]
_LARGEST = 2_000_000_000
"""Bytes of weights that protobuf holds in one file."""


class Mismatch(RuntimeError):
    """The exported file computes something else than the model: a fault of ours or of the exporter."""


class _FromPixels(nn.Module):
    """A model with its preprocessing: pixels (B, 3, S, S) uint8."""

    def __init__(self, model: nn.Module, wanted: Preprocessing) -> None:
        super().__init__()
        self.model = model
        for name, three in (("mean", wanted.mean), ("std", wanted.std)):
            self.register_buffer(name, torch.tensor(three, dtype=torch.float32).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        mean: Any = self.mean
        std: Any = self.std
        return self.model((images.float() / 255 - mean) / std)


def write(
    model: nn.Module, file: Path, wanted: Preprocessing, *, example: Tensor, takes: Input = "float32",
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trace ``model``, write, run both, compare; only then does the file get its name.

    Args:
        example: (B, 3, S, S) normalized images; as many as are asked for are made of them
        takes: what its input is: normalized images, or pixels of 0 to 255
        about: ``classes``, ``license`` and ``resize``, which go into the file with ``wanted``

    Returns:
        ``{"file", "opset", "input", "max_abs_diff"}``

    Raises:
        Mismatch: ONNX and torch disagree; the file is not kept.
    """
    classes: Any = getattr(model, "num_classes", None)
    if takes == "uint8":
        model = _FromPixels(model, wanted).to(example.device).eval()
        draw = torch.Generator().manual_seed(0)
        example = torch.randint(0, 256, example.shape, dtype=torch.uint8, generator=draw).to(example.device)
    whole = example.repeat(-(-max(BATCHES) // len(example)), 1, 1, 1)
    # External data lie beside the file by its name: only a model beyond protobuf's 2 GB needs them.
    if sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) > _LARGEST:
        raise Mismatch(f"{file.name}: weights of more than 2 GB do not fit into one ONNX file.")
    with files.beside(file) as beside:
        trace(model, whole[:2], beside)
        worst = max(_difference(model, beside, whole[:size]) for size in BATCHES)
        if not worst <= TOLERANCE:
            raise Mismatch(
                f"{file.name}: differs from the model by {worst:.2g}, more than {TOLERANCE:g}; it was not kept."
            )
        _tell(beside, wanted, takes, {"num_classes": classes, **(about or {})})
    return {"file": file.name, "opset": OPSET, "input": takes, "max_abs_diff": worst}


def metadata_of(session: Any) -> dict[str, Any]:
    """What :func:`write` told of its images: ``mean``, ``std``, ``crop``, ``interpolation``, ``side``, ``input``, ``classes``,
    ``num_classes``, ``resize``; what is no JSON stays text."""
    values: dict[str, Any] = {}
    for name, text in session.get_modelmeta().custom_metadata_map.items():
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _tell(file: Path, wanted: Preprocessing, takes: Input, about: Mapping[str, Any]) -> None:
    import onnx

    stored = onnx.load(str(file))
    known = {**wanted.about(), "side": wanted.side, "input": takes}
    known |= {name: about[name] for name in ("classes", "license", "resize") if about.get(name)}
    known |= {"num_classes": about["num_classes"]} if about["num_classes"] is not None else {}
    onnx.helper.set_model_props(stored, {name: json.dumps(value) for name, value in known.items()})
    onnx.save(stored, str(file))


def trace(model: nn.Module, images: Tensor, file: Path) -> None:
    """Write ONNX with an open batch size.

    torch's tracing exporter takes a tenth of the time of the one on torch.export and has fewer parts that can fail; a plain
    ViT has no control flow that it could miss. It is on its way out of torch, so the other one follows where it is gone.
    """
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"], "opset_version": OPSET}
    with _hush(), torch.no_grad():
        try:
            torch.onnx.export(
                model, (images,), str(file), dynamo=False, dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}}, **names
            )  # fmt: skip
        except (TypeError, AttributeError, ImportError, NotImplementedError, torch.onnx.errors.OnnxExporterError):
            batch = torch.export.Dim("batch")
            torch.onnx.export(
                model, (images,), str(file), dynamo=True, dynamic_shapes=({0: batch},), external_data=False, **names
            )  # fmt: skip


def _difference(model: nn.Module, file: Path, images: Tensor) -> float:
    """Largest difference of the logits, absolute below 1 and relative above; infinite where one is not a number."""
    session = opened(file)
    given = images if images.dtype == torch.uint8 else images.float()
    (logits,) = session.run(None, {"images": given.cpu().numpy()})
    with torch.no_grad():
        expected = model(images).float().cpu()
    gap = ((torch.from_numpy(logits) - expected).abs() / expected.abs().clamp(min=1)).max()
    return float(gap) if torch.isfinite(gap) else math.inf


def opened(file: Path) -> Any:
    """A session of onnxruntime on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _hush() -> Iterator[None]:
    """The exporters' chatter says nothing to our users: parity is checked."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root", "")]
    levels = [one.level for one in noisy]
    for one in noisy:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(noisy, levels, strict=True):
            one.setLevel(level)


# --------------------------------------------------------------------------------------------------------------- 8 bits


def quantize(source: Path, file: Path, images: Iterable[Tensor]) -> None:
    """Write ``source`` with weights (per output channel) and activations of 8 bits, ranges from ``images``.

    Static post-training quantization by onnxruntime (QDQ form): weights of products and convolutions alone, and what is
    multiplied by them. Their results, biases, softmax, GELU, norms and the residual stream stay numbers of 32 bits, by which
    it is faster and nearer. What was tried: docs/log.md.

    Args:
        file: the .onnx to write
        images: batches as ``source`` takes them

    Raises:
        OSError: it cannot be written.
    """
    from onnxruntime import quantization

    batches = iter(images)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {"images": batch.cpu().numpy()}

    with _hush(), files.beside(file) as beside:
        prepared = beside.with_name("prepared.onnx")
        quantization.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared), str(beside), Reader(), per_channel=True, op_types_to_quantize=_IN_8_BITS,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": False, "WeightSymmetric": True, "MatMulConstBOnly": True, "QuantizeBias": False,
                "OpTypesToExcludeOutputQuantization": _IN_8_BITS,
            },
        )  # fmt: skip
        _shorten(beside)


def _shorten(file: Path) -> None:
    """Give what is inside a file short names: in 8 bits those of a small model would take a quarter of the bytes."""
    import onnx

    stored = onnx.load(str(file))
    graph = stored.graph
    names = {"": "", **{one.name: one.name for one in (*graph.input, *graph.output)}}

    def short(name: str) -> str:
        return names.setdefault(name, f"{len(names):x}")

    del graph.value_info[:]
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    for node in graph.node:
        node.name = node.doc_string = ""
        node.input[:], node.output[:] = map(short, node.input), map(short, node.output)
    onnx.save(stored, str(file))


def top1(file: Path, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Per cent of the images that a file gets right; ``batches`` of images as it takes them and labels."""
    session, right, seen = opened(file), 0, 0
    for images, labels in batches:
        (logits,) = session.run(None, {"images": images.cpu().numpy()})
        right += int((torch.from_numpy(logits).argmax(dim=1) == labels.cpu()).sum())
        seen += len(labels)
    return 100 * right / max(1, seen)


def latencies(files: Sequence[Path], images: Tensor, *, runs: int = 10) -> list[float]:
    """Milliseconds of onnxruntime for a batch, of each file, the median of ``runs``; they are run in turn, so that whatever else
    the machine does slows all of them."""
    sessions, given = [opened(file) for file in files], {"images": images.cpu().numpy()}
    times: list[list[float]] = [[] for _ in sessions]
    for number in range(runs + 1):
        for session, mine in zip(sessions, times, strict=True):
            began = time.perf_counter()
            session.run(None, given)
            if number:  # the first one makes room
                mine.append(1000 * (time.perf_counter() - began))
    return [median(mine) for mine in times]
