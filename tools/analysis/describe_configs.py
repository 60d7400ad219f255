"""Describe segmentation configs: layers, trainable parameters and operations. Weights are not read.

    python tools/analysis/describe_configs.py configs/segmentation/sd15-t50_agg-upernet_1xb2-80k_ade20k-512x512.py
    python tools/analysis/describe_configs.py --write    # all of configs/segmentation, into the table of its README.md

Models are built on the meta device and see one image of the crop's size. Everything but the published mIoU is computed:

* layers, with the channels and the stride of their maps, in pixels of the image as the backbone sees it;
* trainable parameters, of neck, heads and trained parts of the backbone;
* checkpoint: the size of the model's state dict, without the optimizer's state;
* TFLOP of VAE, network, neck and decode head for one crop, 2 for a multiply-add.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import import_modules_from_strings
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffseg.diffusion.conditioning import Conditioning, PromptEncoder
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning
from diffseg.diffusion.prompt_store import PromptStore

FOLDER = Path(__file__).parents[2] / 'configs/segmentation'
BEGIN, END = '<!-- written by tools/analysis/describe_configs.py --write -->', '<!-- end of the table -->'
NAME = re.compile(r'(.+_.+)_\d+xb\d+-\d+k_([^-]+)-\d+x\d+')
TITLES = ('config', 'published mIoU', 'layers', 'channels', 'stride', 'trained', 'checkpoint', 'TFLOP')

# What the papers report, single scale, on the validation sets.
GDF = 'arXiv 2410.03558'
META_PROMPTS = 'README of fudan-zvg/meta-prompts'
PUBLISHED = {
    ('sd15-legacy-t51_concat-upernet-published', 'ade20k'): (40.26, GDF),
    ('sd15-legacy-t51_concat-upernet-published', 'cityscapes'): (64.01, GDF),
    ('sdxl-legacy-t50_concat-upernet-published', 'ade20k'): (27.78, GDF),
    ('sdxl-legacy-t50_concat-upernet-published', 'cityscapes'): (71.67, GDF),
    ('sd15-t51_concat-upernet-published', 'ade20k'): (41.07, GDF),
    ('sd15-t51_concat-upernet-published', 'cityscapes'): (64.10, GDF),
    ('sdxl-t50_concat-upernet-published', 'ade20k'): (43.45, GDF),
    ('sdxl-t50_concat-upernet-published', 'cityscapes'): (74.47, GDF),
    ('sdxl+playground-v2-t50_concat-upernet-published', 'ade20k'): (45.71, GDF),
    ('sdxl+playground-v2-t50_concat-upernet-published', 'cityscapes'): (75.89, GDF),
    ('sd15-vpd-frozen-t51_concat-upernet-published', 'ade20k'): (37.63, GDF),
    ('sd15-vpd-frozen-t51_concat-upernet-published', 'cityscapes'): (55.06, GDF),
    ('sd15-metaprompts-frozen_upernet', 'ade20k'): (40.89, GDF),
    ('sd15-metaprompts-frozen_upernet', 'cityscapes'): (71.94, GDF),
    ('sd15-metaprompts_upernet', 'ade20k'): (55.83, META_PROMPTS),
    ('sd15-metaprompts_upernet', 'cityscapes'): (84.38, META_PROMPTS),
    ('sd15-vpd-t1_fpn', 'ade20k'): (53.7, 'README of wl-zhao/VPD'),
}


@contextmanager
def without_weights() -> Iterator[None]:
    """Build models on the meta device, where zeros of the right shape replace the output of text encoders."""

    def encode(self: PromptStore, prompts: Sequence[str]) -> Conditioning:
        network = load_config(self.model, revision=self.revision, config=self.config).network
        return placeholder_conditioning(network, len(prompts))

    def embed_classes(self: PromptEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        return torch.zeros(len(names), load_config(self.model).network['cross_attention_dim'])

    with (
        patch.object(PromptStore, '__call__', encode),
        patch.object(PromptStore, 'fingerprint', None),
        patch.object(PromptEncoder, 'class_embeddings', embed_classes),
        torch.device('meta'),
    ):
        yield


def build(cfg: Config) -> nn.Module:
    """The model of a config on the meta device.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    import_modules_from_strings(cfg.custom_imports.imports)
    init_default_scope('mmseg')
    for member in members(cfg.model.backbone):
        member.random = True if member.type == 'VisionBackbone' else (load_config(member.model).part, 'vae')
    with without_weights():
        return MODELS.build(cfg.model).eval()


