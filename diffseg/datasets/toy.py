"""Species, parts with their colours, and keypoints of the toy data sets that `tools/toy` draws."""

SPECIES = ('horse', 'giraffe', 'dog', 'elephant')
FAMILIES = {'long-legged': ('horse', 'giraffe'), 'short-legged': ('dog', 'elephant')}
PARTS = ('background', 'torso', 'neck', 'head', 'ear', 'front leg', 'hind leg', 'tail')
PALETTE = (
    (0, 0, 0), (214, 39, 40), (255, 187, 60), (31, 119, 180), (148, 103, 189), (44, 160, 44), (23, 190, 207),
    (227, 119, 194),
)  # fmt: skip
KEYPOINTS = (
    'eye', 'muzzle', 'ear tip', 'poll', 'withers', 'back', 'tail base', 'tail tip', 'chest', 'belly',
    'near front hoof', 'far front hoof', 'near hind hoof', 'far hind hoof',
)  # fmt: skip
# Points between two keypoints, which no toy pair within or across species has.
UNSEEN = (('eye', 'muzzle'), ('poll', 'withers'), ('withers', 'back'), ('back', 'tail base'))
