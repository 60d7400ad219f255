// Match: a point of the selected picture in all others.

import { Latest, postBinary } from './api.js';
import { paintHeat } from './colours.js';
import { $, field, make, replace } from './dom.js';
import * as gallery from './gallery.js';
import * as stage from './stage.js';
import { byId, isReady, matchingChoice, selected, store } from './store.js';

const BRUSH = 6; // largest radius, in cells
let active = false;
let points = []; // of the query, in pixels
let pinned = false;
let painting = []; // points of a drag
let radius = 0; // of the brush, in cells
let common = false; // one scale for all pictures
let answered = new Map(); // id -> match, of the last query
let grids = new Map(); // id -> cells
let query = 0;

const request = new Latest(async (number, choice, source, queried, targets, started) => {
  try {
    const { header, bytes } = await postBinary('/api/match', { choice, source, points: queried, targets });
    if (!active || number !== query || store.selected !== source || matchingChoice() !== choice) return;
    draw(header.matches, bytes);
    performance.measure('heat maps', { start: started, detail: { pictures: header.matches.length } });
  } catch (error) {
    hint(error.message);
  }
});

const hint = (text) => { $('hint').textContent = text; };

function expand(list) {
  if (!radius) return list;
  const picture = selected();
  const [w, h] = stage.cellSize();
  const around = [];
  for (const [x, y] of list) {
    for (let j = -radius; j <= radius; j += 1) {
      for (let i = -radius; i <= radius; i += 1) {
        const [px, py] = [x + i * w, y + j * h];
        const inside = px >= -0.5 && py >= -0.5 && px <= picture.width - 0.5 && py <= picture.height - 0.5;
        if (i * i + j * j <= radius * radius && inside) around.push([px, py]);
      }
    }
  }
  return around;
}

function ask(list, more = null) {
  const picture = selected();
  const choice = matchingChoice();
  if (!picture || !list.length || !isReady(choice, picture.id)) return;
  if (!more) {
    query += 1;
    answered = new Map();
  }
  const others = (more ?? gallery.visibleIds()).filter((id) => id !== picture.id && isReady(choice, id));
  const targets = grids.has(picture.id) || more ? others : [picture.id, ...others]; // once, to learn its cells
  const queried = expand(list).slice(0, 2000);
  if (targets.length) request.call(query, choice, picture.id, queried, targets, performance.now());
}

const gamma = Array.from({ length: 256 }, (_, v) => 255 * (v / 255) ** 1.8);

function draw(matches, bytes) {
  let offset = 0;
  const offsets = matches.map((match) => {
    const at = offset;
    offset += match.grid[0] * match.grid[1];
    return at;
  });
  const low = Math.min(...matches.map((m) => m.low));
  const high = Math.max(...matches.map((m) => m.high));
  matches.forEach((match, i) => {
    grids.set(match.id, match.grid);
    if (match.id === store.selected) return;
    answered.set(match.id, match);
    const tile = gallery.tile(match.id);
    if (!tile?.button) return;
    const span = Math.max(high - low, 1e-9);
    const scale = common
      ? (v) => gamma[Math.round((255 * (match.low + (v / 255) * (match.high - match.low) - low)) / span)]
      : (v) => gamma[v];
    paintHeat(tile.canvas, match.grid, bytes, offsets[i], scale);
    tile.button.classList.add('heat');
    replace(
      tile.marks,
      stage.place(make('i', { class: match.mutual ? 'found mutual' : 'found' }), match.point, byId(match.id)),
    );
    tile.score.textContent = `${match.mutual ? '⇄ ' : ''}${match.score.toFixed(2)}`;
    tile.score.classList.toggle('mutual', match.mutual);
    tile.score.title = match.mutual ? 'mutual: the match leads back to the point' : 'the match leads elsewhere';
    tile.button.setAttribute(
      'aria-label',
      `${byId(match.id).name}: best match at ${match.point[0]}, ${match.point[1]}, score ${match.score.toFixed(2)}, ` +
        `${match.mutual ? 'mutual' : 'not mutual'}`,
    );
  });
  summarise();
}

function summarise() {
  const mutual = [...answered.values()].filter((match) => match.mutual).length;
  const where = points.length
    ? points.length === 1
      ? `Point ${Math.round(points[0][0])}, ${Math.round(points[0][1])}`
      : `Mean of ${points.length} points`
    : '';
  $('match-summary').textContent = where ? `${where}: ${mutual} of ${answered.size} matches are mutual.` : '';
}

