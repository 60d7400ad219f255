"""Activations of pretrained diffusion models; needs torch, diffusers and transformers, and none of the mm packages."""

from diffseg.diffusion.recorder import ActivationRecorder
from diffseg.diffusion.sites import Site

__all__ = ['ActivationRecorder', 'Site']
