_base_ = './scarce_runtime.py'

tta_model = dict(type='VoteTTAModel')
