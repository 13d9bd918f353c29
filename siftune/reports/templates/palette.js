// Colours: Okabe and Ito's eight, distinguishable with the common colour vision deficiencies; beyond eight, shapes.
const LIGHT = ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#7a6f00', '#5c6068'];
const DARK = ['#56b4e9', '#f09a4e', '#2fc79a', '#e39bc4', '#e6b84d', '#9ad4f5', '#d8cf4a', '#a4a8b0'];
const SHAPES = ['circle', 'square', 'diamond', 'triangle-up', 'cross', 'x', 'triangle-down', 'star'];
const RAMP = [[0, '#00224e'], [0.25, '#414d6b'], [0.5, '#7c7b78'], [0.75, '#bcae6c'], [1, '#fee838']]; // cividis

const isDark = () => {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
};
const colour = (index) => (isDark() ? DARK : LIGHT)[index % 8];
const shape = (index) => SHAPES[Math.floor(index / 8) % 8];

// The value of a CSS variable as a colour that a canvas understands.
const css = (name) => {
  const probe = document.createElement('i');
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
};

// An element with a class and a text; text is never parsed as markup.
const make = (tag, name = '', text = null) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== null) element.textContent = text;
  return element;
};
// Plotly interprets a few tags in names; siftune's names are plain text.
const plain = (text) => String(text).replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
const number = new Intl.NumberFormat('en', { maximumSignificantDigits: 4 });
const integer = new Intl.NumberFormat('en', { maximumFractionDigits: 0 });

// A labelled select; `choices` are [value, words].
const choose = (label, choices, changed) => {
  const box = make('label', '', label);
  const select = make('select');
  for (const [value, words] of choices) {
    const option = make('option', '', words);
    option.value = value;
    select.append(option);
  }
  select.addEventListener('change', () => changed(select.value));
  box.append(select);
  return [box, select];
};

// Plotly's links to other servers, all disabled: a button that uploads the chart, and server addresses.
const ALONE = { plotlyServerURL: '', showSendToCloud: false, showEditInChartStudio: false, showLink: false, topojsonURL: '' };
