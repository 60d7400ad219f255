"""Processes that tests start and kill."""

import multiprocessing

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
