// The map of the pool: one dot per row, coloured by a column, the score, or chosen and not chosen. Data:
//   x, y: integers; row, kept (0 or 1), score (null where none), rank (0..1), text: one entry per dot;
//   colours: [{key, name, names: [..], of: [index or -1 per dot]}]; has: {score: true}.
class PoolMap {
  constructor(name, data) {
    this.name = name;
    this.data = data;
    this.box = document.querySelector(`[data-map="${CSS.escape(name)}"]`);
    this.hidden = new Set();
    this.only = false;
    this.gl = !!document.createElement('canvas').getContext('webgl');
    this.modes = data.colours.map((one) => [one.key, one.name]);
    if (data.has.score) this.modes.push(['score', 'score']);
    this.modes.push(['kept', 'chosen or not']);
    this.mode = this.modes[0][0];
    const [label] = choose('Colour by', this.modes, (value) => { this.mode = value; this.hidden.clear(); this.draw(); });
    const tick = make('label', 'tick');
    const check = make('input');
    check.type = 'checkbox';
    check.addEventListener('change', () => { this.only = check.checked; this.draw(); });
    tick.append(check, 'chosen rows only');
    this.part('controls').append(label, tick);
  }

  part(name) { return this.box.querySelector(`[data-part="${name}"]`); }

  groups() {
    const { data } = this;
    const dots = data.x.map((_, index) => index).filter((index) => !this.only || data.kept[index]);
    if (this.mode === 'kept') {
      return [['not chosen', dots.filter((i) => !data.kept[i]), css('--rest'), 'circle', 3.5], ['chosen', dots.filter((i) => data.kept[i]), css('--kept'), 'circle', 4.5]];
    }
    if (this.mode === 'score') {
      return [['scored', dots.filter((i) => data.rank[i] !== null), null, 'circle', 4], ['no score', dots.filter((i) => data.rank[i] === null), css('--rest'), 'x', 4]];
    }
    const by = data.colours.find((one) => one.key === this.mode);
    const lists = by.names.map(() => []);
    const rest = [];
    for (const index of dots) (by.of[index] < 0 ? rest : lists[by.of[index]]).push(index);
    const traces = by.names.map((name, index) => [name, lists[index], colour(index), shape(index), 4]);
    if (rest.length) traces.push(['none', rest, css('--rest'), 'circle', 3.5]);
    return traces;
  }

  trace([name, dots, shade, symbol, size]) {
    const { data } = this;
    const marker = { size, symbol, opacity: 0.8, line: { width: 0 }, color: shade };
    if (shade === null) Object.assign(marker, { color: dots.map((i) => data.rank[i]), colorscale: RAMP, cmin: 0, cmax: 1, showscale: false });
    return { type: this.gl ? 'scattergl' : 'scatter', mode: 'markers', name: plain(name), x: dots.map((i) => data.x[i]), y: dots.map((i) => data.y[i]), customdata: dots, marker, hoverinfo: 'none', visible: !this.hidden.has(name) };
  }

  draw() {
    const groups = this.groups();
    this.legend(groups);
    const place = document.getElementById(this.name);
    place.querySelector('.wait')?.remove();
    const touch = matchMedia('(pointer: coarse)').matches;
    const bare = { visible: false, showgrid: false, zeroline: false };
    const layout = {
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: false,
      hovermode: 'closest', hoverdistance: 14, dragmode: touch ? false : 'zoom', uirevision: 'same',
      xaxis: bare, yaxis: { ...bare, scaleanchor: 'x' }, modebar: { bgcolor: 'rgba(0,0,0,0)', color: css('--muted'), activecolor: css('--ink') },
    };
    const config = { responsive: true, displaylogo: false, displayModeBar: !touch, modeBarButtons: [['zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d']], ...ALONE };
    return Plotly.react(place, groups.map((group) => this.trace(group)), layout, config).then(() => this.listen(place));
  }

  legend(groups) {
    const box = this.part('legend');
    box.replaceChildren();
    if (this.mode === 'score') {
      const ramp = make('span', 'ramp', 'lowest');
      const strip = make('i');
      strip.style.background = `linear-gradient(90deg, ${RAMP.map(([at, shade]) => `${shade} ${100 * at}%`).join(', ')})`;
      ramp.append(strip, 'highest, by rank among all rows');
      box.append(ramp);
      return;
    }
    for (const [name, dots, shade, symbol] of groups) {
      const button = make('button');
      button.type = 'button';
      button.setAttribute('aria-pressed', String(!this.hidden.has(name)));
      const dot = make('i', 'dot');
      dot.style.background = shade;
      if (symbol !== 'circle') dot.style.borderRadius = '0';
      button.append(dot, `${name} `, make('span', 'muted', integer.format(dots.length)));
      button.addEventListener('click', () => {
        if (!this.hidden.delete(name)) this.hidden.add(name);
        this.draw();
        this.part('legend').querySelectorAll('button')[groups.findIndex((group) => group[0] === name)].focus();
      });
      box.append(button);
    }
  }

  listen(place) {
    if (this.heard) return;
    this.heard = true;
    const tip = document.getElementById('tip');
    place.on('plotly_hover', ({ points, event }) => {
      tip.replaceChildren(...this.about(points[0].customdata));
      tip.hidden = false;
      const { offsetWidth: wide, offsetHeight: high } = tip;
      const at = event.touches?.[0] || event;
      tip.style.left = `${Math.max(8, Math.min(at.clientX + 16, innerWidth - wide - 8))}px`;
      tip.style.top = `${at.clientY + 20 + high > innerHeight ? Math.max(8, at.clientY - high - 14) : at.clientY + 20}px`;
    });
    place.on('plotly_unhover', () => { tip.hidden = true; });
    place.on('plotly_click', ({ points }) => this.part('card').replaceChildren(...this.about(points[0].customdata)));
    // plotly is notified; otherwise it ignores the next movement over the same dot
    addEventListener('scroll', () => { if (!tip.hidden) Plotly.Fx.unhover(place); }, { passive: true });
  }

  about(index) {
    const { data } = this;
    const meta = make('div', 'meta');
    meta.append(make('strong', '', `row ${integer.format(data.row[index])}`), make('span', data.kept[index] ? 'badge kept' : 'badge', data.kept[index] ? 'chosen' : 'not chosen'));
    for (const by of data.colours) if (by.of[index] >= 0) meta.append(make('span', '', `${by.name}: ${by.names[by.of[index]]}`));
    if (data.score[index] !== null) meta.append(make('span', '', `score ${number.format(data.score[index])}`));
    return [meta, make('p', 'text', data.text[index] || 'The text of this row is not available.')];
  }
}
