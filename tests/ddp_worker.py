"""One of two processes that train or test together."""

import json
import os
import runpy
from pathlib import Path

import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from tiny_mmseg import batch, build_segmentor
from torch import distributed


def train_as_one_of_two(rank: int, pipeline: Path, folder: Path) -> None:
    """Train two steps, and save the state to `folder`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group('gloo', f'file://{folder}/rendezvous', rank=rank, world_size=2)
    model = MMDistributedDataParallel(build_segmentor(pipeline).train(), broadcast_buffers=False)
    network = {name: buffer.clone() for name, buffer in model.module.backbone.named_buffers()}
    optim_wrapper = build_optim_wrapper(model, {'optimizer': {'type': 'SGD', 'lr': 0.1}})
    for step in range(2):  # the second fails if the first left a gradient out
        model.train_step(batch(4 * step + 2 * rank, 4 * step + 2 * rank + 1), optim_wrapper)
    assert all(torch.equal(buffer, network[name]) for name, buffer in model.module.backbone.named_buffers())
    torch.save(model.module.state_dict(), folder / f'rank{rank}.pt')
    distributed.destroy_process_group()


def run_test_as_one_of_two(rank: int, tool: Path, config: Path, folder: Path) -> None:
    """Test a config with `tool` (tools/test.py), and write the figures to `folder`."""
    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)  # as torchrun does
    distributed.init_process_group('gloo', f'file://{folder}/rendezvous', rank=rank, world_size=2)
    figures = runpy.run_path(str(tool))['main']([str(config), '--launcher', 'pytorch'])
    (folder / f'rank{rank}.json').write_text(json.dumps(figures))
    distributed.destroy_process_group()
