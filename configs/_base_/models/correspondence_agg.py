# activations mixed by the aggregation network of Diffusion Hyperfeatures (arXiv 2305.14334); the models that inherit
# this say which
model = dict(
    type='CorrespondenceModel',
    backbone=dict(type='DiffusionBackbone'),
    neck=dict(type='AggregationNeck', out_channels=384),
)
