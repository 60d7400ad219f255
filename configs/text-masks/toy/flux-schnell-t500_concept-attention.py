# parts of the demo's animals, by their names
_base_ = [
    '../../_base_/models/text_masks_flux_schnell.py',
    '../../_base_/datasets/toy_test.py',
    '../../_base_/text_masks_runtime.py',
    '../../_base_/schedules/test_only.py',
]

model = dict(
    classes=['background', 'torso', 'neck', 'head', 'ear', 'front leg', 'hind leg', 'tail'],
    background=dict(index=0, concepts=['background']),
)
