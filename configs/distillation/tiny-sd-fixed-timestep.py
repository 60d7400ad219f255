_base_ = './tiny-sd.py'

model = dict(learn_timestep=False)
