'use strict';
const SVG = document.createRange().createContextualFragment('<svg></svg>').firstChild.namespaceURI;
const make = (name, attributes = {}, ...children) => {
  const drawn = name.startsWith('svg:');
  const element = drawn ? document.createElementNS(SVG, name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) element[key] = value;
    else if (value !== null && value !== false) element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...children);
  return element;
};
const data = element => JSON.parse(element.querySelector('script[type="application/json"]').textContent);
const number = (value, digits = 4) => {
  if (!Number.isFinite(value)) return '–';
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return size >= 1000 ? Math.round(value).toLocaleString('en') : String(+value.toPrecision(digits));
};
const duration = seconds => {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.round(seconds % 60)} s` : `${number(seconds, 3)} s`;
};

// Tables sort by a click on their head.
const value = (row, place) => {
  const text = row.cells[place].textContent, found = parseFloat(text.replaceAll(',', ''));
  return isNaN(found) ? text : found;
};
const compare = (x, y) => typeof x === typeof y && typeof x === 'number' ? x - y : String(x).localeCompare(String(y));
document.querySelectorAll('.scroll thead th').forEach(head => { head.onclick = () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up = head.dataset.up ? '' : '1';
  const rows = [...body.rows].sort((a, b) => compare(value(a, head.cellIndex), value(b, head.cellIndex)));
  body.append(...(up ? rows : rows.reverse()));
}; });

// A confusion matrix: cells of some classes with names and numbers; of many classes also a map of all.
const confusion = root => {
  const { names, support, cells, order, shown, limit, balanced, pictures } = data(root);
  const rows = names.map(() => new Map());
  for (let i = 0; i < cells.length; i += 3) rows[cells[i]].set(cells[i + 1], cells[i + 2]);
  const count = (actual, guess) => rows[actual].get(guess) || 0;
  const percent = (actual, guess) => 100 * count(actual, guess) / Math.max(support[actual], 1);
  const many = names.length > shown.length, found = make('div', { class: 'found' });
  const most = { right: 1, wrong: 1 };
  rows.forEach((row, actual) => row.forEach((images, guess) => {
    const kind = actual === guess ? 'right' : 'wrong';
    most[kind] = Math.max(most[kind], images);
  }));
  const share = (actual, guess) => {
    const images = count(actual, guess);
    return actual === guess ? images / most.right : Math.pow(images / most.wrong, 0.6);
  };
  const describe = (actual, guess) => `true ${names[actual]}, predicted ${names[guess]}: `
    + `${count(actual, guess).toLocaleString('en')} of ${support[actual].toLocaleString('en')} images `
    + `(${percent(actual, guess).toFixed(1)} %)`;

  const show = (actual, guess) => {
    const known = pictures[`${actual},${guess}`] || [], kind = actual === guess ? 'right' : 'wrong';
    const rest = count(actual, guess) - known.length, seen = known.filter(one => one[2]);
    const order = actual === guess ? 'least confident first' : 'most confident first';
    const cards = seen.map(([file, score, source, factor, width]) => {
      const size = factor > 1 ? { class: 'tiny', width: factor * width } : {};
      const image = make('img', { src: source, alt: file, title: file, ...size });
      return make('div', { class: `sample ${kind}` }, make('div', { class: 'picture' }, image),
        make('div', { class: 'name' }, make('span', { title: file }, file), make('span', {}, `${score.toFixed(1)} %`)));
    });
    const files = known.filter(one => !one[2]).map(one => make('li', {}, `${one[0]}  (${one[1].toFixed(1)} %)`));
    found.replaceChildren(make('h3', {}, describe(actual, guess)));
    if (cards.length) found.append(make('p', {}, order), make('div', { class: 'samples' }, ...cards));
    if (files.length) found.append(make('ul', {}, ...files));
    if (rest) found.append(make('p', {}, `${rest.toLocaleString('en')} more: predictions.csv lists every image.`));
  };

  let classes = shown, percents = false;
  const holder = make('div', { class: `scroll ${shown.length <= 12 ? 'large' : ''}`, style: 'max-height:none' });
  const draw = () => {
    const head = make('tr', {}, make('th', {}, make('span', { style: 'transform:none;writing-mode:initial' }, 'true \\ predicted')));
    classes.forEach(guess => head.append(make('th', { title: names[guess] }, make('span', {}, names[guess]))));
    if (many) head.append(make('th', {}, make('span', {}, 'other classes')));
    const body = make('tbody');
    for (const actual of classes) {
      const row = make('tr', {}, make('th', { title: names[actual] }, names[actual]));
      let rest = support[actual];
      for (const guess of classes) {
        const images = count(actual, guess), part = share(actual, guess);
        const text = !images ? '' : percents ? percent(actual, guess).toFixed(percent(actual, guess) < 9.95 ? 1 : 0) : images;
        const colour = `color-mix(in srgb, var(--${actual === guess ? 'right' : 'wrong'}) ${Math.round(14 + 86 * part)}%, #fff)`;
        const cell = make('td', { class: `cell ${images ? `full ${part > 0.7 ? 'dark' : 'light'}` : ''}`, tabindex: images ? 0 : null,
          title: describe(actual, guess), style: images ? `background:${colour}` : null }, String(text));
        if (images) cell.onclick = () => {
          root.querySelectorAll('.chosen').forEach(old => old.classList.remove('chosen'));
          cell.classList.add('chosen');
          show(actual, guess);
        };
        cell.onkeydown = event => event.key === 'Enter' && cell.onclick && cell.onclick();
        rest -= images;
        row.append(cell);
      }
      if (many) row.append(make('td', { class: 'rest' }, percents ? `${(100 * rest / Math.max(support[actual], 1)).toFixed(1)}` : String(rest)));
      body.append(row);
    }
    holder.replaceChildren(make('table', { class: 'matrix' }, make('thead', {}, head), body));
  };
  // The class and those that it is confused with, both ways, in the order of the map.
  const around = chosen => {
    const both = new Map();
    names.forEach((_, other) => {
      const sum = chosen.reduce((total, one) => total + count(one, other) + count(other, one), 0);
      if (sum && !chosen.includes(other)) both.set(other, sum);
    });
    const nearest = [...both].sort((a, b) => b[1] - a[1]).slice(0, limit - chosen.length).map(pair => pair[0]);
    classes = [...new Set([...chosen, ...nearest])].sort((a, b) => place[a] - place[b]);
    draw();
  };
  const place = [];
  order.forEach((one, position) => { place[one] = position; });

  const tools = make('div', { class: 'tools' });
  if (!balanced) tools.append(make('label', {}, make('input', { type: 'checkbox', onchange: event => {
    percents = event.target.checked;
    draw();
  } }), ' percent of each true class'));
  const parts = make('div', { class: `confusion ${many ? 'both' : ''}` });
  if (many) {
    const list = make('datalist', { id: 'classes-of-matrix' }, ...names.map(name => make('option', { value: name })));
    const input = make('input', { list: 'classes-of-matrix', placeholder: 'name of a class', 'aria-label': 'class', onchange: () => {
      const one = names.indexOf(input.value);
      if (one >= 0) around([one]);
    } });
    const back = make('button', { type: 'button', onclick: () => { classes = shown; input.value = ''; draw(); } }, 'most confused');
    tools.append(make('span', {}, 'show ', input, list), back);
    parts.append(map());
  }
  parts.append(holder);
  root.append(tools, parts, found);
  draw();

  function map() {
    const readout = make('div', { class: 'readout' }, 'Point at the map: what is there. Click: its pictures, and the classes around it.');
    const canvas = make('canvas'), box = make('div', {}, canvas, readout), total = names.length;
    let left = 0, side = 0;
    const paint = () => {
      const style = getComputedStyle(root), width = box.clientWidth, dense = window.devicePixelRatio || 1;
      left = Math.min(150, Math.round(width * 0.3));
      side = width - left;
      canvas.width = width * dense;
      canvas.height = side * dense;
      canvas.style.height = `${side}px`;
      const pen = canvas.getContext('2d'), step = side / total;
      pen.scale(dense, dense);
      pen.fillStyle = style.getPropertyValue('--ground');
      pen.fillRect(left, 0, side, side);
      const dots = [];
      rows.forEach((row, actual) => row.forEach((images, guess) => dots.push([actual === guess ? 2 : share(actual, guess), actual, guess])));
      for (const [part, actual, guess] of dots.sort((a, b) => a[0] - b[0])) {
        const wrong = actual !== guess, size = Math.max(step, wrong ? 2 : 1.6);
        pen.globalAlpha = wrong ? 0.25 + 0.75 * part : 0.25 + 0.75 * share(actual, guess);
        pen.fillStyle = style.getPropertyValue(wrong ? '--wrong' : '--right');
        pen.fillRect(left + (place[guess] + 0.5) * step - size / 2, (place[actual] + 0.5) * step - size / 2, size, size);
      }
      pen.globalAlpha = 1;
      pen.fillStyle = style.getPropertyValue('--soft');
      pen.font = '11px system-ui, sans-serif';
      pen.textAlign = 'right';
      pen.textBaseline = 'middle';
      const every = Math.max(1, Math.ceil(14 / step));
      for (let row = Math.floor(every / 2); row < total; row += every) {
        let text = names[order[row]];
        while (text.length > 2 && pen.measureText(text).width > left - 8) text = `${text.slice(0, -2)}…`;
        pen.fillText(text, left - 6, (row + 0.5) * step);
      }
    };
    // The fullest cell within four pixels.
    const at = event => {
      const corner = canvas.getBoundingClientRect(), step = side / total, reach = Math.ceil(4 / step);
      const [column, row] = [event.clientX - corner.left - left, event.clientY - corner.top].map(x => Math.floor(x / step));
      let best = null;
      for (let i = Math.max(0, row - reach); i <= Math.min(total - 1, row + reach); i++) {
        for (let j = Math.max(0, column - reach); j <= Math.min(total - 1, column + reach); j++) {
          const exact = i === row && j === column, found = count(order[i], order[j]) ? (i === j ? 0.5 : 1) + (exact ? 2 : 0) : 0;
          if (found && (!best || found > best[0])) best = [found, order[i], order[j]];
        }
      }
      return best && best.slice(1);
    };
    canvas.onpointermove = event => { const cell = at(event); readout.textContent = cell ? describe(...cell) : ''; };
    canvas.onclick = event => { const cell = at(event); if (cell) { around([...new Set(cell)]); show(...cell); } };
    new ResizeObserver(paint).observe(box);
    return box;
  }
};
document.querySelectorAll('.confusion-data').forEach(confusion);

