// PNG chunks, by the PNG specification: length, type, data, CRC-32 of type and data.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});

export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

function chunk(type, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(type), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, crc32(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

export function physical(dpi) {
  const data = new DataView(new ArrayBuffer(9));
  data.setUint32(0, Math.round(dpi / 0.0254)); // pixels a metre
  data.setUint32(4, Math.round(dpi / 0.0254));
  data.setUint8(8, 1);
  return chunk("pHYs", new Uint8Array(data.buffer));
}

export const international = (keyword, content) => chunk("iTXt", new TextEncoder().encode(`${keyword}\0\0\0\0\0${content}`));

export async function withChunks(blob, chunks) {
  const HEAD = 8 + 25; // signature and IHDR, which come first
  return new Blob([blob.slice(0, HEAD), ...chunks, blob.slice(HEAD)], { type: "image/png" });
}
