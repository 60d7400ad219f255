# zero-shot matching for tools/search.py: training pairs to select by, and for comparison the activations that Generic
# Diffusion Feature recommends for SD 1.5, each normalised before they are joined
_base_ = ['../_base_/datasets/spair_toy.py', '../_base_/correspondence_runtime.py']

layers = {
    'up-level1-repeat1-vit-block0-cross-q': 96,
    'up-level1-repeat2-res-out': 96,
    'up-level2-repeat1-vit-block0-cross-q': 64,
    'up-level3-repeat0-vit-block0-self-k': 48,
}
model = dict(
    type='CorrespondenceModel',
    backbone=dict(
        type='DiffusionBackbone',
        model='{{ fileDirname }}/../../demo/tiny-sd',
        layers=list(layers),
        channels=list(layers.values()),
        timesteps=[50],
    ),
    neck=dict(type='ConcatNeck', levels=[list(layers.values())], normalize=True),
)
test_evaluator = dict(type='PCKMetric', thresholds=(0.05, 0.1), bases=('bbox',), out_file='pck.json')
test_cfg = dict(type='TestLoop')
