// Rows to read. Data:
//   views: [{key, name, about, rows: [{row, name, place, question, answer, cut, score, rank, kept, domain, labels, tokens, reason}]}];
//   domains: [..]; a missing key is one that the run does not have.
class Explorer {
  constructor(name, data) {
    this.data = data;
    this.box = document.querySelector(`[data-explorer="${CSS.escape(name)}"]`);
    this.view = data.views[0];
    this.words = '';
    this.domain = '';
    this.kept = '';
    this.kind = '';
    this.shown = 20;
    this.controls();
    this.status = make('p', 'status');
    this.status.setAttribute('role', 'status');
    this.list = make('div', 'list');
    this.next = make('button', '', 'Show more rows');
    this.next.type = 'button';
    this.next.addEventListener('click', () => { this.shown += 40; this.draw(); });
    this.box.append(this.status, this.list, this.next);
    this.draw();
  }

  controls() {
    const bar = make('div', 'controls');
    const grow = make('label', 'grow', 'Search');
    const search = make('input');
    search.type = 'search';
    search.placeholder = 'words in the rows shown here';
    search.addEventListener('input', () => { this.words = search.value.toLowerCase().trim(); this.shown = 20; this.draw(); });
    grow.append(search);
    const set = (key) => (value) => { this[key] = value; this.shown = 20; this.draw(); };
    const views = this.data.views.map((one) => [one.key, `${one.name} (${integer.format(one.rows.length)})`]);
    const [which] = choose('Rows', [...views, ['*', 'all of these']], (value) => {
      this.view = this.data.views.find((one) => one.key === value) || this.everything();
      this.shown = 20;
      this.draw();
    });
    bar.append(grow, which);
    if (this.data.domains.length) {
      bar.append(choose(this.data.by || 'Pseudo-domain', [['', 'all'], ...this.data.domains.map((name) => [name, name])], set('domain'))[0]);
    }
    if (this.data.choice) bar.append(choose(this.data.choice[0], [['', 'both'], ['yes', this.data.choice[1]], ['no', this.data.choice[2]]], set('kept'))[0]);
    const kinds = [...new Set(this.everything().rows.map((row) => this.reason(row)).filter(Boolean))].sort();
    if (kinds.length) bar.append(choose('Reason', [['', 'any'], ...kinds.map((kind) => [kind, kind])], set('kind'))[0]);
    this.box.append(bar);
  }

  everything() {
    const seen = new Map();
    for (const view of this.data.views) for (const row of view.rows) if (!seen.has(row.row)) seen.set(row.row, row);
    return { key: '*', name: 'all', about: 'All rows on this page.', rows: [...seen.values()] };
  }

  reason(row) { return row.reason ? row.reason.split(':')[0] : ''; }

  fits(row) {
    if (this.domain && row.domain !== this.domain) return false;
    if (this.kept && row.kept !== (this.kept === 'yes')) return false;
    if (this.kind && this.reason(row) !== this.kind) return false;
    if (!this.words) return true;
    const text = `${row.question || ''}\n${row.answer || ''}\n${row.reason || ''}\n${row.place || ''}`.toLowerCase();
    return this.words.split(/\s+/).every((word) => text.includes(word));
  }

  draw() {
    const matching = this.view.rows.filter((row) => this.fits(row));
    const shown = matching.slice(0, this.shown);
    this.status.textContent = `${this.view.about} ${matching.length === this.view.rows.length ? '' : `${integer.format(matching.length)} of ${integer.format(this.view.rows.length)} match.`}`;
    this.list.replaceChildren(...shown.map((row) => this.article(row)));
    if (!shown.length) this.list.append(make('p', 'note', 'No row matches; change the search or the filters.'));
    this.next.hidden = matching.length <= shown.length;
  }

  article(row) {
    const box = make('article');
    const meta = make('div', 'meta');
    meta.append(make('strong', '', row.name || `row ${integer.format(row.row)}`));
    if (row.kept !== undefined && row.kept !== null && !row.reason) meta.append(make('span', row.kept ? 'badge kept' : 'badge', row.kept ? this.data.choice[1] : this.data.choice[2]));
    if (row.reason) meta.append(make('span', 'badge out', 'left out'));
    if (row.domain) meta.append(make('span', '', row.domain));
    for (const label of row.labels || []) meta.append(make('span', '', label));
    if (row.score !== undefined && row.score !== null) meta.append(make('span', '', `score ${number.format(row.score)}`));
    if (row.rank) meta.append(make('span', '', `rank ${integer.format(row.rank)}`));
    if (row.tokens) meta.append(make('span', '', `${integer.format(row.tokens)} tokens`));
    for (const fact of row.facts || []) meta.append(make('span', '', fact));
    if (row.place) meta.append(make('span', '', row.place));
    box.append(meta);
    if (row.reason) box.append(make('p', 'why', row.reason));
    const texts = [];
    if (row.question) texts.push(make('p', 'text short', row.question));
    if (row.answer) texts.push(make('p', 'text answer short', row.answer));
    box.append(...texts);
    if ((row.question || '').length + (row.answer || '').length > 600 || (row.question || '').split('\n').length > 5 || (row.answer || '').split('\n').length > 5) box.append(this.unfold(texts));
    if (row.cut) box.append(make('p', 'note', `${integer.format(row.cut)} more characters are not on this page.`));
    return box;
  }

  unfold(texts) {
    const button = make('button', 'more', 'Show all');
    button.type = 'button';
    button.setAttribute('aria-expanded', 'false');
    button.addEventListener('click', () => {
      const open = button.getAttribute('aria-expanded') === 'false';
      button.setAttribute('aria-expanded', String(open));
      button.textContent = open ? 'Show less' : 'Show all';
      for (const text of texts) text.classList.toggle('short', !open);
    });
    return button;
  }
}
