# the window soft-argmax of GeoAware-SC, zero-shot: 11 cells and a temperature of 0.02
_base_ = './ap10k.py'

model = dict(unit='cells', window=11, temperature=0.02)
