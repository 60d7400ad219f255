"""The explorer's HTTP interface."""

import json
import logging
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from diffseg.diffusion.layer_sets import LAYER_SETS, expand

from .export import EXPORTS
from .features import Choice
from .guard import Guard
from .pictures import SHOWN, THUMBNAIL, Picture, TooLargeError
from .session import Session
from .strokes import COLOURS, POINTS, Class

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / 'static'
MAX_BODY = 2_000_000  # bytes of a request without a picture
PICTURES = 2000  # in a request

Coordinate = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
Point = Annotated[list[Coordinate], Field(min_length=2, max_length=2)]
Points = Annotated[list[Point], Field(min_length=1, max_length=POINTS)]
Keys = Annotated[list[Annotated[str, Field(max_length=16)]], Field(max_length=PICTURES)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Body(BaseModel):
    """JSON of a request: no other fields, no conversions."""

    model_config = ConfigDict(extra='forbid', strict=True)


class ChoiceBody(Body):
    """Layers to read, and timesteps."""

    layers: Annotated[list[Text], Field(min_length=1, max_length=64)]
    timesteps: Annotated[list[int | float], Field(min_length=1, max_length=32)]


class MatchBody(Body):
    """Points of one picture to match in others."""

    choice: str
    source: str
    points: Points
    targets: Keys


class ColoursBody(Body):
    """A choice of layers to colour."""

    choice: str


class StrokeBody(Body):
    """A stroke; without a label it erases."""

    picture: str
    label: Annotated[int, Field(ge=0)] | None
    radius: Annotated[float, Field(ge=0, le=10_000, allow_inf_nan=False)]
    points: Points


class ClassBody(Body):
    """A class, and its former index."""

    name: Annotated[str, Field(min_length=1, max_length=80)]
    colour: Annotated[str, Field(pattern=r'^#[0-9a-f]{6}$')]
    former: Annotated[int, Field(ge=0)] | None


class ClassesBody(Body):
    """All classes in their new order."""

    classes: Annotated[list[ClassBody], Field(max_length=255)]


class MasksBody(Body):
    """Pictures whose masks are wanted."""

    pictures: Keys


class ExportBody(Body):
    """Name of an export."""

    name: Text


class ImportBody(Body):
    """Name of an export, and what of it is imported."""

    name: Text
    source: Literal['strokes', 'labels', 'masks']


class ModelBody(Body):
    """A config and a checkpoint, as `/api/models` lists them."""

    config: Annotated[str, Field(max_length=4096)]
    checkpoint: Annotated[str, Field(max_length=4096)]


def create_app(session: Session, host: str = '127.0.0.1', token: str | None = None) -> ASGIApp:
    """The application.

    Args:
        session: the state that all tabs share.
        host: at which the server listens.
        token: which requests need where others can reach `host`.

    Raises:
        ValueError: others can reach the host, and there is no token.
    """
    app = FastAPI(title='diffseg explorer', docs_url=None, redoc_url=None, openapi_url=None)
    app.mount('/static', StaticFiles(directory=STATIC), name='static')
    _add_errors(app)
    _add_pictures(app, session)
    _add_features(app, session)
    _add_segmentation(app, session)
    _add_prediction(app, session)

    @app.get('/')
    def page() -> FileResponse:
        return FileResponse(STATIC / 'index.html', media_type='text/html')

    @app.get('/favicon.ico')
    def icon() -> FileResponse:
        return FileResponse(STATIC / 'icon.svg', media_type='image/svg+xml')

    return Guard(app, host, token, MAX_BODY, session.folder.max_bytes)


def listen(host: str = '127.0.0.1', port: int = 0) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Without TCP_NODELAY, which accepted connections inherit, each answer would wait 40 ms for an acknowledgement.

    Raises:
        OSError: the address or the port cannot be used.
    """
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    connection = socket.create_server((host, port), family=family)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def make_server(app: ASGIApp) -> uvicorn.Server:
    """A server of the application; its `run([connection])` blocks."""
    return uvicorn.Server(uvicorn.Config(app, log_level='warning', ws='none'))


@contextmanager
def serving(session: Session) -> Iterator[str]:
    """Serve in a thread, at a free port of the loopback address; yields the page's address."""
    with listen() as connection:
        server = make_server(create_app(session))
        thread = threading.Thread(target=server.run, args=([connection],), daemon=True)
        thread.start()
        try:
            yield f'http://127.0.0.1:{connection.getsockname()[1]}/'
        finally:
            server.should_exit = True
            thread.join()


def _add_errors(app: FastAPI) -> None:
    """Every error is JSON with a message that says what is wrong."""

    def answer(status: int, message: str) -> JSONResponse:
        return JSONResponse({'error': message}, status)

    app.exception_handler(TooLargeError)(lambda request, error: answer(413, str(error)))
    app.exception_handler(ValueError)(lambda request, error: answer(400, str(error)))
    app.exception_handler(KeyError)(lambda request, error: answer(404, str(error.args[0])))
    app.exception_handler(HTTPException)(lambda request, error: answer(error.status_code, str(error.detail)))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return answer(422, f'{".".join(map(str, first["loc"]))}: {first["msg"]}')

    @app.exception_handler(OSError)
    def unwritable(request: Request, error: OSError) -> JSONResponse:
        logger.error(f'{request.method} {request.url.path}: {error}')
        return answer(507, f'the folder cannot be written: {error.strerror}; free space, or change its permissions')

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        logger.error(f'{request.method} {request.url.path}: {error!r}')
        return answer(500, f'the explorer failed: {type(error).__name__}; its terminal says more')


def _add_pictures(app: FastAPI, session: Session) -> None:
    @app.get('/api/state')
    def state(revision: str = '') -> dict[str, Any]:
        """What changes while the page is open; little if nothing did since `revision`."""
        current = revision_of(session)
        if revision == current:
            return {'revision': current}
        return {'revision': current, **describe(session)}

    @app.get('/api/pictures/{key}/{kind}')
    def picture(key: str, kind: Literal['thumbnail', 'image']) -> Response:
        side = THUMBNAIL if kind == 'thumbnail' else SHOWN
        data, media_type = session.folder.encoded(session.folder[key], side)
        return Response(data, media_type=media_type, headers={'cache-control': 'private, max-age=3600'})

    @app.post('/api/pictures')
    async def add(request: Request, name: str) -> dict[str, Any]:
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
        added = await run_in_threadpool(session.add, name, bytes(data))
        return {'id': added.id, 'name': added.name}


def _add_features(app: FastAPI, session: Session) -> None:
    @app.get('/api/sites')
    def list_sites() -> dict[str, Any]:
        """What can be chosen in the pickers."""
        available = session.layers()
        names = {site.name for site in available}
        sets = {}
        for name in LAYER_SETS:
            try:
                sets[name] = [layer for layer in expand([name], session.sites) if layer in names]
            except ValueError:
                continue  # it is for other networks
        return {
            'sites': [{'name': s.name, 'channels': s.channels, 'stride': s.stride} for s in available],
            'sets': sets,
            'ranking': session.ranking,
            'timesteps': session.features.backbone.extractor.parts.scheduler_config.get('num_train_timesteps', 1000),
        }

    @app.post('/api/choices')
    def choose(body: ChoiceBody) -> dict[str, Any]:
        return describe_choice(session, session.features.choose(body.layers, body.timesteps))

    @app.post('/api/match')
    def match_points(body: MatchBody) -> Response:
        """Heat maps: for each target a byte for each cell, from its lowest similarity to its highest."""
        choice, folder = session.features.by_id(body.choice), session.folder
        targets = [folder[key] for key in body.targets]
        source = folder[body.source]
        targets = [target for target in targets if session.features.is_ready(choice, target)]
        if not session.features.is_ready(choice, source):
            raise ValueError(f'the features of {source.name} are not extracted yet')
        matches = session.match(choice, source, body.points, targets)
        entries, maps = [], []
        for target, match in zip(targets, matches, strict=True):
            similarity = match.similarity.numpy()
            low, high = float(similarity.min()), float(similarity.max())
            maps.append(to_bytes(similarity, low, high))
            entries.append(
                {
                    'id': target.id,
                    'grid': session.features.get(choice, target).grid,
                    'low': low,
                    'high': high,
                    'point': match.point,
                    'score': match.score,
                    'back': match.back,
                    'mutual': match.mutual,
                }
            )
        return binary({'matches': entries}, maps)

    @app.post('/api/colours')
    def colours(body: ColoursBody) -> Response:
        """Colours of all pictures that are ready: three bytes for each cell."""
        maps = session.colours(session.features.by_id(body.choice))
        entries = [{'id': key, 'grid': list(x.shape[1:])} for key, x in maps.items()]
        return binary({'colours': entries}, [(x * 255).round().byte().permute(1, 2, 0).numpy() for x in maps.values()])


def _add_segmentation(app: FastAPI, session: Session) -> None:
    annotations = session.annotations

    @app.get('/api/annotations')
    def list_annotations() -> dict[str, Any]:
        """Classes and strokes; pictures are named by their ids."""
        ids = {picture.name: picture.id for picture in session.folder.usable()}
        content = annotations.describe()
        content['strokes'] = [{**s, 'picture': ids[s['picture']]} for s in content['strokes'] if s['picture'] in ids]
        painted = {name for name in annotations.painted() if name in ids}
        return {
            **content,
            'revision': annotations.revision,
            'imported': [ids[name] for name in painted if (annotations.labels / f'{name}.png').is_file()],
            'palette': COLOURS,
        }

    @app.get('/api/labels/{key}')
    def labels(key: str) -> Response:
        """Imported labels of a picture: a byte for each pixel."""
        picture = session.folder[key]
        base = annotations.base(picture.name, picture.size)
        if base is None:
            raise KeyError(f'no labels of {picture.name} were imported')
        return binary({'grid': list(base.shape)}, [base])

    @app.post('/api/strokes')
    def add(body: StrokeBody) -> dict[str, Any]:
        picture = session.folder[body.picture]
        stroke = annotations.add(picture.name, body.label, body.radius, body.points)
        return {'id': stroke.id, 'revision': annotations.revision}

    @app.delete('/api/strokes/{key}')
    def remove(key: int) -> dict[str, Any]:
        annotations.remove(key)
        return {'revision': annotations.revision}

    @app.put('/api/classes')
    def set_classes(body: ClassesBody) -> dict[str, Any]:
        annotations.set_classes([Class(c.name, c.colour) for c in body.classes], [c.former for c in body.classes])
        return {'revision': annotations.revision}

    @app.post('/api/fit')
    def fit() -> dict[str, Any]:
        return session.fit()

    @app.post('/api/masks')
    def masks(body: MasksBody) -> Response:
        """Masks, a byte for each cell, each followed by its uncertainty, from 0 to the highest in the picture."""
        folder = session.folder
        pictures = [folder[key] for key in body.pictures]
        pictures = [picture for picture in pictures if session.features.is_ready(session.choice, picture)]
        entries, maps = [], []
        for picture, (mask, uncertainty) in zip(pictures, session.masks(pictures), strict=False):  # all, or none
            high = float(uncertainty.max())
            entries.append({'id': picture.id, 'grid': list(mask.shape), 'high': high})
            maps += [mask, to_bytes(uncertainty, 0.0, high)]
        return binary({'masks': entries}, maps)

    @app.get('/api/exports')
    def exports() -> dict[str, Any]:
        return {'exports': session.exports()}

    @app.post('/api/export')
    def export(body: ExportBody) -> dict[str, Any]:
        path = session.export(body.name)
        return {'folder': f'{EXPORTS}/{path.name}', 'command': f'python tools/train.py {path / "config.py"}'}

    @app.post('/api/import')
    def import_labels(body: ImportBody) -> dict[str, Any]:
        session.import_labels(body.name, body.source)
        return {'revision': annotations.revision}


def _add_prediction(app: FastAPI, session: Session) -> None:
    predictor = session.predictor

    @app.get('/api/models')
    def models() -> dict[str, Any]:
        return {'configs': predictor.files(('.py',)), 'checkpoints': predictor.files(('.pth', '.pt'))}

    @app.post('/api/models')
    def load(body: ModelBody) -> dict[str, Any]:
        return predictor.load(body.config, body.checkpoint)

    @app.get('/api/predictions/{key}')
    def predict(key: str) -> Response:
        """The mask of a picture at its own size, at most SHOWN pixels long: a byte for each pixel."""
        mask = predictor.mask(session.folder[key])
        step = -(-max(mask.shape) // SHOWN)
        mask = mask[::step, ::step]
        return binary({'grid': list(mask.shape)}, [mask])


def revision_of(session: Session) -> str:
    """Changes with everything that `describe` says."""
    parts = (
        session.features.revision,
        session.annotations.revision,
        session.predictor.revision,
        len(session.folder.pictures),
    )
    return '.'.join(map(str, parts))


def describe(session: Session) -> dict[str, Any]:
    """Pictures, chosen layers with the progress of their extraction, and limits."""
    return {
        'folder': session.folder.path.name,
        'model': Path(session.model).name,
        'default': session.choice.id,
        'pictures': [describe_picture(picture) for picture in session.folder.pictures.values()],
        'choices': [describe_choice(session, choice) for choice in session.features.choices()],
        'annotations': session.annotations.revision,
        'loaded': session.predictor.loaded,
        'limits': {'bytes': session.folder.max_bytes, 'pixels': session.folder.max_pixels},
    }


def describe_picture(picture: Picture) -> dict[str, Any]:
    """A picture in the list."""
    return {
        'id': picture.id,
        'name': picture.name,
        'height': picture.size[0],
        'width': picture.size[1],
        'error': picture.error,
    }


def describe_choice(session: Session, choice: Choice) -> dict[str, Any]:
    """Layers, and the pictures that are done."""
    progress = session.features.choices()[choice]
    return {
        'id': choice.id,
        'layers': list(choice.layers),
        'done': sorted(progress.done),
        'errors': dict(progress.errors),
    }


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` to `high` as 0 to 255."""
    return ((values - low) * (255 / max(high - low, 1e-12)) + 0.5).clip(0, 255).astype(np.uint8)


def binary(header: dict[str, Any], parts: Sequence[np.ndarray]) -> Response:
    """Length of the header, 4 bytes, little-endian; the header, JSON; then bytes, part after part."""
    text = json.dumps(header).encode()

    def chunks() -> Iterator[bytes]:
        yield struct.pack('<I', len(text))
        yield text
        for part in parts:
            yield np.ascontiguousarray(part).tobytes()

    return Response(b''.join(chunks()), media_type='application/octet-stream')
