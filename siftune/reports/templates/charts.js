// Charts by plotly, in the page's font and colours. A chart's data:
//   series: [{name, x, y, as: 'bars' | 'line' | 'points' | 'band', role: 'rest' | 'kept' | 'second' | index, low, high, size}]
//   xerror: half widths; open: hollow dots; yticks, yticktext: labels of the vertical axis; upright: a line at
//   x = 0; height in pixels.
//   x, y: axis titles; xlog, ylog; yshare: y in percent; diagonal: a line y = x; stack: bars on top of each other.
const layoutOf = (data) => {
  const ink = css('--muted');
  const line = css('--line');
  const axis = (title, more) => ({
    title: { text: plain(title || ''), font: { size: 12.5 }, standoff: 8 },
    gridcolor: line, linecolor: line, zeroline: false, tickfont: { size: 12 }, automargin: true, fixedrange: true, ...more,
  });
  return {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: ink },
    margin: { l: 46, r: 8, t: 8, b: 40 },
    barmode: data.stack ? 'stack' : 'overlay', bargap: 0.06,
    showlegend: data.series.filter((one) => !one.hidden).length > 1,
    legend: { orientation: 'h', x: 0, y: 1.02, xanchor: 'left', yanchor: 'bottom', bgcolor: 'rgba(0,0,0,0)', font: { size: 12.5 } },
    hovermode: data.hover || 'x unified',
    hoverlabel: { bgcolor: css('--paper'), bordercolor: line, font: { color: css('--ink'), size: 12.5 } },
    xaxis: axis(data.x, { showgrid: false, type: data.xlog ? 'log' : undefined, tickvals: data.ticks, ticktext: (data.ticktext || []).map(plain), ...(data.ticks ? {} : { tickvals: undefined, ticktext: undefined }) }),
    yaxis: axis(data.y, { type: data.ylog ? 'log' : undefined, tickformat: data.yshare ? '.0%' : undefined, rangemode: data.zero ? 'tozero' : 'normal', ...(data.yticks ? { tickvals: data.yticks, ticktext: data.yticktext.map(plain), showgrid: false, range: [-0.6, data.yticks.length - 0.4] } : { nticks: 6 }) }),
    shapes: data.upright ? [{ type: 'line', x0: 0, x1: 0, yref: 'paper', y0: 0, y1: 1, layer: 'below', line: { color: css('--muted'), width: 1, dash: 'dot' } }] : data.diagonal ? [{ type: 'line', x0: 0, y0: 0, x1: 1, y1: 1, line: { color: css('--rest'), width: 1, dash: 'dot' } }] : [],
  };
};
const roleColour = (role) => (typeof role === 'number' ? colour(role) : css({ rest: '--rest', kept: '--kept', second: '--second' }[role]));
const faded = (rgb, share) => rgb.startsWith('#')
  ? rgb + Math.round(share * 255).toString(16).padStart(2, '0')
  : rgb.replace('rgb(', 'rgba(').replace(')', `, ${share})`);

const traceOf = (one) => {
  const shade = roleColour(one.role);
  const name = plain(one.name || '');
  if (one.as === 'bars') return [{ type: 'bar', name, x: one.x, y: one.y, width: one.width, marker: { color: shade, line: { width: 0 } }, hovertemplate: one.template }];
  if (one.as === 'points') return [{ type: 'scatter', mode: one.line ? 'lines+markers' : 'markers', name, x: one.x, y: one.y, text: one.text, line: { color: shade, width: 1.5 }, marker: { color: one.open ? one.open.map((open) => (open ? css('--paper') : shade)) : shade, size: one.size || 7, line: { color: shade, width: one.open ? 2 : 0 } }, error_y: one.error ? { type: 'data', symmetric: false, array: one.error[1], arrayminus: one.error[0], color: shade, thickness: 1.2, width: 3 } : undefined, error_x: one.xerror ? { type: 'data', array: one.xerror, color: shade, thickness: 1.4, width: 4 } : undefined, hovertemplate: one.template }];
  if (one.as === 'band') {
    const edge = { type: 'scatter', mode: 'lines', x: one.x, line: { width: 0 }, hoverinfo: 'skip', showlegend: false };
    return [{ ...edge, y: one.low }, { ...edge, y: one.high, fill: 'tonexty', fillcolor: faded(shade, 0.16) }];
  }
  return [{ type: 'scatter', mode: 'lines', name, x: one.x, y: one.y, line: { color: shade, width: one.thin ? 1 : 2, dash: one.dash }, opacity: one.thin ? 0.55 : 1, stackgroup: one.stackgroup, fillcolor: one.stackgroup ? faded(shade, 0.75) : undefined, hovertemplate: one.template }];
};

const drawChart = (name, data) => {
  const place = document.getElementById(name);
  place.querySelector('.wait')?.remove();
  if (data.height) place.style.height = `${data.height}px`;
  return Plotly.react(place, data.series.flatMap(traceOf), layoutOf(data), { displayModeBar: false, responsive: true, ...ALONE });
};
