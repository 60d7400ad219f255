# SD + DINO (arXiv 2305.15347) with its layers, what goes into the decoder's blocks 2, 5 and 8, normalised together.
# Unlike SD + DINO: without the principal components of each pair; and the prompt is its --TEXT_INPUT, where the paper
# has ODISE's learned captioner
_base_ = [
    '../_base_/datasets/spair_test.py',
    '../_base_/correspondence_runtime.py',
    '../_base_/schedules/test_only.py',
]

layers = {'up-level2-repeat1-vit-out': 640, 'up-level1-repeat1-vit-out': 1280, 'up-level0-repeat1-res-out': 1280}
dinov2 = dict(type='VisionBackbone', model='dinov2-b', layers=[12], channels=[768], layernorm=False, input_size=840)
sd15 = dict(
    type='DiffusionBackbone', model='sd15', layers=list(layers), channels=list(layers.values()), timesteps=[100]
)
model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='EnsembleBackbone', backbones=[sd15, dinov2]),
    neck=dict(type='ConcatNeck', levels=[[*layers.values(), 768]], normalize=[[3, 1]]),
    prompt='a photo of a {category}',
)
pipeline = [dict(type='LoadPair'), dict(type='ResizePair', size=960), dict(type='PackPair')]
test_dataloader = dict(dataset=dict(pipeline=pipeline))
