# the toy pairs, matched by the best activation
_base_ = '../../correspondence/toy/single-layer_t50_zero-shot.py'
