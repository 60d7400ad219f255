"""The files that a distillation ends with."""

from pathlib import Path

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from diffseg.models import CleanDistiller
from diffseg.models.distillation import HEADS_FILE, NETWORK_FILE


@HOOKS.register_module()
class DistillationExportHook(Hook):
    """Write the student of a `CleanDistiller` and its heads into the work dir when training ends.

    The log says with which options they are used.

    Args:
        dtype: of the UNet's weights, 'float32', 'bfloat16' or 'float16'.

    Raises:
        ValueError: when training begins, if the model is another one.
    """

    def __init__(self, dtype: str = 'float32') -> None:
        self.dtype = getattr(torch, dtype)

    def before_train(self, runner: Runner) -> None:
        """Check the model."""
        if not isinstance(_model(runner), CleanDistiller):
            raise ValueError(
                f'DistillationExportHook writes the student of a CleanDistiller, and the model is a '
                f'{type(_model(runner)).__name__}; leave the hook out of custom_hooks'
            )

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Write the files."""
        model, folder = _model(runner), Path(runner.work_dir)
        model.export(folder, self.dtype)
        timesteps = list(model.backbone.extractor.timesteps)
        runner.logger.info(
            f"Distilled: network_weights='{folder / NETWORK_FILE}', trajectory='clean', timesteps={timesteps} "
            f'(where it is what it learned to be at {model.timestep.item():.2f})'
        )
        if model.heads is not None:
            runner.logger.info(f"Features of any timestep: TimestepHeads.load('{folder / HEADS_FILE}')")


def _model(runner: Runner) -> torch.nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
