# SPair-71k as Generic Diffusion Feature evaluates: on a list of 360 validation pairs (from the folder `annotations` of
# Diffusion Hyperfeatures), by which the checkpoint is chosen as well
_base_ = './spair.py'

val_dataloader = dict(dataset=dict(ann_file='spair_71k_val-360.json'))
test_dataloader = dict(dataset=dict(split='val', ann_file='spair_71k_val-360.json'))
val_evaluator = dict(allow_selection_on_test=True)
test_evaluator = val_evaluator
prompt = (
    'a highly realistic photo that may contain an aeroplane, a bicycle, a bird, a boat, a bottle, a bus, a car, a cat, '
    'a chair, a cow, a dog, a horse, a motorbike, a person, a plant within a pot, a sheep, a train, or a tv monitor.'
)
