_base_ = [
    '../_base_/models/text_masks_sd3_medium.py',
    '../_base_/datasets/ade20k_test.py',
    '../_base_/text_masks_runtime.py',
    '../_base_/schedules/test_only.py',
]

model = dict(classes=_base_.dataset_type)
