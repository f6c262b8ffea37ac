"""Random parts of the images for several runs, which :func:`selection.scores.memorization` compares."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from selection.errors import Refused


def random_parts(images: int, runs: int, part: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which images each of ``runs`` trains on: equally many each, any such set as likely as any other.

    Feldman and Zhang 2020 (arXiv 2008.03703) draw each part by itself, uniformly over all images and not
    class by class, and have thousands. Of ten such parts of 70 %, three images in a hundred are in all, and nothing can be said
    of them. Here each part alone is drawn as theirs, so that what is expected is the same; but the images that are left out
    (or, below a half, taken) are dealt from one shuffled pack after another, so that each is left out in as many runs as any
    other, within one.

    Args:
        images: N.
        part: of the images, in (0, 1); the smaller side is rounded up to whole images.
        rng: shuffles the packs.

    Returns:
        (runs, images)

    Raises:
        Refused: so few runs that some image would be in all of them, or in none.
    """
    least = math.ceil(1 / min(part, 1 - part) - 1e-6) if 0 < part < 1 else 0
    if not least or runs < least:
        cure = f"Take at least {least} runs." if least else "Say 0.7, for example."
        raise Refused(f"subsets: {runs} runs on {part:g} of the images leave images that are in all or in none. {cure}")
    dealt = math.ceil(min(part, 1 - part) * images - 1e-6)
    if not images <= runs * dealt <= (runs - 1) * images:
        raise Refused(
            f"subsets: {images} images cannot be dealt to {runs} runs on {part:g} of them so that each is in some and out of "
            "others. Take a run more."
        )
    chosen = np.zeros((runs, images), bool)
    pack = rng.permutation(images)
    for own in chosen:
        hand, pack = pack[:dealt], pack[dealt:]
        if len(hand) < dealt:  # a new pack; none twice in a hand
            others = rng.permutation(np.setdiff1d(np.arange(images), hand))
            more = others[: dealt - len(hand)]
            pack = rng.permutation(np.concatenate([hand, others[len(more) :]]))
            hand = np.concatenate([hand, more])
        own[hand] = True
    return chosen if part < 0.5 else ~chosen
