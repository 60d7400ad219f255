_base_ = './tiny-sd-distilled_pck.py'

model = dict(backbone=dict(network_weights='work_dirs/splits/tiny-sd-fixed-timestep/seed{{$SEED:0}}/unet.safetensors'))
