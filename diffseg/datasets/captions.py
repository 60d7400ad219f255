"""Captions as part of the data pipeline."""

from typing import Any

from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from diffseg.captions import Captions


@TRANSFORMS.register_module()
class LoadCaption(BaseTransform):
    """Note in the sample's meta information which caption is that of its image.

    It comes after `PackSegInputs`, in `TestTimeAug` too. `CaptionPreProcessor` passes it on to the backbone.

    Required Keys:

    - data_samples (with `img_path`)

    Added Keys:

    - caption_row, in the meta information of `data_samples`

    Args:
        file: JSON file {image name: caption}, see `Captions`; the one that the backbone's prompt names.
    """

    def __init__(self, file: str) -> None:
        self.captions = Captions(file)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """See the class.

        Raises:
            ValueError: the image has no caption, or the sample is not packed yet.
        """
        if 'data_samples' not in results:
            raise ValueError('LoadCaption comes after PackSegInputs, which was not applied yet')
        sample = results['data_samples']
        sample.set_metainfo({'caption_row': self.captions.row(sample.get('img_path'))})
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(file={self.captions.file!r})'
