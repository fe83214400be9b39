"""HopSkipJump (Chen, Jordan and Wainwright 2020, arXiv 1904.02144) for l_inf, as ART has it.

The Adversarial Robustness Toolbox, an optional package, asks the model by itself, one image after
another and from Python. So this is no `Method` whose questions are answered side by side, and is
slow; what it asks is counted all the same, and the first misread point of the ball ends it.

A search walks along the boundary of what is misread: it estimates the boundary's normal from the
labels of 100 and more points around, steps, and returns to the boundary by halving. ART begins at
uniform noise. Noise of single pixels may all be read as the image's own class; then the next one
is of squares twice as large.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

__all__ = ["Asked", "Over", "search"]

_ENDLESS = 1_000_000  # iterations: the budget ends a search


class Over(Exception):
    """Raised by what answers, through the library, when nothing more is to be asked."""


class Asked:
    """Answers a search about one image, counts, and ends it.

    Attributes:
      queries: answers given.
      hit: the misread point of the ball that ended the search, as it was shown, or None.
      first: the first point of the ball that was asked about, or None.
    """

    def __init__(
        self,
        misread: Callable[[np.ndarray], np.ndarray],
        image: np.ndarray,
        epsilon: float,
        budget: int,
    ) -> None:
        """Args: which of some images are misread, bool (n,); the image; its ball; its budget."""
        self._misread, self._image = misread, image
        self._epsilon, self._budget = np.float32(epsilon), budget
        self.queries = 0
        self.hit: np.ndarray | None = None
        self.first: np.ndarray | None = None

    def __call__(self, shown: np.ndarray) -> np.ndarray:
        """Which of some images are misread, bool (n,); where the budget does not pay, False.

        Raises:
          Over: one of them is misread and inside the ball, or the budget is spent.
        """
        if self.queries >= self._budget:
            raise Over
        shown = np.clip(shown, 0.0, 1.0).astype(np.float32)
        answers = np.zeros(len(shown), bool)
        paid = shown[: self._budget - self.queries]
        answers[: len(paid)] = self._misread(paid)
        inside = (np.abs(shown - self._image) <= self._epsilon).all(axis=(1, 2, 3))
        if self.first is None and inside[: len(paid)].any():
            self.first = shown[np.argmax(inside)]
        hits = np.flatnonzero(inside & answers)
        if len(hits):
            self.queries += int(hits[0]) + 1
            self.hit = shown[hits[0]]
            raise Over
        self.queries += len(paid)
        return answers


def search(asked: Asked, image: np.ndarray, seed: int) -> None:
    """Search an image's ball until `asked` ends it, or the library gives up.

    Args:
      asked: answers what is asked.
      image: float32 (height, width, channels) in [0, 1].
      seed: of all randomness, below 2^32. numpy's global randomness, which the library draws from,
        is set to it meanwhile and is afterwards as it was.

    Raises:
      ImportError: the library is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else it could do, were PyTorch installed
            from art.attacks.evasion import HopSkipJump
            from art.estimators.classification import BlackBoxClassifier
    except ImportError:
        raise ImportError(
            "hop_skip_jump needs ART: pip install -e '.[experiments,peers]', or any make command."
        ) from None
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        start = _start(asked, image, np.random.default_rng(seed))

        def classes(shown: np.ndarray) -> np.ndarray:
            """One-hot: the label or not. The library asks about these two images once more."""
            for known, answer in ((image, 0), (start, 1)) if len(shown) == 1 else ():
                if np.array_equal(shown[0], known):
                    return np.eye(2)[[answer]]
            return np.eye(2)[asked(shown).astype(int)]

        model = BlackBoxClassifier(classes, image.shape, 2, clip_values=(0.0, 1.0))
        attack = HopSkipJump(model, norm=np.inf, max_iter=_ENDLESS, verbose=False)
        attack.generate(image[None], x_adv_init=start[None])
    except Over:
        pass
    finally:
        np.random.set_state(before)


def _start(asked: Asked, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Uniform noise that is misread; the budget ends the search for it."""
    height, width, channels = image.shape
    side = 1
    while True:
        drawn = random.uniform(size=(-(-height // side), -(-width // side), channels))
        noise = drawn.repeat(side, 0).repeat(side, 1)[:height, :width].astype(np.float32)
        if asked(noise[None])[0]:
            return noise
        side = 1 if side > max(height, width) // 2 else 2 * side
