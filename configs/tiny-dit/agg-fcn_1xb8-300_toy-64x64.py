# the demo's segmentor, trained on 30 pictures, on four activations of the small transformer
_base_ = '../scarce/tiny-sd-t50+150+300_agg-fcn_1xb8-300_toy-64x64.py'

layers = {'vit-block1-mod': 192, 'vit-block3-cross-q': 192, 'vit-block3-mod': 192, 'vit-block5-self-k': 192}
model = dict(
    backbone=dict(model='{{ fileDirname }}/../../demo/tiny-dit', layers=list(layers), channels=list(layers.values())),
    neck=dict(levels=[list(layers.values())], layer_names=[list(layers)]),
)