function release() {
  pinned = false;
  points = [];
  query += 1;
  answered = new Map();
  request.cancel();
  stage.mark([], 'pin');
  stage.mark([], 'cursor');
  gallery.clear();
  gallery.markReady(matchingChoice());
  summarise();
  guide();
}

function pin(list) {
  points = list;
  pinned = true;
  stage.mark(points, 'pin');
  $('match-summary').textContent = '';
  ask(points);
  guide();
}

function guide() {
  const picture = selected();
  if (!picture) hint('Drop pictures onto the page to begin.');
  else if (!isReady(matchingChoice(), picture.id)) hint('Features of this picture are being extracted; others may be ready.');
  else if (pinned) hint('Pinned. Click elsewhere for another point, Shift-click to average several, Esc to let go.');
  else hint('Move over the picture and see what matches. Click to keep a point; drag to average along a stroke.');
}

const handlers = {
  grid: () => grids.get(store.selected),
  hover(point) {
    if (pinned) return;
    points = [point];
    ask(points);
  },
  left() {
    if (!pinned) release();
  },
  pointer(point) {
    stage.markBrush(point && radius ? point : null, (radius + 0.5) * stage.cellSize()[0]);
  },
  down(point, event) {
    painting = event.shiftKey && pinned ? [...points, point] : [point];
    pin(painting);
  },
  drag(point) {
    const last = painting.at(-1);
    const [w, h] = stage.cellSize();
    if (Math.abs(point[0] - last[0]) < w && Math.abs(point[1] - last[1]) < h) return;
    painting = [...painting, point];
    pin(painting);
  },
  up() {
    painting = [];
  },
  moved(cursor) {
    if (pinned) stage.mark(points, 'pin');
    pinned = false;
    points = [cursor];
    stage.mark([], 'pin');
    ask(points);
  },
  key(event, cursor) {
    if (event.key === 'Enter' && cursor) pin(event.shiftKey && points.length ? [...points, cursor] : [cursor]);
    else if (event.key === 'Escape') release();
    else if (event.key === '[' || event.key === ']') setRadius(radius + (event.key === ']' ? 1 : -1));
    else return false;
    return true;
  },
};

function setRadius(value) {
  radius = Math.min(Math.max(value, 0), BRUSH);
  $('match-brush').value = radius;
  $('match-brush-text').textContent = radius ? `${2 * radius + 1} cells wide` : 'one point';
  if (points.length) ask(points);
}

export const view = {
  enter() {
    active = true;
    grids = new Map(); // of the layers that were matched before
    stage.listen(handlers);
    replace($('controls'));
    replace(
      $('tools'),
      make('p', { id: 'match-summary', class: 'summary', role: 'status' }),
      make(
        'div', { class: 'row' },
        field(
          'Brush',
          make('input', {
            id: 'match-brush', type: 'range', min: 0, max: BRUSH, value: radius,
            oninput: (event) => setRadius(Number(event.target.value)),
          }),
          make('output', { id: 'match-brush-text' }),
        ),
        make(
          'label', { class: 'inline' },
          make('input', {
            type: 'checkbox', checked: common,
            onchange(event) {
              common = event.target.checked;
              ask(points);
            },
          }),
          'One scale for all pictures',
        ),
        make('button', { type: 'button', textContent: 'Let go', onclick: release }),
      ),
      make('p', { class: 'muted small' }, 'Features: ', make('code', { textContent: stage.describeChoice() })),
      make(
        'p', { class: 'muted small keys' },
        'Keys: arrows move by a cell, Enter keeps the point, Shift+Enter adds one, [ ] change the brush, Esc lets go.',
      ),
    );
    setRadius(radius);
    gallery.markReady(matchingChoice());
    guide();
  },
  leave() {
    active = false;
    release();
    stage.markBrush(null);
  },
  selected() {
    release();
  },
  progress() {
    gallery.markReady(matchingChoice());
    if (points.length) view.visible();
    else guide();
  },
  visible() {
    const missing = gallery.visibleIds().filter((id) => !answered.has(id));
    if (points.length && missing.length) ask(points, missing);
  },
};
