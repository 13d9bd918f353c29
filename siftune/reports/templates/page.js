// Starts the page: rows at once, plotly when the page has been painted, colours again whenever the theme changes.
const data = JSON.parse(document.getElementById('data').textContent);
const of = (kind) => Object.entries(data).filter(([, block]) => block.kind === kind);
const drawn = [];

const unpack = async () => {
  const packed = atob(document.getElementById('library').textContent);
  const bytes = new Uint8Array(packed.length);
  for (let index = 0; index < packed.length; index += 1) bytes[index] = packed.charCodeAt(index);
  const text = await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  const script = document.createElement('script');
  script.textContent = text;
  document.head.append(script);
};

const draw = async () => {
  for (const one of drawn) {
    await one();
    await new Promise((resolve) => { setTimeout(resolve, 0); });
  }
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
};

const THEMES = ['auto', 'light', 'dark'];
const button = document.getElementById('theme');
const remember = (value) => { try { localStorage.setItem('siftune-theme', value); } catch { /* a page from a file may not */ } };
const recall = () => { try { return localStorage.getItem('siftune-theme'); } catch { return null; } };
const setTheme = (name) => {
  if (name === 'auto') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  button.textContent = `Theme: ${name}`;
  button.setAttribute('aria-label', `Colour theme: ${name === 'auto' ? 'system setting' : name}`);
};
setTheme(THEMES.includes(recall()) ? recall() : 'auto');
button.addEventListener('click', () => {
  const now = document.documentElement.dataset.theme || 'auto';
  const next = THEMES[(THEMES.indexOf(now) + 1) % THEMES.length];
  setTheme(next);
  remember(next);
  draw();
});
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);

const links = [...document.querySelectorAll('nav a')];
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links) {
      if (link.hash === `#${entry.target.id}`) {
        link.setAttribute('aria-current', 'true');
        const bar = link.parentElement;
        const left = link.offsetLeft - bar.offsetLeft;
        if (left < bar.scrollLeft || left + link.offsetWidth > bar.scrollLeft + bar.clientWidth - 32) bar.scrollTo({ left: left - 40 });
      }
      else link.removeAttribute('aria-current');
    }
  }
}, { rootMargin: '-20% 0px -70% 0px' });
document.querySelectorAll('main > section').forEach((section) => seen.observe(section));

for (const [name, block] of of('explorer')) new Explorer(name, block);
requestAnimationFrame(() => setTimeout(async () => {
  if (document.getElementById('library').textContent) await unpack();
  for (const [name, block] of of('map')) {
    const map = new PoolMap(name, block);
    drawn.push(() => map.draw());
  }
  for (const [name, block] of of('chart')) drawn.push(() => drawChart(name, block));
  await draw();
}, 30));
