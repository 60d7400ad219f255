// Requests to the explorer's own server.

export class RequestError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function send(method, path, { body, raw, signal } = {}) {
  const options = { method, signal, headers: {} };
  if (raw !== undefined) {
    options.body = raw;
    options.headers['content-type'] = 'application/octet-stream';
  } else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers['content-type'] = 'application/json';
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new RequestError('The explorer does not answer. Is it still running in its terminal?', 0);
  }
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error ?? message;
  } catch {
    // the status says enough
  }
  throw new RequestError(message, response.status);
}

export const get = async (path) => (await send('GET', path)).json();
export const post = async (path, body = {}) => (await send('POST', path, { body })).json();
export const put = async (path, body) => (await send('PUT', path, { body })).json();
export const remove = async (path) => (await send('DELETE', path)).json();
export const upload = async (name, file) =>
  (await send('POST', `/api/pictures?name=${encodeURIComponent(name)}`, { raw: file })).json();

function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return { header, bytes: new Uint8Array(buffer, 4 + length) };
}

export const getBinary = async (path) => unpack(await (await send('GET', path)).arrayBuffer());
export const postBinary = async (path, body, signal) =>
  unpack(await (await send('POST', path, { body, signal })).arrayBuffer());

// Runs a task for the newest argument alone: while one runs, later calls replace each other.
export class Latest {
  constructor(task) {
    this.task = task;
    this.running = false;
    this.waiting = null;
  }

  async call(...argument) {
    if (this.running) {
      this.waiting = argument;
      return;
    }
    this.running = true;
    try {
      await this.task(...argument);
    } finally {
      this.running = false;
      if (this.waiting) {
        const next = this.waiting;
        this.waiting = null;
        this.call(...next);
      }
    }
  }

  cancel() {
    this.waiting = null;
  }
}
