# DIFT's code has no JHMDB. Layer, topk and radius are what we recall of the paper, not verified; the timestep, the
# draws, the temperature and the number of previous frames are those of DAVIS.
_base_ = [
    '../_base_/models/propagation_dift_sd21.py',
    '../_base_/datasets/jhmdb.py',
    '../_base_/video_runtime.py',
]

model = dict(labels='joints', topk=15, radius=5)