// Curves: panels of lines over epochs or hours; pointing at one shows its numbers.
const ticks = (low, high, wanted) => {
  const raw = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= raw), found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
};
const charts = root => {
  const { panels, axis, common } = data(root), hidden = new Set();
  let timed = false;
  const grid = make('div', { class: 'charts' }), tools = make('div', { class: 'tools' });
  const legend = lines => make('div', { class: 'legend' }, ...lines.map(line => make('button', {
    type: 'button', class: hidden.has(line.name) ? 'off' : '', title: 'show or hide', onclick: () => {
      hidden.has(line.name) ? hidden.delete(line.name) : hidden.add(line.name);
      draw();
    } }, make('i', { style: `background:${line.colour}` }), line.name)));
  const draw = () => {
    if (common) {
      const every = new Map(panels.flatMap(panel => panel.lines).map(line => [line.name, line]));
      tools.querySelector('.legend')?.remove();
      tools.append(legend([...every.values()]));
    }
    grid.replaceChildren(...panels.map(panel));
  };
  const panel = ({ title, lines, range }) => {
    const width = 360, height = 220, box = { left: 46, right: 350, top: 8, bottom: 190 };
    const drawn = lines.filter(line => !hidden.has(line.name) && (!timed || line.time));
    const across = line => timed ? line.time.map(seconds => seconds / 3600) : line.x;
    const xs = drawn.flatMap(across), ys = drawn.flatMap(line => line.y).filter(Number.isFinite);
    const span = (values, part) => {
      if (!values.length) return [0, 1];
      const [low, high] = [Math.min(...values), Math.max(...values)], more = (high - low) * part || Math.abs(low) * 0.1 || 1;
      return high > low || part ? [low - more * (part ? 1 : 0), high + more * (part ? 1 : 0)] : [low - 0.5, high + 0.5];
    };
    const [x0, x1] = range ? range[0] : span(xs, 0), [y0, highest] = range ? range[1] : span(ys, 0.05);
    const y1 = title.includes('(%)') ? Math.min(highest, 100) : highest;
    const left = x => box.left + (x - x0) / (x1 - x0) * (box.right - box.left);
    const top = y => box.bottom - (y - y0) / (y1 - y0) * (box.bottom - box.top);
    const picture = make('svg:svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': title });
    for (const y of ticks(y0, y1, 5)) {
      picture.append(make('svg:line', { class: 'grid', x1: box.left, x2: box.right, y1: top(y), y2: top(y) }),
        make('svg:text', { x: box.left - 5, y: top(y) + 4, 'text-anchor': 'end' }, number(y, 3)));
    }
    const whole = !timed && axis === 'epoch';
    for (const x of ticks(x0, x1, 6).filter(x => !whole || Number.isInteger(x))) {
      picture.append(make('svg:text', { x: left(x), y: box.bottom + 15, 'text-anchor': 'middle' }, number(x, 3)));
    }
    picture.append(make('svg:text', { x: (box.left + box.right) / 2, y: box.bottom + 29, 'text-anchor': 'middle' }, timed ? 'hours' : axis));
    for (const line of drawn) {
      const points = across(line).map((x, i) => [left(x), top(line.y[i]), i]).filter(([, , i]) => Number.isFinite(line.y[i]));
      picture.append(make('svg:path', { class: 'curve', style: `stroke:${line.colour}`, 'stroke-dasharray': line.dashed ? '5 4' : null,
        d: points.map(([x, y], i) => `${i ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('') }));
      if (line.bare || points.length > 30) continue;
      points.forEach(([x, y, i]) => picture.append(make('svg:circle', { cx: x, cy: y, r: line.radius ? line.radius[i] : 2.2,
        style: `fill:${line.colour}`, 'fill-opacity': line.radius ? 0.55 : 1 })));
    }
    const cross = make('svg:line', { class: 'cross', y1: box.top, y2: box.bottom, visibility: 'hidden' });
    const readout = make('div', { class: 'readout' });
    picture.append(cross);
    picture.onpointermove = event => {
      const corner = picture.getBoundingClientRect(), pointer = (event.clientX - corner.left) * width / corner.width;
      const near = drawn.filter(line => !line.bare).map(line => {
        const xs = across(line), best = xs.map((x, i) => [Math.abs(left(x) - pointer), i]).sort((a, b) => a[0] - b[0])[0];
        return best && [line, best[1], best[0], xs[best[1]]];
      }).filter(Boolean);
      if (!near.length) return;
      const closest = near.reduce((a, b) => b[2] < a[2] ? b : a);
      cross.setAttribute('x1', left(closest[3]));
      cross.setAttribute('x2', left(closest[3]));
      cross.setAttribute('visibility', 'visible');
      const same = near.filter(one => Math.abs(one[2] - closest[2]) < 3), [first, index] = closest;
      const when = first.time && Number.isFinite(first.time[index]) ? ` (${duration(first.time[index])})` : '';
      const what = ([line, i]) => `${drawn.length > 1 || common ? `${line.name} ` : ''}${number(line.y[i])}${line.note ? ` (${line.note[i]})` : ''}`;
      const start = `${axis} ${number(first.x[index])}${when}: `;
      if (!common) { readout.textContent = start + same.map(what).join(', '); return; }
      const rows = same.map(one => make('div', {}, make('i', { style: `background:${one[0].colour}` }), what(one)));
      readout.replaceChildren(start, ...rows);
    };
    picture.onpointerleave = () => cross.setAttribute('visibility', 'hidden');
    return make('div', { class: 'card chart' }, make('h3', {}, title), ...(common || lines.length < 2 ? [] : [legend(lines)]), picture, readout);
  };
  if (panels.some(({ lines }) => lines.some(line => line.time))) {
    for (const [name, chosen] of [['over epochs', false], ['over time', true]]) {
      tools.append(make('label', {}, make('input', { type: 'radio', name: 'across', checked: !chosen, onchange: () => {
        timed = chosen;
        draw();
      } }), ` ${name}`));
    }
  }
  draw();
  root.append(...(tools.childElementCount ? [tools] : []), grid);
};
document.querySelectorAll('.charts-data').forEach(charts);
