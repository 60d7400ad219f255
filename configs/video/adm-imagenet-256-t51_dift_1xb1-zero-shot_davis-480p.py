_base_ = [
    '../_base_/models/propagation_dift_adm.py',
    '../_base_/datasets/davis.py',
    '../_base_/video_runtime.py',
]
