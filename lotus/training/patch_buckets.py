"""A joint budget of images and patches (selection/joint_budget.py) in training: which images go together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lotus.config import Patches
from selection.joint_budget import Allotment, allot

Rows = npt.NDArray[np.int64]


class Joint:
    """Shares the patches out among the rows of an epoch."""

    def __init__(
        self,
        scores: npt.NDArray[np.float64],
        settings: Patches,
        *,
        patches: int,
        seed: int,
        place: str = "train.patches.joint",
    ) -> None:
        """
        Args:
            scores: (N,) of all images of the data set, higher = more patches
            patches: n, of the model that is trained
            seed: of the order of ties
            place: where the settings stand
        """
        self._scores, self._settings, self._patches = scores, settings, patches
        self._seed, self._place = seed, place

    def groups(self, rows: Rows) -> Rows:
        """The bucket of each of ``rows``. Their mean share is ``keep``, also where a lottery draws other rows each epoch.

        Raises:
            Refused: see :func:`selection.joint_budget.allot`.
        """
        return self.allot(rows).level

    def allot(self, rows: Rows) -> Allotment:
        """How many patches each of ``rows`` keeps."""
        joint = self._settings.joint
        assert joint is not None
        return allot(
            self._scores[rows],
            patches=self._patches,
            keep=self._settings.keep,
            buckets=joint.buckets,
            least=joint.least,
            seed=self._seed,
            place=self._place,
        )
