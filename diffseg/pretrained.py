"""Published segmentors: neck and head of a folder or a hub repository, and inference with them.

A folder, as `diffseg.publishing` writes it, holds three files, none of which is executed or unpickled when it is read:

* `config.json`: model, test pipeline, classes, palette, fingerprint of the frozen network
* `model.safetensors`: what was trained, without auxiliary heads; the frozen network comes from its own source
* `README.md`: the model card
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from mmengine.config import ConfigDict
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from diffseg.devices import default_device
from diffseg.diffusion.images import image_size
from diffseg.diffusion.loading import reason_of

FORMAT, VERSION = 'diffseg segmentor', 1
CONFIG, WEIGHTS, CARD = 'config.json', 'model.safetensors', 'README.md'
TUPLE = '__tuple__'  # JSON has lists only, and mmcv tells them apart

PathOrImage = str | Path | Image.Image | np.ndarray


class DiffusionSegmentor:
    """A trained segmentor that was published by `tools/convert/publish.py`, ready for inference.

    ```python
    segmentor = DiffusionSegmentor.from_pretrained('FOLDER or HUB/ID')
    mask = segmentor.segment('picture.jpg')  # (H, W), class indices
    print(segmentor.classes[mask[10, 20]])
    ```

    Attributes:
        model: the segmentor, in evaluation mode.
        classes: names of the classes.
        palette: (R, G, B) of each class, 0 to 255.
        config: content of `config.json`.
    """

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        self.model = model.eval()
        self.config = dict(config)
        self.classes = tuple(config['classes'])
        self.palette = tuple(map(tuple, config['palette']))
        first, *rest = config['pipeline']
        with DefaultScope.overwrite_default_scope('mmseg'):
            self._from_file = Compose([first, *rest])
            self._from_array = Compose([{**first, 'type': 'LoadImageFromNDArray'}, *rest])

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        model: str | Path | Sequence[str | Path] | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        backbone: Mapping[str, Any] | None = None,
    ) -> 'DiffusionSegmentor':
        """Load a published segmentor, and the frozen network that it was trained on.

        Args:
            source: folder, or id of a repository on the Hugging Face hub.
            model: the frozen network, in place of the name in the config: a preset, hub id, folder or checkpoint file;
                one for each member of an ensemble of backbones.
            device: of the segmentor; by default the accelerator, if there is one.
            revision: commit, tag or branch of a hub id.
            backbone: further options of the backbone, such as `dict(dtype='bfloat16', check_fingerprint='warn')`.

        Raises:
            OSError: the folder, one of its files or the repository does not exist or cannot be read, or the frozen
                network is not to be had.
            ValueError: the files are of another format or do not fit together, or the frozen network is not the one
                that the segmentor was trained on.
        """
        folder = find_folder(source, revision)
        config = read_config(folder / CONFIG)
        settings = config['model']
        name_networks(settings, model, source)
        settings['backbone'].update(backbone or {})
        with DefaultScope.overwrite_default_scope('mmseg'):
            network = MODELS.build(ConfigDict(settings))
        load_weights(network, folder / WEIGHTS, config['fingerprints'])
        return cls(network, config).to(device or default_device())

    def to(self, device: torch.device | str) -> 'DiffusionSegmentor':
        """Move the segmentor to a device; returns itself."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where images are computed."""
        return self.model.data_preprocessor.device

    def segment(self, images: PathOrImage | Sequence[PathOrImage], batch_size: int = 1) -> Any:
        """Segment images by the test pipeline of the config that trained the segmentor.

        Args:
            images: one image, or a list of images of any sizes: files, Pillow's images, or arrays (H, W, 3), uint8,
                RGB. Orientations in EXIF are applied.
            batch_size: how many consecutive images of one size go through the network together.

        Returns:
            Class indices with shape (H, W), the size of the image, uint8 (uint16 for more than 256 classes); for a
            list, a list of these.

        Raises:
            ValueError: a file is not an image, or an array has another shape or type.
        """
        several = isinstance(images, list | tuple)
        masks = list(self._segment(images if several else [images], batch_size))
        return masks if several else masks[0]

    @torch.no_grad()
    def _segment(self, images: Iterable[PathOrImage], batch_size: int) -> Iterator[np.ndarray]:
        dtype = np.min_scalar_type(len(self.classes) - 1)
        samples = (self._prepare(image) for image in images)
        for _, group in groupby(samples, lambda sample: sample['inputs'].shape):
            group = list(group)
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                results = self.model.test_step({key: [sample[key] for sample in batch] for key in batch[0]})
                for result in results:
                    yield result.pred_sem_seg.data[0].cpu().numpy().astype(dtype)

    def _prepare(self, image: PathOrImage) -> dict[str, Any]:
        """A sample of the test pipeline."""
        if isinstance(image, str | Path):
            image_size(image)  # a clear error for what is no image
            return self._from_file({'img_path': str(image)})
        if isinstance(image, Image.Image):
            image = np.asarray(ImageOps.exif_transpose(image).convert('RGB'))
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            kind = f'{image.dtype} {image.shape}' if isinstance(image, np.ndarray) else type(image).__name__
            raise ValueError(f'an image is a path, a Pillow image or an RGB array (H, W, 3) of uint8, not {kind}')
        return self._from_array({'img': np.ascontiguousarray(image[..., ::-1])})  # mmseg's pipelines have BGR


