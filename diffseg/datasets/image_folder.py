"""Pictures of a folder, without labels."""

import hashlib
from pathlib import Path
from typing import Any, Literal

from mmengine.dataset import BaseDataset
from mmseg.registry import DATASETS

from diffseg.feature_files import find_images


@DATASETS.register_module()
class ImageFolderDataset(BaseDataset):
    """All pictures in a folder, searched in depth, some of which are held out of training.

    The `held_out` pictures are those whose paths in the folder have the smallest digests: which ones depends on nothing
    but their names, and no picture is in both parts.

    Args:
        data_root: the folder.
        part: pictures to 'train' on, or those held out, 'val'.
        held_out: number of the pictures that are held out; the same in both parts.
        **kwargs: see `BaseDataset`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: unknown part, or no pictures are left for it.
    """

    def __init__(self, data_root: str, part: Literal['train', 'val'], held_out: int, **kwargs: Any) -> None:
        if part not in ('train', 'val'):
            raise ValueError(f"part is {part!r}; it is 'train' or 'val'")
        self.part = part
        self.held_out = held_out
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict[str, str]]:
        """Entries with the `img_path` of every picture of the part, sorted by name."""
        root = Path(self.data_root).expanduser().absolute()
        if not root.is_dir():
            raise FileNotFoundError(f'data_root {self.data_root} is no folder; set it to a folder of pictures')
        items, *_ = find_images(root)
        by_digest = sorted(items, key=lambda item: hashlib.sha256(item.name.encode()).digest())
        if not 1 <= self.held_out < len(items):
            raise ValueError(
                f'held_out is {self.held_out}, of {len(items)} pictures in {root}; it is 1 or more, and leaves some '
                'to train on'
            )
        chosen = by_digest[: self.held_out] if self.part == 'val' else by_digest[self.held_out :]
        return [{'img_path': str(item.path)} for item in sorted(chosen, key=lambda item: item.name)]
