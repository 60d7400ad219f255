# normalised and modulated by the block, once draws of noise are averaged
_base_ = './flux-dev-t260_ditf-raw_1xb1-zero-shot_spair-640x640.py'

model = dict(backbone=dict(layers=['vit-block28-mod'], average_draws=True))
