// All pictures as tiles with a small overlay each. Only tiles in sight are asked about.

import { $, make } from './dom.js';
import { isReady, select, store, usable } from './store.js';

const gallery = $('gallery');
const tiles = new Map(); // id -> {element, canvas, caption, score, marks}
const visible = new Set();
let onVisible = () => {};

const observer = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) visible.add(entry.target.dataset.id);
      else visible.delete(entry.target.dataset.id);
    }
    onVisible();
  },
  { rootMargin: '150px' },
);

export const visibleIds = () => usable().map((p) => p.id).filter((id) => visible.has(id));
export const tile = (id) => tiles.get(id);

export function watchVisible(listener) {
  onVisible = listener;
}

function makeTile(picture) {
  const canvas = make('canvas', { class: 'overlay', hidden: true, 'aria-hidden': 'true' });
  const marks = make('div', { class: 'marks', 'aria-hidden': 'true' });
  const score = make('span', { class: 'score' });
  const caption = make('span', { class: 'name', textContent: picture.name, title: picture.name });
  const image = make('img', {
    alt: '', loading: 'lazy', decoding: 'async', draggable: false, src: `/api/pictures/${picture.id}/thumbnail`,
  });
  const frame = make('div', { class: 'frame' }, image, canvas, marks);
  frame.style.setProperty('--ratio', picture.width / picture.height);
  if (Math.max(picture.width, picture.height) <= 128) frame.classList.add('small');
  const button = make(
    'button',
    { type: 'button', class: 'tile', data: { id: picture.id }, onclick: () => select(picture.id) },
    frame, make('span', { class: 'line' }, caption, score),
  );
  const item = make('div', { role: 'listitem', class: 'cell' }, button);
  return { item, button, canvas, marks, score, caption };
}

function makeBroken(picture) {
  const item = make(
    'div', { role: 'listitem', class: 'cell' },
    make(
      'div', { class: 'tile broken', data: { id: picture.id } },
      make('div', { class: 'frame' }, make('span', { textContent: picture.error })),
      make('span', { class: 'line' }, make('span', { class: 'name', textContent: picture.name })),
    ),
  );
  return { item, button: null };
}

export function show() {
  const ids = new Set(store.pictures.map((picture) => picture.id));
  for (const [id, old] of tiles) {
    if (ids.has(id)) continue;
    if (old.button) observer.unobserve(old.button);
    old.item.remove();
    tiles.delete(id);
    visible.delete(id);
  }
  store.pictures.forEach((picture, i) => {
    if (!tiles.has(picture.id)) {
      const made = picture.error === null ? makeTile(picture) : makeBroken(picture);
      tiles.set(picture.id, made);
      if (made.button) observer.observe(made.button);
    }
    const { item } = tiles.get(picture.id);
    if (gallery.children[i] !== item) gallery.insertBefore(item, gallery.children[i] ?? null);
  });
  const count = store.pictures.length;
  $('count').textContent = count === 1 ? '1 picture' : `${count} pictures`;
  $('empty').hidden = count > 0;
  mark();
}

export function mark() {
  for (const [id, { button }] of tiles) {
    if (!button) continue;
    const current = id === store.selected;
    button.classList.toggle('current', current);
    if (current) button.setAttribute('aria-current', 'true');
    else button.removeAttribute('aria-current');
  }
}

export function markReady(choice) {
  const errors = store.choices.find((c) => c.id === choice)?.errors ?? {};
  for (const [id, { button, score }] of tiles) {
    if (!button) continue;
    const ready = isReady(choice, id);
    button.classList.toggle('waiting', !ready && !errors[id]);
    button.title = errors[id] ?? '';
    if (errors[id]) score.textContent = 'failed';
  }
}

export function clear() {
  for (const { canvas, marks, score, button } of tiles.values()) {
    if (!button) continue;
    canvas.hidden = true;
    marks.replaceChildren();
    score.textContent = '';
    score.className = 'score';
    button.classList.remove('heat', 'suggested');
    button.removeAttribute('aria-label');
  }
}
