# pose alignment at test time by mutual neighbours
_base_ = './ap10k.py'

model = dict(align_pose=True)
