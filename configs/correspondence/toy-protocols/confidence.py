# accuracy over coverage: matches ranked by their cycle errors
_base_ = './ap10k.py'

model = dict(cycle_error=True)
test_evaluator = dict(confidence='cycle_error', coverages=(0.25, 0.5, 0.75))
