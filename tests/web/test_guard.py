"""Which requests are answered."""

import socket

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from diffseg.web.guard import SECURITY_HEADERS, Guard, check_host

TOKEN = 'a-long-and-random-token'


def client(host: str = '127.0.0.1', token: str | None = None, address: str = 'http://127.0.0.1:8765') -> TestClient:
    app = FastAPI()

    @app.get('/')
    @app.get('/api/read')
    def read() -> str:
        return 'read'

    @app.post('/api/write')
    @app.post('/api/pictures')
    async def write(request: Request) -> int:
        return len(await request.body())

    return TestClient(Guard(app, host, token, max_body=100, max_upload=1000), address, follow_redirects=False)


@pytest.mark.parametrize('host', ['127.0.0.1:8765', 'localhost:1', '[::1]:8765', 'localhost'])
def test_loopback_names_at_any_port_are_answered(host):
    headers = {'Host': host, 'Origin': f'http://{host}', 'Sec-Fetch-Site': 'same-origin'}
    response = client().post('/api/write', content=b'1234', headers=headers)
    assert response.json() == 4
    assert SECURITY_HEADERS.items() <= dict(response.headers).items()


@pytest.mark.parametrize('host', ['evil.example', 'evil.example:8765', '127.0.0.1.evil.example', '10.0.0.5', '[', ''])
def test_other_hosts_are_refused(host):
    response = client().get('/api/read', headers={'Host': host})
    assert response.status_code == 421 and 'is not that of the explorer' in response.json()['error']


@pytest.mark.parametrize('origin', ['http://evil.example', 'null', 'http://127.0.0.1:9999', 'https://127.0.0.1:8765'])
def test_other_origins_are_refused(origin):
    for response in (
        client().post('/api/write', content=b'1', headers={'Origin': origin}),
        client().get('/api/read', headers={'Origin': origin}),
    ):
        assert response.status_code == 403 and 'refused' in response.json()['error']


def test_other_pages_may_link_to_the_page_but_read_nothing():
    cross = {'Sec-Fetch-Site': 'cross-site'}
    assert client().get('/', headers=cross).status_code == 200
    assert client().get('/api/read', headers=cross).status_code == 403
    assert client().get('/api/read', headers={'Sec-Fetch-Site': 'same-site'}).status_code == 403
    assert client().get('/api/read', headers={'Sec-Fetch-Site': 'none'}).status_code == 200
    assert client().post('/api/write', headers={'Sec-Fetch-Site': 'none'}).status_code == 403


def test_bodies_are_bounded_whether_or_not_they_say_their_size():
    assert client().post('/api/write', content=b'1' * 100).json() == 100
    assert client().post('/api/write', content=b'1' * 101).status_code == 413
    assert client().post('/api/pictures', content=b'1' * 1000).json() == 1000
    assert client().post('/api/pictures', content=b'1' * 1001).status_code == 413
    with pytest.raises(ValueError, match='more than 100 bytes'):  # the server's handlers answer with 413
        client().post('/api/write', content=(b'1' * 60 for _ in range(2)))
    wrong = client().post('/api/write', content=b'1', headers={'Content-Length': 'x'})
    assert wrong.status_code == 400


def test_other_addresses_demand_a_token():
    with pytest.raises(ValueError, match='give --token'):
        client('0.0.0.0')
    with pytest.raises(ValueError, match='at least 16'):
        client('192.168.0.2', 'short')
    check_host('::1', None)
    guarded = client('192.168.0.2', TOKEN, 'http://192.168.0.2:8765')
    for headers in ({}, {'Authorization': 'Bearer wrong'}, {'Cookie': 'diffseg_token=wrong'}, {'Cookie': 'a="\x01'}):
        response = guarded.get('/', headers=headers)
        assert response.status_code == 401 and 'token' in response.json()['error']
    assert guarded.get('/?token=wrong').status_code == 401
    assert guarded.get('/api/read', headers={'Authorization': f'Bearer {TOKEN}'}).status_code == 200
    entered = guarded.get(f'/?token={TOKEN}')
    assert entered.status_code == 303 and entered.headers['location'] == '/'
    assert 'HttpOnly' in entered.headers['set-cookie'] and 'SameSite=Strict' in entered.headers['set-cookie']
    assert guarded.get('/api/read').status_code == 200  # the cookie was set
    assert guarded.get('/api/read', headers={'Host': 'evil.example'}).status_code == 421


def test_all_addresses_are_reached_by_number_and_by_the_name_of_the_machine():
    everywhere = client('0.0.0.0', TOKEN, 'http://192.168.0.2:8765')
    headers = {'Authorization': f'Bearer {TOKEN}'}
    assert everywhere.get('/api/read', headers=headers).status_code == 200
    assert everywhere.get('/api/read', headers={**headers, 'Host': f'{socket.gethostname()}:8765'}).status_code == 200
    assert everywhere.get('/api/read', headers={**headers, 'Host': 'rebound.example'}).status_code == 421
