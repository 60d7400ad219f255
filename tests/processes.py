"""Processes that tests start and kill."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path

PRELOAD = [
    'diffseg.datasets',
    'diffseg.engine',
    'diffseg.evaluation',
    'diffseg.models',
    'matplotlib.pyplot',
    'mmengine.runner',
    'mmseg.models',
]


def forkserver() -> multiprocessing.context.BaseContext:
    """Start processes as forks of one with a single thread, which has imported what they need.

    Forks of the test's own process, which has threads, can wait forever for a lock that one of these held.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOAD)
    return context


def run_script(script: str, device: str) -> None:
    """Run a script on the CPU, also where there is a GPU, or on a GPU whose matrix products can be repeated."""
    os.environ.update({'CUDA_VISIBLE_DEVICES': ''} if device == 'cpu' else {'CUBLAS_WORKSPACE_CONFIG': ':4096:8'})
    runpy.run_path(script, run_name='__main__')


def run_tool(path: Path, output: Path, arguments: list[str]) -> None:
    """Run the `main` of a tool, in a process of its own, with its output in a file; exit with its status."""
    with output.open('w', buffering=1) as sys.stdout:
        sys.exit(runpy.run_path(str(path))['main'](arguments))
