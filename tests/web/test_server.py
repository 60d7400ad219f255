"""The explorer's HTTP interface."""

import io
import json
import socket
import struct
from typing import Any

import numpy as np
import pytest
from explorer import ADDRESS
from fastapi.testclient import TestClient
from PIL import Image
from strokes import CLASSES, draw_stroke, merge_parts

from diffseg.web.server import create_app, listen


def unpack(response) -> tuple[dict[str, Any], np.ndarray]:
    """Header and bytes of a binary response."""
    assert response.status_code == 200, response.text
    length = struct.unpack('<I', response.content[:4])[0]
    return json.loads(response.content[4 : 4 + length]), np.frombuffer(response.content[4 + length :], np.uint8)


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', size, (90, 120, 30)).save(file, 'PNG')
    return file.getvalue()


@pytest.fixture
def ids(client) -> list[str]:
    return [picture['id'] for picture in client.get('/api/state').json()['pictures']]


def test_the_page_and_its_files_are_served(client):
    page = client.get('/')
    assert page.status_code == 200 and '<main' in page.text and 'no-store' in page.headers['cache-control']
    for name in ('main.js', 'style.css', 'icon.svg'):
        assert client.get(f'/static/{name}').status_code == 200
    assert client.get('/favicon.ico').status_code == 200
    for path in ('/docs', '/openapi.json', '/static/../server.py', '/static/%2e%2e/server.py', '/api/nothing'):
        refused = client.get(path)
        assert refused.status_code == 404 and refused.json()['error'] == 'Not Found'


def test_answers_do_not_wait_for_acknowledgements():
    with listen() as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert connection.getsockname()[0] == '127.0.0.1'


def test_the_state_is_short_unless_it_changed(client, ids):
    state = client.get('/api/state').json()
    assert [picture['name'] for picture in state['pictures']] == [f'horse_{i}.png' for i in range(len(ids))]
    assert set(state['choices'][0]['done']) == set(ids) and state['choices'][0]['id'] == state['default']
    assert client.get('/api/state', params={'revision': state['revision']}).json() == {'revision': state['revision']}
    client.put('/api/classes', json={'classes': [{'name': 'a', 'colour': '#ffffff', 'former': None}]})
    changed = client.get('/api/state', params={'revision': state['revision']}).json()
    assert changed['annotations'] == state['annotations'] + 1
    assert changed['folder'] == 'pictures' and '/' not in changed['folder']


def test_pictures_are_served_and_added(client, ids):
    image = Image.open(io.BytesIO(client.get(f'/api/pictures/{ids[0]}/thumbnail').content))
    assert image.size == (64, 64) and image.format == 'PNG'
    assert client.get(f'/api/pictures/{ids[0]}/file').status_code == 422
    assert client.get('/api/pictures/..%2f..%2fetc%2fpasswd/image').status_code == 404
    assert client.get('/api/pictures/unknown/image').status_code == 404
    added = client.post('/api/pictures', params={'name': 'new one.png'}, content=png()).json()
    assert added['name'] == 'new one.png'
    assert added['id'] in [picture['id'] for picture in client.get('/api/state').json()['pictures']]


@pytest.mark.parametrize(
    ('name', 'content', 'status', 'message'),
    [
        ('../up.png', png(), 400, 'is no name of a picture'),
        ('a.png', b'no picture', 400, 'cannot be read as a picture'),
        ('a.png', png((1200, 1200)), 413, '1200 x 1200 pixels'),
        ('a.png', b'0' * 200_001, 413, 'at most 200000'),
        ('a.png', (b'0' * 60_000 for _ in range(5)), 413, 'more than 200000'),
    ],
    ids=['path', 'text', 'pixels', 'bytes', 'stream'],
)
def test_hostile_uploads_are_refused_and_the_server_goes_on(client, ids, name, content, status, message):
    refused = client.post('/api/pictures', params={'name': name}, content=content)
    assert refused.status_code == status and message in refused.json()['error']
    assert len(client.get('/api/state').json()['pictures']) == len(ids)


def test_a_point_is_matched_in_other_pictures(client, ids):
    choice = client.get('/api/state').json()['default']
    body = {'choice': choice, 'source': ids[0], 'points': [[20, 30]], 'targets': ids[:3]}
    header, data = unpack(client.post('/api/match', json=body))
    assert [match['id'] for match in header['matches']] == ids[:3] and len(data) == 3 * 256
    own = header['matches'][0]
    assert own['grid'] == [16, 16] and own['mutual'] and own['score'] == pytest.approx(1, abs=0.01)
    heat = data[:256]
    assert heat.min() == 0 and heat.max() == 255 and heat.argmax() == 7 * 16 + 5  # the cell of (20, 30)
    assert own['low'] < own['high'] <= 1.0001


