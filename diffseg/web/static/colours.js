// Bytes as colours on small canvases, which the browser enlarges smoothly.

const STOPS = [
  [4, 3, 18], [38, 17, 84], [86, 20, 125], [132, 32, 130], [181, 54, 122], [226, 82, 101], [249, 129, 93],
  [254, 184, 124], [252, 246, 190],
];

export const HEAT = Array.from({ length: 256 }, (_, i) => {
  const at = (i / 255) * (STOPS.length - 1);
  const low = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[low].map((value, k) => Math.round(value + (at - low) * (STOPS[low + 1][k] - value)));
});

export function parseColour(text) {
  return [1, 3, 5].map((i) => Number.parseInt(text.slice(i, i + 2), 16));
}

export const toHex = (rgb) => `#${rgb.map((value) => value.toString(16).padStart(2, '0')).join('')}`;

function paint(canvas, [height, width], colourOf) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i += 1) {
    const [r, g, b, a] = colourOf(i);
    image.data.set([r, g, b, a], 4 * i);
  }
  context.putImageData(image, 0, 0);
  canvas.hidden = false;
}

// `scale` turns a byte into 0..255 of the common scale.
export function paintHeat(canvas, grid, bytes, offset = 0, scale = (v) => v) {
  const pixels = new Uint32Array(256);
  const view = new DataView(pixels.buffer);
  for (let v = 0; v < 256; v += 1) {
    const [r, g, b] = HEAT[Math.max(0, Math.min(255, Math.round(scale(v))))];
    view.setUint32(4 * v, (r << 24) | (g << 16) | (b << 8) | 255);
  }
  const [height, width] = grid;
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext('2d');
  const image = context.createImageData(width, height);
  const target = new Uint32Array(image.data.buffer);
  for (let i = 0; i < target.length; i += 1) target[i] = pixels[bytes[offset + i]];
  context.putImageData(image, 0, 0);
  canvas.hidden = false;
}

export function paintColours(canvas, grid, bytes, offset = 0) {
  paint(canvas, grid, (i) => [bytes[offset + 3 * i], bytes[offset + 3 * i + 1], bytes[offset + 3 * i + 2], 255]);
}

// Labels without a colour are transparent.
export function paintLabels(canvas, grid, bytes, colours, offset = 0) {
  paint(canvas, grid, (i) => (colours[bytes[offset + i]] ? [...colours[bytes[offset + i]], 255] : [0, 0, 0, 0]));
}
