# masks from names of classes, without training (ConceptAttention, arXiv 2502.04320)
model = dict(
    type='TextMaskSegmentor',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    prompt='',
    input_size=1024,
    dtype='bfloat16',
)