@pytest.mark.parametrize(
    'change',
    [
        {'points': []},
        {'points': [[1, 2, 3]]},
        {'points': [['1', 2]]},
        {'points': [[1e9, 2]]},
        {'extra': 1},
        {'targets': 'all'},
        {'source': None},
    ],
    ids=str,
)
def test_malformed_json_is_refused(client, ids, change):
    body = {'choice': 'x', 'source': ids[0], 'points': [[1, 2]], 'targets': ids} | change
    refused = client.post('/api/match', json=body)
    assert refused.status_code == 422 and 'body' in refused.json()['error']
    text = json.dumps({**body, 'points': [[float('nan'), 1]]})
    assert client.post('/api/match', content=text, headers={'Content-Type': 'application/json'}).status_code == 422
    assert (
        client.post('/api/match', content=json.dumps(body), headers={'Content-Type': 'text/plain'}).status_code == 422
    )


def test_layers_are_listed_chosen_and_coloured(client, session, ids):
    listed = client.get('/api/sites').json()
    names = {site['name']: site for site in listed['sites']}
    assert names['up-level1-upsampler-out']['stride'] == 8 and names['up-level1-upsampler-out']['channels'] == 96
    assert not any(name.endswith('-map') for name in names) and listed['timesteps'] == 1000
    assert 'practical' in listed['sets'] and listed['ranking'] is None
    header, data = unpack(client.post('/api/colours', json={'choice': session.choice.id}))
    assert [entry['id'] for entry in header['colours']] == ids and len(data) == len(ids) * 256 * 3
    assert data.min() == 0 and data.max() == 255
    chosen = client.post('/api/choices', json={'layers': ['mid-vit-out'], 'timesteps': [261]}).json()
    assert chosen['layers'] == ['mid-vit-out@261']
    refused = client.post('/api/choices', json={'layers': ['x'], 'timesteps': [50]})
    assert refused.status_code == 400 and "'x'" in refused.json()['error']
    assert client.post('/api/colours', json={'choice': 'x'}).status_code == 404


def test_strokes_are_painted_undone_and_shown_as_masks(client, horses, ids):
    classes = [{'name': name, 'colour': colour, 'former': None} for name, colour in CLASSES]
    assert client.put('/api/classes', json={'classes': classes}).status_code == 200
    assert client.put('/api/classes', json={'classes': [classes[0] | {'colour': 'red;'}]}).status_code == 422
    assert client.post('/api/fit').json()['scores'] == {}
    assert unpack(client.post('/api/masks', json={'pictures': ids}))[0] == {'masks': []}
    for label in range(4):
        body = {
            'picture': ids[0],
            'label': label,
            'radius': 1.0,
            'points': draw_stroke(merge_parts(horses[0].mask) == label),
        }
        number = client.post('/api/strokes', json=body).json()['id']
    fitted = client.post('/api/fit').json()
    assert set(fitted['scores']) == set(ids) and fitted['next'] in ids[1:]
    header, data = unpack(client.post('/api/masks', json={'pictures': ids[:2]}))
    assert [entry['grid'] for entry in header['masks']] == [[96, 96]] * 2 and len(data) == 4 * 96 * 96
    assert data[: 96 * 96].max() == 3 and data[96 * 96 : 2 * 96 * 96].max() == 255
    listed = client.get('/api/annotations').json()
    assert [stroke['picture'] for stroke in listed['strokes']] == [ids[0]] * 4
    assert client.delete(f'/api/strokes/{number}').status_code == 200
    assert client.delete(f'/api/strokes/{number}').status_code == 404
    assert len(client.get('/api/annotations').json()['strokes']) == 3
    assert client.post('/api/strokes', json=body | {'label': 9}).json()['error'].startswith('there is no class 9')
    exported = client.post('/api/export', json={'name': 'a'}).json()
    assert exported['folder'] == 'exports/a' and exported['command'].endswith('config.py')
    assert client.get('/api/exports').json() == {'exports': ['a']}
    assert client.post('/api/export', json={'name': '../a'}).status_code == 400
    assert client.post('/api/import', json={'name': '../a', 'source': 'labels'}).status_code == 400
    client.post('/api/import', json={'name': 'a', 'source': 'labels'})
    imported = client.get('/api/annotations').json()
    assert imported['imported'] == [ids[0]] and imported['strokes'] == []
    header, data = unpack(client.get(f'/api/labels/{ids[0]}'))
    assert header['grid'] == [64, 64] and set(np.unique(data)) <= {0, 1, 2, 3, 255}
    assert client.get(f'/api/labels/{ids[1]}').status_code == 404


def test_models_outside_of_the_folder_are_not_loaded(client, ids):
    assert client.get('/api/models').json() == {'configs': [], 'checkpoints': []}
    refused = client.post('/api/models', json={'config': '../x.py', 'checkpoint': '/etc/passwd'})
    assert refused.status_code == 400 and 'not among the files' in refused.json()['error']
    assert 'no model is loaded' in client.get(f'/api/predictions/{ids[0]}').json()['error']


def test_a_full_disk_and_a_bug_are_reported(session, monkeypatch):
    client = TestClient(create_app(session), ADDRESS, raise_server_exceptions=False)

    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('os.replace', full)
    refused = client.put('/api/classes', json={'classes': []})
    assert refused.status_code == 507 and 'No space left on device; free space' in refused.json()['error']
    monkeypatch.setattr(session, 'fit', lambda: 1 / 0)
    assert client.post('/api/fit').json()['error'].startswith('the explorer failed: ZeroDivisionError')
    assert client.get('/api/state').status_code == 200
