"""Search for the best activations and timesteps for a task.

Every activation at every timestep is a candidate. Exact and approximate parts of the search:

* For pairs, a candidate's score is exactly the zero-shot PCK of `CorrespondenceModel` with this activation alone,
  without refinement; the score of several is exactly that with `ConcatNeck(normalize=True)`. For segmentation a linear
  probe replaces the trained head; it ranks candidates, and its mIoU is not that of a head.
* Maps are rounded to half precision, and those with more channels than `dim` are projected at random, see `Projection`.
  On 20 toy pairs, 197 activations and two timesteps, PCK with the default of 256 channels differs from the exact one by
  0.06 on average (Spearman's rank correlation 0.999, the best 60 the same), with 64 channels by 0.7 (0.981, 57 of 60),
  with 32 by 2.5 (0.953, 54 of 60). With `--dtype float32` and a large `--dim` the score is exact.
* Only a shortlist is combined: the best single candidates, at most two timesteps of each activation. A candidate that
  is poor alone and useful in combination is missed.
* The selection is greedy and uses the training data only, on which its score is optimistic.
"""

from .grid import Candidate, Measure, Projection

__all__ = ['Candidate', 'Measure', 'Projection']
