_base_ = [
    '../_base_/models/propagation_dift_sd21.py',
    '../_base_/datasets/davis.py',
    '../_base_/video_runtime.py',
]
