"""Distil a UNet to one pass without noise, as CleanDIFT does, on any folder of pictures.

    python tools/distill.py configs/distillation/sd15.py --images photos
    python tools/distill.py configs/distillation/sd15.py --images photos --captions captions.json --resume --amp
    python tools/distill.py configs/distillation/sdxl.py --amp --count-only

The work dir gets the student, unet.safetensors for `network_weights`, and heads.safetensors for `TimestepHeads.load`,
besides logs and checkpoints. Other arguments are those of tools/train.py.

`--count-only` prints the memory that training takes on an accelerator, counted on tensors of the same shapes without
values; autocast of the CPU stands in for that of the accelerator. The context and the fragments of its memory come on
top. What Adam's step itself takes, a copy of the gradients once the activations are gone, is not counted.
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from train import add_arguments, train

from diffseg.benchmarking import LiveMemory, table_head
from diffseg.diffusion.loading import load_config
from diffseg.diffusion.placeholders import placeholder_conditioning


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument('--images', help='folder of pictures, searched in depth (default: that of the config)')
    parser.add_argument('--captions', help='JSON file {image name: caption} (default: the prompt of the config)')
    parser.add_argument('--count-only', action='store_true', help='print the memory that training takes, and stop')
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        if args.images:
            loader.dataset.data_root = args.images
        if args.captions:
            loader.dataset.pipeline.append(dict(type='LoadCaption', file=args.captions))
    if args.captions:
        cfg.model.backbone.prompt = dict(type='captions', file=args.captions)
    if args.count_only:
        cfg.merge_from_dict(args.cfg_options)
        print_memory(cfg, args.amp)
    else:
        train(cfg, args, parser)


def print_memory(cfg: Config, amp: bool) -> None:
    """Print what one step takes, as a table."""
    batch = cfg.train_dataloader.batch_size
    rows = count_memory(cfg.model, batch, cfg.size, amp)
    rows['sum'] = sum(rows.values())
    precision = '16 bits where autocast allows them' if amp else 'float32'
    sys.stdout.write(f'{cfg.model.backbone.model}, {batch} images of {cfg.size} x {cfg.size} pixels, {precision}\n\n')
    sys.stdout.write(f'{table_head(["what", "GB"])}\n')
    for what, size in rows.items():
        sys.stdout.write(f'| {what} | {size / 1e9:.1f} |\n')


def count_memory(config: dict, batch: int, size: int, amp: bool) -> dict[str, int]:
    """Bytes of weights, of Adam's moments, and of what else there is at the peak of a step."""
    init_default_scope('mmseg')
    prompt = placeholder_conditioning(load_config(config['backbone']['model']).network)
    backbone = {**config['backbone'], 'prompt': prompt, 'random': ('unet', 'vae'), 'check_finite': False}
    with torch.device('meta'):
        model = MODELS.build({**config, 'backbone': backbone}).train()
    trained = sum(x.nbytes for x in model.parameters() if x.requires_grad)
    frozen = {id(x): x.nbytes for x in (*model.buffers(), *model.parameters()) if not x.requires_grad}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    put_on_cpu(model, mode)
    with mode, LiveMemory() as memory:
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            loss = model(torch.zeros(batch, 3, size, size), mode='loss')['loss']
        loss.backward()
    return {
        'trained weights': trained,
        'moments of Adam': 2 * trained,
        'frozen network and VAE': sum(frozen.values()),
        'gradients and activations, at the peak of a step': memory.peak,
    }


def put_on_cpu(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a model on the meta device by fake ones of the CPU, which has fused attention."""

    def fake(x: Tensor) -> FakeTensor:
        return FakeTensor(mode, x.detach().to('meta'), torch.device('cpu'))

    for module in model.modules():
        for name, x in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(x), requires_grad=x.requires_grad))
        for name, x in module.named_buffers(recurse=False):
            setattr(module, name, fake(x))


if __name__ == '__main__':
    main()
