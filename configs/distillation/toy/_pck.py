# the toy pairs, matched by one activation
_base_ = '../../correspondence/toy/single-layer_t50_zero-shot.py'
