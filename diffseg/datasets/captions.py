"""Captions as part of the data pipeline."""

from typing import Any

from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

from diffseg.captions import Captions


@TRANSFORMS.register_module()
class LoadCaption(BaseTransform):
    """Add the row of an image's caption to the meta information of its sample.

    It comes after `PackSegInputs`, in `TestTimeAug` too. `CaptionPreProcessor` passes it on to the backbone.

    Required Keys:

    - data_samples (with `img_path`)

    Added Keys:

    - caption_row, in the meta information of `data_samples`

    Args:
        file: JSON file {image name: caption}, see `Captions`; the same as in the backbone's prompt.
    """

    def __init__(self, file: str) -> None:
        self.captions = Captions(file)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add `caption_row` to the sample.

        Raises:
            ValueError: the image has no caption, or PackSegInputs was not applied before.
        """
        if 'data_samples' not in results:
            raise ValueError('LoadCaption must come after PackSegInputs in the pipeline')
        sample = results['data_samples']
        sample.set_metainfo({'caption_row': self.captions.row(sample.get('img_path'))})
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(file={self.captions.file!r})'
