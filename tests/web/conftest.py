"""Sessions of the explorer on toy horses with the demo's model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from explorer import ADDRESS, draw_horses, open_session, save, wait
from fastapi.testclient import TestClient
from quadrupeds import ToySample

from diffseg.web.server import create_app
from diffseg.web.session import Session


@pytest.fixture(scope='session')
def horses() -> list[ToySample]:
    """The toy pictures."""
    return draw_horses()


@pytest.fixture(scope='session')
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of the horses, which all sessions share."""
    return tmp_path_factory.mktemp('explorer') / 'cache'


@pytest.fixture
def open_folder(cache: Path) -> Iterator[Callable[..., Session]]:
    """`open_folder(folder, **options)` is a session whose features are extracted; it is closed after the test."""
    sessions = []

    def opened(folder: Path, **options) -> Session:
        sessions.append(open_session(folder, cache, **options))
        wait(sessions[-1])
        return sessions[-1]

    with torch.random.fork_rng():
        yield opened
    for session in sessions:
        session.close()


@pytest.fixture
def session(tmp_path: Path, horses: list[ToySample], open_folder: Callable[..., Session]) -> Session:
    """A session on all horses."""
    return open_folder(save(tmp_path / 'pictures', horses))


@pytest.fixture
def client(session: Session) -> TestClient:
    """A client of the session's server, as the page is."""
    return TestClient(create_app(session), ADDRESS, headers={'Origin': ADDRESS})
