"""The search for the activations and timesteps that serve a task best.

Every activation at every timestep is a candidate. What of this is exact, and what is not:

* For pairs, a candidate's figure is exactly the zero-shot PCK of `CorrespondenceModel` with this activation as it is,
  without refinement; the figure of several is exactly that with `ConcatNeck(normalize=True)`. For segmentation the
  linear probe stands for a head that is trained; it orders choices, and its mIoU is not the head's.
* Maps are rounded to half precision, and those with more channels than `dim` are projected at random, see `Projection`.
  On 20 toy pairs, 197 activations and two timesteps, PCK with the default of 256 channels differs from the exact one by
  0.06 on average (Spearman's rank correlation 0.999, the best 60 the same), with 64 channels by 0.7 (0.981, 57 of 60),
  with 32 by 2.5 (0.953, 54 of 60). `--dtype float32` and a large `--dim` leave nothing out.
* Only a shortlist is tried together: the best candidates by themselves, at most two timesteps of each activation. What
  is poor alone and good in company is missed.
* The selection is greedy, and by the training data alone: its figure there flatters it.
"""

from .grid import Candidate, Measure, Projection

__all__ = ['Candidate', 'Measure', 'Projection']
