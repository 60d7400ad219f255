"""Activations of pretrained diffusion models; needs torch, diffusers and transformers, and none of the mm packages."""

from diffseg.diffusion.activations import ActivationRecorder, Site, resolve, sites

__all__ = ['ActivationRecorder', 'Site', 'resolve', 'sites']