def members(backbone: dict[str, Any]) -> list[dict[str, Any]]:
    """Configs of the members of an ensemble, or of the single backbone."""
    return backbone.get('backbones', [backbone])


def describe(path: Path) -> list[str]:
    """The cells of a config's row in the table.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    cfg = Config.fromfile(path, import_custom_modules=False)
    model = build(cfg)
    height, width = cfg.model.data_preprocessor.size
    layers = []
    names = [member.model for member in members(cfg.model.backbone)]
    for name, backbone in zip(names, getattr(model.backbone, 'members', [model.backbone]), strict=True):

        def note(backbone: nn.Module, _: Any, maps: Sequence[Tensor], name: str = name) -> None:
            side = (backbone.input_size or (height, width))[0]
            for layer, x in zip(backbone.layers, maps, strict=True):
                title = f'{name}: {layer}' if len(names) > 1 else layer
                layers.append((f'`{title}`', str(x.shape[1]), str(round(side / x.shape[2]))))

        backbone.register_forward_hook(note)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_decode(torch.empty(1, 3, height, width, device='meta'), [{'img_shape': (height, width)}])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with without_weights():  # which a checkpoint identifies, those of text encoders included
        size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    return [
        f'[{path.stem}](./{path.name})',
        published(path.stem),
        *('<br>'.join(column) for column in zip(*layers, strict=True)),
        f'{trained / 1e6:.1f} M',
        f'{size / 1e6:.0f} MB',
        f'{counter.get_total_flops() / 1e12:.2f}',
    ]


def published(stem: str) -> str:
    """The published mIoU and its source; an empty text if there is none."""
    method, dataset = NAME.fullmatch(stem).groups()
    figure, source = PUBLISHED.get((method, dataset), (None, None))
    return '' if figure is None else f'{figure:.2f} ({source})'


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f'| {" | ".join(cells)} |'


def table(lines: Sequence[str]) -> str:
    """The table with its header."""
    return '\n'.join([line(TITLES), '|' + '---|' * len(TITLES), *lines])


def read_lines(text: str) -> dict[str, str]:
    """The lines of the table in a README, by the config's name."""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    return {title[1]: line for line in lines if (title := re.match(r'\| \[(.+?)\]', line))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', type=Path, metavar='CONFIG', help='default: all of configs/segmentation')
    parser.add_argument('--write', action='store_true', help='put the lines into configs/segmentation/README.md')
    args = parser.parse_args(argv)
    paths = args.configs or sorted(FOLDER.glob('*.py'))
    lines, failed = {}, 0
    for path in paths:
        try:
            lines[path.stem] = line(describe(path))
        except (ImportError, RuntimeError) as error:  # Mask2Former reads values, which do not exist on the meta device
            print(f'{path.stem} is left out: {error}', file=sys.stderr)
            failed = 1
    if not args.write:
        print(table(list(lines.values())))
        return failed
    readme = FOLDER / 'README.md'
    text = readme.read_text()
    lines = {**read_lines(text), **lines}
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    kept = [lines[path.stem] for path in sorted(FOLDER.glob('*.py')) if path.stem in lines]
    readme.write_text(f'{before}{BEGIN}\n\n{table(kept)}\n\n{END}{after}')
    return failed


if __name__ == '__main__':
    raise SystemExit(main())
