// What a PDF needs to know of a TrueType font: glyphs of characters, their widths, and its measures. By the OpenType
// specification's tables head, hhea, hmtx, OS/2 and cmap (format 4).

export function readFont(buffer) {
  const view = new DataView(buffer);
  const tables = new Map();
  for (let i = 0; i < view.getUint16(4); i++) {
    const at = 12 + 16 * i;
    const tag = String.fromCharCode(...new Uint8Array(buffer, at, 4));
    tables.set(tag, view.getUint32(at + 8));
  }
  const [head, hhea, hmtx, os2] = ["head", "hhea", "hmtx", "OS/2"].map((tag) => tables.get(tag));
  const unit = 1000 / view.getUint16(head + 18); // PDF counts in thousandths
  const scaled = (at) => Math.round(view.getInt16(at) * unit);
  const numWidths = view.getUint16(hhea + 34);
  return {
    bytes: new Uint8Array(buffer),
    box: [36, 38, 40, 42].map((at) => scaled(head + at)),
    ascent: scaled(hhea + 4),
    descent: scaled(hhea + 6),
    capHeight: scaled(os2 + 88),
    glyphOf: glyphs(view, tables.get("cmap")),
    widthOf: (glyph) => view.getUint16(hmtx + 4 * Math.min(glyph, numWidths - 1)) * unit,
  };
}

// The glyph of a character's code; 0 for none.
function glyphs(view, cmap) {
  let table = 0;
  for (let i = 0; i < view.getUint16(cmap + 2); i++) {
    const at = cmap + view.getUint32(cmap + 8 + 8 * i);
    if (view.getUint16(at) === 4) table = at;
  }
  const count = view.getUint16(table + 6) / 2;
  const [ends, starts] = [table + 14, table + 16 + 2 * count];
  return (code) => {
    for (let i = 0; code < 0xffff && i < count; i++) {
      if (code > view.getUint16(ends + 2 * i)) continue;
      const start = view.getUint16(starts + 2 * i);
      if (code < start) return 0;
      const delta = view.getUint16(starts + 2 * count + 2 * i);
      const place = starts + 4 * count + 2 * i;
      const range = view.getUint16(place);
      if (range === 0) return (code + delta) & 0xffff;
      const glyph = view.getUint16(place + range + 2 * (code - start));
      return glyph && (glyph + delta) & 0xffff;
    }
    return 0;
  };
}
