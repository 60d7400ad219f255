# DiTF's second row: the same, normalised and modulated as the block does; the best activation of the search
_base_ = './_zero-shot.py'
