"""What one sample of a pair of images holds between data set, model and metric."""

from mmengine.structures import BaseDataElement


class PairSample(BaseDataElement):
    """Annotation of one pair; the suffix 0 is the source image and 1 the target image.

    A pipeline's output is `{'inputs': {'image0': image, 'image1': image}, 'data_samples': PairSample}` with images
    of shape (3, H, W), uint8, RGB; images of a batch differ in size, so `pseudo_collate` makes lists of them.

    Coordinates are (x, y) in pixels of the original image, flipped and cropped as the image is, but never resized with
    it: multiply by `img_shape / ori_shape` (or the size of a feature map) to find a point in what the model sees.

    Fields:
        keypoints0, keypoints1: float32 with shape (N, 2), row by row the same part of the object.
        visible: bool with shape (N,), whether a keypoint is annotated and inside the picture in both images. The
            coordinates of the others mean nothing.
        bbox0, bbox1: the object's box (x1, y1, x2, y2), float32 with shape (4,).

    Meta information:
        img_path0, img_path1: the files; equal paths are equal images, unless an augmentation is drawn at random.
        category: e.g. "pottedplant", as the data set spells it.
        pair_id: unique within the split.
        ori_shape0, ori_shape1: (height, width) of the frame that coordinates refer to.
        img_shape0, img_shape1: (height, width) of the images in `inputs`, after resizing.
        variations: how the data set describes the difference between the two images, e.g. {"mirror": 1}; may be empty.
        damaged: only where an image or an annotation could not be read: a message that names the file. Such a sample
            comes from data sets in test mode; it has no fields, both its images are None, of the meta information only
            `pair_id` and `category` are sure to exist, and a metric counts it as not evaluated.
    """
