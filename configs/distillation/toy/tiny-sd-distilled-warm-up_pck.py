_base_ = './tiny-sd-distilled_pck.py'

model = dict(backbone=dict(network_weights='work_dirs/splits/tiny-sd-warm-up/seed{{$SEED:0}}/unet.safetensors'))
