// What the page knows, and the files that hold it. A page opened from a disk may not read files, but
// it may run scripts: each file of data is one, which hands its value to `reportData`.
const waiting = new Map();
const given = new Map();
window.reportData = (name, value) => given.set(name, value);

function load(name) {
  if (!waiting.has(name)) {
    waiting.set(name, new Promise((found, failed) => {
      const script = make("script", { src: `data/${name}.js` });
      script.onload = () => (given.has(name) ? found(given.get(name)) : failed(new Error(`data/${name}.js is damaged`)));
      script.onerror = () => failed(new Error(`data/${name}.js is missing; keep the folder together`));
      document.head.append(script);
    }).catch(error => {
      waiting.delete(name);
      throw error;
    }));
  }
  return waiting.get(name);
}

// little-endian numbers as text, smaller and sooner read than JSON
function numbers(text, kind) {
  const bytes = Uint8Array.from(atob(text), character => character.charCodeAt(0));
  return new kind(bytes.buffer);
}

const chunkName = i => `features-${String(i).padStart(5, "0")}`;

class Store {
  constructor(index) {
    this.words = index.words;
    this.perChunk = index.per_chunk;
    this.rows = index.rows;
    this.unit = index.unit;
    this.counts = numbers(index.counts, Float64Array);
    this.maxima = numbers(index.maxima, Float32Array);
    this.numbers = numbers(index.numbers, Uint32Array);
    // of each feature the strongest tokens, NONE where there are fewer
    this.tops = numbers(index.tops, Uint32Array);
    this.width = index.top_width;
    this.n = this.counts.length;
    this.places = new Map(Array.from(this.numbers, (number, place) => [number, place]));
    this.texts = index.words.map(word => word.toLowerCase().trim());
    this.promoted = null;
  }

  density(place) {
    return this.counts[place] / this.rows;
  }

  topWords(place) {
    const found = [];
    for (let i = place * this.width; i < (place + 1) * this.width; i++) {
      if (this.tops[i] !== NONE) found.push(this.tops[i]);
    }
    return found;
  }

  // one feature, with the words that its numbers mean
  async feature(place) {
    const chunk = await load(chunkName(Math.floor(place / this.perChunk)));
    return [chunk.features[place % this.perChunk], chunk.words];
  }

  async withPromoted() {
    if (!this.promoted) {
      const { tokens, width } = await load("promoted");
      this.promoted = { tokens: numbers(tokens, Uint32Array), width };
    }
    return this.promoted;
  }
}
const NONE = 0xffffffff;
