"""8 bits: how much smaller, how near, and what is left in 32."""

from __future__ import annotations

import collections
from pathlib import Path

import numpy as np
import pytest
import torch

from lotus import onnx_file
from lotus.vit import model as door
from lotus.vit.preprocessing import preprocessing

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
IMAGES = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 0.6 M parameters in both forms."""
    torch.manual_seed(0)
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 3, "num_heads": 4, "num_classes": 10}
    model = door.build("vit_tiny_patch16_224", args).eval()
    whole, small = (tmp_path_factory.mktemp("onnx") / name for name in ("model.onnx", "model.int8.onnx"))
    about = {"classes": [f"class {number}" for number in range(10)]}
    onnx_file.write(model, whole, preprocessing(model)._replace(side=32), example=IMAGES, about=about)
    onnx_file.quantize(whole, small, IMAGES.split(8))
    return whole, small


def weights(file: Path) -> dict[int, int]:
    """Numbers of each type."""
    found: collections.Counter[int] = collections.Counter()
    for tensor in onnx.load(str(file)).graph.initializer:
        found[tensor.data_type] += int(np.prod(tensor.dims))
    return found


def test_it_is_about_a_quarter_and_every_matrix_is_in_8_bits(files: tuple[Path, Path]) -> None:
    whole, small = files
    assert small.stat().st_size < 0.29 * whole.stat().st_size
    before, after = weights(whole), weights(small)
    matrices = sum(
        int(np.prod(tensor.dims))
        for tensor in onnx.load(str(whole)).graph.initializer
        if len(tensor.dims) in (2, 4) and tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert after[onnx.TensorProto.INT8] >= matrices > 0.95 * before[onnx.TensorProto.FLOAT]


def test_it_says_the_same_of_nearly_all_images(files: tuple[Path, Path]) -> None:
    both = []
    for file in files:
        (logits,) = onnx_file.opened(file).run(None, {"images": IMAGES.numpy()})
        both.append(logits)
    assert np.abs(both[0] - both[1]).max() < 0.1 * np.abs(both[0]).max()
    assert (both[0].argmax(1) == both[1].argmax(1)).mean() >= 0.9


def test_it_knows_its_images_and_takes_any_batch(files: tuple[Path, Path]) -> None:
    whole, small = files
    known, of_whole = (onnx_file.metadata_of(onnx_file.opened(file)) for file in (small, whole))
    assert {**known, **of_whole} == known
    for size in (1, 7):
        (logits,) = onnx_file.opened(small).run(None, {"images": IMAGES[:size].numpy()})
        assert logits.shape == (size, 10)


def test_both_are_timed(files: tuple[Path, Path]) -> None:
    times = onnx_file.latencies(files, IMAGES[:1], runs=2)
    assert len(times) == 2
    assert min(times) > 0
