# Meta Prompts (arXiv 2312.14733): learned prompts and time embeddings, three passes of the UNet, and one channel for
# each prompt
_base_ = './diffusion_upernet.py'

num_prompts = 150
model = dict(
    backbone=dict(
        _delete_=True,
        type='MetaPromptsBackbone',
        model='sd15',
        num_prompts=num_prompts,
        refine_steps=3,
        frozen=False,
        gradient_checkpointing=True,
    ),
    neck=None,
    decode_head=dict(in_channels=[num_prompts] * 4, in_index=[0, 1, 2, 3], dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=num_prompts, in_index=2, channels=512, dropout_ratio=0.0),
)