def members(backbone: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Configs of the members of an ensemble of backbones, or of the single backbone."""
    return backbone.get('backbones', [backbone])


def check_types(config: Any, where: str) -> None:
    """Check that a config names registered parts only: mmengine would call any Python object given by its path.

    Raises:
        ValueError: it names another.
    """
    if isinstance(config, Mapping):
        kind = config.get('type', '')
        if not isinstance(kind, str) or '.' in kind or ':' in kind:
            raise ValueError(f'{where}: type is {kind!r}; only names of registered parts are built')
        for key, value in config.items():
            check_types(value, f'{where}.{key}')
    elif isinstance(config, list | tuple):
        for i, value in enumerate(config):
            check_types(value, f'{where}[{i}]')


def find_folder(source: str | Path, revision: str | None = None) -> Path:
    """The local folder of a published segmentor, downloaded if `source` is a hub id.

    Raises:
        OSError: neither folder nor reachable repository, or a file is missing.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if isinstance(source, Path) or source.count('/') != 1 or source[0] in './~':
            raise FileNotFoundError(f'no folder {folder}; give a folder that publish.py wrote, or a hub id')
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[CONFIG, WEIGHTS, CARD]))
        except (OSError, ValueError) as error:
            raise OSError(
                f'cannot get {source} from the Hugging Face hub: {reason_of(error)}. Without network, give a folder '
                f'with a copy of the repository'
            ) from error
    if missing := [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f'{source} has no {" and no ".join(missing)}; it is no segmentor that tools/convert/publish.py wrote'
        )
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """Read and check `config.json`.

    Raises:
        ValueError: it is of another format, or names parts that are not registered.
    """
    try:
        config = json.loads(path.read_text(), object_hook=lambda x: tuple(x[TUPLE]) if TUPLE in x else x)
    except ValueError as error:
        raise ValueError(f'{path} is no JSON: {error}') from error
    if not isinstance(config, dict) or config.get('format') != FORMAT:
        raise ValueError(f'{path} is not the config of a {FORMAT}, as tools/convert/publish.py writes it')
    if config.get('version') != VERSION:
        raise ValueError(f'{path} has version {config.get("version")} of the format; this diffseg reads {VERSION}')
    try:
        check_types(config['model'], 'model')
        check_types(config['pipeline'], 'pipeline')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return config


def name_networks(
    settings: Mapping[str, Any], model: str | Path | Sequence[str | Path] | None, source: str | Path
) -> None:
    """Put the frozen networks into the config of a model.

    Raises:
        ValueError: another number of networks than backbones.
        FileNotFoundError: the config has the name of a folder only.
    """
    backbones = members(settings['backbone'])
    names = [model] * (model is not None) if isinstance(model, str | Path | None) else list(model)
    if names and len(names) != len(backbones):
        raise ValueError(f'{source} has {len(backbones)} frozen networks; model names {len(names)}')
    for backbone, name in zip(backbones, names or [None] * len(backbones), strict=True):
        if name is not None:
            backbone['model'] = str(name)
        elif backbone['model'].startswith('./'):
            raise FileNotFoundError(
                f'{source} was trained on a local model, {backbone["model"].removeprefix("./")!r}; give its folder or '
                f'file as model=PATH'
            )


def load_weights(network: nn.Module, path: Path, fingerprints: Mapping[str, Any]) -> None:
    """Load the trained tensors, and compare the fingerprints.

    Raises:
        OSError: the file cannot be read.
        ValueError: names or shapes of tensors do not fit the config, or the frozen network is another.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise OSError(f'{path} is no safetensors file, or a damaged one: {error}') from error
    expected = {key: x for key, x in network.state_dict().items() if key not in fingerprints}
    differences = [
        f'{word} {", ".join(sorted(names)[:3])}{", ..." if len(names) > 3 else ""}'
        for word, names in (('without', expected.keys() - state), ('with unexpected', state.keys() - expected))
        if names
    ]
    differences += [
        f'{key} of shape {tuple(state[key].shape)}, not {tuple(x.shape)}'
        for key, x in expected.items()
        if key in state and state[key].shape != x.shape
    ]
    if differences:
        raise ValueError(f'{path} does not fit {CONFIG} beside it: it is {"; ".join(differences)}')
    for key, value in fingerprints.items():
        state[key] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    try:
        network.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f'{path.parent} does not fit the model that was loaded: {error}') from error
