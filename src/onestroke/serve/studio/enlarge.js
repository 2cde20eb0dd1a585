// Pictures enlarged for print by a filter of our own: the same pixels in every browser, and a name that can be told.

export const FILTERS = {
  crisp: { name: "Crisp edges, for ink and flat colours", told: "Lanczos, 3 lobes, edges made steep" },
  smooth: { name: "Smooth, for shading", told: "Lanczos, 3 lobes" },
};
const LOBES = 3;
const EDGE = 1.4; // printed pixels over which a steep edge changes

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// For each of `after` places the first of `before` places that it reads, and their weights, which add up to 1.
function taps(before, after) {
  const times = after / before;
  const reach = LOBES / Math.min(1, times); // a smaller picture averages over more
  return Array.from({ length: after }, (_, at) => {
    const centre = (at + 0.5) / times - 0.5;
    const first = Math.ceil(centre - reach);
    const weights = [];
    for (let i = first; i <= Math.floor(centre + reach); i++) {
      const x = ((i - centre) * LOBES) / reach;
      weights.push(sinc(x) * sinc(x / LOBES));
    }
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

// `pixels` (h w 3, in a row) at another width and height; edges are carried on.
function resampled(pixels, [w, h], [width, height], tapsOf) {
  const across = new Float32Array(width * h * 3);
  const [columns, rows] = [tapsOf(w, width), tapsOf(h, height)];
  for (let y = 0; y < h; y++) {
    for (let x = 0; x < width; x++) {
      const { first, weights } = columns[x];
      let [r, g, b] = [0, 0, 0];
      for (let k = 0; k < weights.length; k++) {
        const at = (y * w + Math.min(w - 1, Math.max(0, first + k))) * 3;
        r += weights[k] * pixels[at];
        g += weights[k] * pixels[at + 1];
        b += weights[k] * pixels[at + 2];
      }
      const to = (y * width + x) * 3;
      across[to] = r;
      across[to + 1] = g;
      across[to + 2] = b;
    }
  }
  const out = new Float32Array(width * height * 3);
  for (let y = 0; y < height; y++) {
    const { first, weights } = rows[y];
    const to = y * width * 3;
    for (let k = 0; k < weights.length; k++) {
      const from = Math.min(h - 1, Math.max(0, first + k)) * width * 3;
      for (let i = 0; i < width * 3; i++) out[to + i] += weights[k] * across[from + i];
    }
  }
  return out;
}

const linear = (before, after) => Array.from({ length: after }, (_, at) => {
  const centre = ((at + 0.5) * before) / after - 0.5;
  const first = Math.floor(centre);
  return { first, weights: [first + 1 - centre, centre - first] };
});

// The lowest or highest value of each pixel's neighbourhood of 3 x 3.
function extremes(pixels, [w, h], pick) {
  const out = new Float32Array(pixels.length);
  for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) for (let c = 0; c < 3; c++) {
    let found = pixels[(y * w + x) * 3 + c];
    for (let j = Math.max(0, y - 1); j <= Math.min(h - 1, y + 1); j++) {
      for (let i = Math.max(0, x - 1); i <= Math.min(w - 1, x + 1); i++) found = pick(found, pixels[(j * w + i) * 3 + c]);
    }
    out[(y * w + x) * 3 + c] = found;
  }
  return out;
}

// A canvas that shows `bitmap` at `width` x `height` pixels.
export function enlarged(bitmap, width, height, filter) {
  const [w, h] = [bitmap.width, bitmap.height];
  const small = new OffscreenCanvas(w, h).getContext("2d");
  small.drawImage(bitmap, 0, 0);
  const { data } = small.getImageData(0, 0, w, h);
  const pixels = new Float32Array(w * h * 3);
  for (let i = 0; i < w * h; i++) for (let c = 0; c < 3; c++) pixels[3 * i + c] = data[4 * i + c];
  const large = resampled(pixels, [w, h], [width, height], taps);
  if (filter === "crisp" && width > w) {
    // Between the darkest and the lightest of its neighbours a value is pushed to the nearer one.
    const low = resampled(extremes(pixels, [w, h], Math.min), [w, h], [width, height], linear);
    const high = resampled(extremes(pixels, [w, h], Math.max), [w, h], [width, height], linear);
    const steepness = Math.max(1, width / w / EDGE);
    for (let i = 0; i < large.length; i++) {
      const range = high[i] - low[i];
      if (range < 24) continue; // no edge: shading stays as it is
      const share = Math.min(1, Math.max(0, ((large[i] - low[i]) / range - 0.5) * (1 + (steepness - 1) * Math.min(1, (range - 24) / 48)) + 0.5));
      large[i] = low[i] + range * share;
    }
  }
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(large[3 * i + c]); // clamped by its type
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
