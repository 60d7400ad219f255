# layers of rank 16, in float32, beside the projections of attention are trained with neck and head;
# tools/convert/export_lora.py writes them for diffusers
_base_ = './sdxl-t50_agg-upernet_1xb2-80k_ade20k-512x512.py'

model = dict(
    backbone=dict(lora=dict(r=16), train_noise='random', dtype='bfloat16', gradient_checkpointing=True),
)
