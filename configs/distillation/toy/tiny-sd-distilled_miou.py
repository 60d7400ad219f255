# one pass without noise; tools/run_splits.py sets SEED
_base_ = './_miou.py'

model = dict(
    backbone=dict(
        trajectory='clean',
        vae_sample='mode',
        network_weights='work_dirs/splits/tiny-sd/seed{{$SEED:0}}/unet.safetensors',
    )
)
