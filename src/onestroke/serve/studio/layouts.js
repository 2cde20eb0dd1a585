// Page layouts: rows of columns. A page is 1000 units wide; frames are [x, y, width, height] in these units.

export const PAGE_WIDTH = 1000;
const MARGIN = 44;
const GUTTER = 22;
const COMIC = 10.25 / 6.625; // height over width of a US comic page

// rows: [height, [widths of its panels]], in shares
export const LAYOUTS = {
  splash: { name: "Splash", ratio: COMIC, rows: [[1, [1]]] },
  two: { name: "2 panels", ratio: COMIC, rows: [[1, [1]], [1, [1]]] },
  three: { name: "3 panels", ratio: COMIC, rows: [[5, [1]], [4, [1, 1]]] },
  four: { name: "4 panels", ratio: COMIC, rows: [[1, [1, 1]], [1, [1, 1]]] },
  five: { name: "5 panels", ratio: COMIC, rows: [[4, [1, 1]], [5, [1]], [4, [1, 1]]] },
  six: { name: "6 panels", ratio: COMIC, rows: [[1, [1, 1]], [1, [1, 1]], [1, [1, 1]]] },
  seven: { name: "7 panels", ratio: COMIC, rows: [[1, [1, 1]], [1, [1, 1, 1]], [1, [1, 1]]] },
  eight: { name: "8 panels", ratio: COMIC, rows: [[1, [1, 1, 1]], [1, [1, 1]], [1, [1, 1, 1]]] },
  nine: { name: "9 panels", ratio: COMIC, rows: [[1, [1, 1, 1]], [1, [1, 1, 1]], [1, [1, 1, 1]]] },
  strip: { name: "Vertical strip", ratio: 3.6, rows: [[1, [1]], [1, [1]], [1, [1]], [1, [1]]] },
};

export function pageHeight(layout) {
  return PAGE_WIDTH * LAYOUTS[layout].ratio;
}

// The frames in reading order; "rtl" is manga's order, rows from right to left.
export function framesOf(layout, direction) {
  const { rows } = LAYOUTS[layout];
  const total = rows.reduce((sum, [height]) => sum + height, 0);
  const free = pageHeight(layout) - 2 * MARGIN - GUTTER * (rows.length - 1);
  const frames = [];
  let y = MARGIN;
  for (const [share, widths] of rows) {
    const height = (free * share) / total;
    const across = widths.reduce((sum, width) => sum + width, 0);
    const room = PAGE_WIDTH - 2 * MARGIN - GUTTER * (widths.length - 1);
    let x = MARGIN;
    const row = widths.map((width) => {
      const frame = [x, y, (room * width) / across, height];
      x += frame[2] + GUTTER;
      return frame;
    });
    frames.push(...(direction === "rtl" ? row.reverse() : row));
    y += height + GUTTER;
  }
  return frames;
}
