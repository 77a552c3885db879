"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const armOf = new Map(data.arms.map((arm) => [arm.name, arm]));
  const narrow = matchMedia("(max-width: 40rem)");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const settings = { displayModeBar: false, responsive: true, showTips: false };

  // plotly.js reads a little HTML in its labels; names are shown as they are.
  const plain = (text) =>
    String(text).replace(/[&<>]/g, (letter) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[letter]);
  const short = (text) => (text.length > 28 ? `${text.slice(0, 27)}…` : text);
  const said = (value) => (value === null ? "–" : value.toFixed(3));
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const armColour = (name) => colour(`--arm-${armOf.get(name).colour}`);
  const faded = (hex, opacity) => {
    const part = (i) => parseInt(hex.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  };
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;

  // ---- light and dark -------------------------------------------------------------------------------------------
  const button = document.getElementById("theme");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const showTheme = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    button.setAttribute("aria-pressed", String(isDark()));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try {
      localStorage.setItem("anysize-theme", root.dataset.theme);
    } catch {
      // Without storage the choice lasts as long as the page.
    }
    showTheme();
    drawAll();
  });
  systemDark.addEventListener("change", () => {
    showTheme();
    drawAll();
  });
  showTheme();

  // ---- copying --------------------------------------------------------------------------------------------------
  const copyText = async (pre) => {
    try {
      await navigator.clipboard.writeText(pre.textContent);
    } catch {
      getSelection().selectAllChildren(pre);
      document.execCommand("copy");
    }
  };
  for (const copy of document.querySelectorAll("button.copy")) {
    copy.addEventListener("click", async () => {
      await copyText(copy.previousElementSibling);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1600);
    });
  }

  // ---- charts ---------------------------------------------------------------------------------------------------
  const axis = (title, more) => ({
    title: { text: plain(title), font: { size: 12, color: colour("--muted") }, standoff: 8 },
    color: colour("--muted"),
    gridcolor: colour("--line"),
    linecolor: colour("--strong"),
    zeroline: false,
    tickfont: { size: 11 },
    exponentformat: "none",
    automargin: true,
    ...more,
  });
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink"), size: 12 },
    margin: { l: 8, r: 12, t: 8, b: 8 },
    showlegend: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    hoverlabel: {
      bgcolor: colour("--raised"),
      bordercolor: colour("--strong"),
      font: { color: colour("--ink"), size: 12 },
      namelength: -1,
    },
    ...more,
  });

  // Round values in full: plotly.js writes only a small 2 or 5 between powers of ten.
  const logTicks = ([least, most]) => {
    const [first, last] = [Math.floor(Math.log10(least)), Math.ceil(Math.log10(most))];
    const digits = last - first > (narrow.matches ? 2 : 5) ? [1] : [1, 2, 5];
    const powers = Array.from({ length: last - first + 1 }, (_, i) => first + i);
    const values = powers.flatMap((power) => digits.map((digit) => Number(`${digit}e${power}`)));
    const units = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const text = (value) => {
      const [size, unit] = units.find(([one]) => value >= one) ?? [1, ""];
      return `${Number((value / size).toPrecision(6))}${unit}`;
    };
    return { tickvals: values, ticktext: values.map(text) };
  };

  const labels = { steps: "steps", tokens: data.counted, seconds: "seconds, calibration and conversion included" };

  const drawCurves = () => {
    const place = document.getElementById("chart-curves");
    if (!place) return;
    const [x, xScale, yScale] = [chosen("x"), chosen("xscale"), chosen("yscale")];
    const bits = chosen("unit") === "bits";
    const factor = bits ? data.metric.bits_per_byte : 1;
    const unit = bits ? "bits/byte" : data.metric.unit;
    const hidden = new Set([...document.querySelectorAll(".toggle:not(:checked)")].map((box) => box.dataset.arm));
    const traces = [];
    const ends = [];
    for (const curve of data.curves) {
      if (hidden.has(curve.arm)) continue;
      const kept = curve[x].map((_, i) => i).filter((i) => xScale === "linear" || curve[x][i] > 0);
      const at = kept.map((i) => curve[x][i]);
      const [middle, low, high] = ["median", "low", "high"].map((key) => kept.map((i) => curve[key][i] * factor));
      const name = plain(short(curve.arm));
      ends.push(...at);
      if (curve.seeds > 1) {
        traces.push({
          x: [...at, ...at.slice().reverse()],
          y: [...high, ...low.slice().reverse()],
          fill: "toself",
          fillcolor: faded(armColour(curve.arm), 0.18),
          line: { width: 0, color: armColour(curve.arm) },
          mode: "lines",
          hoverinfo: "skip",
        });
      }
      const band = (i) => (curve.seeds > 1 ? ` (${low[i].toFixed(3)} to ${high[i].toFixed(3)})` : "");
      traces.push({
        x: at,
        y: middle,
        name,
        mode: at.length > 1 ? "lines" : "markers",
        line: { color: armColour(curve.arm), width: 2.2, dash: armOf.get(curve.arm).dash },
        text: middle.map((value, i) => `${name}  ${value.toFixed(3)}${band(i)}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const span = ends.length ? [ends.reduce((a, b) => Math.min(a, b)), ends.reduce((a, b) => Math.max(a, b))] : [1, 2];
    const across = (value, line) => ({
      x: span,
      y: [value * factor, value * factor],
      mode: "lines",
      line,
      hoverinfo: "skip",
    });
    for (const goal of data.goals) {
      traces.push(across(goal.value, { color: armColour(goal.arm), width: 1.3, dash: "dash" }));
    }
    if (data.source !== null) traces.push(across(data.source, { color: colour("--ink"), width: 1.3, dash: "dot" }));
    const ticks = xScale === "log" ? logTicks(span) : { nticks: narrow.matches ? 5 : 10 };
    Plotly.react(
      place,
      traces,
      layout({
        hovermode: "x unified",
        xaxis: axis(labels[x], {
          type: xScale,
          exponentformat: "SI",
          unifiedhovertitle: { text: `%{x:,.4~r} ${x === "tokens" ? data.counted : x}` },
          spikethickness: 1,
          spikedash: "solid",
          spikecolor: colour("--strong"),
          ...ticks,
        }),
        yaxis: axis(`held-out ${data.metric.name}, ${unit}`, { type: yScale, nticks: 8 }),
        uirevision: [x, xScale, yScale, bits].join(),
      }),
      settings,
    );
  };

  const drawRates = () => {
    const place = document.getElementById("chart-rates");
    if (!place) return;
    const values = data.trials.map((trial) => trial.value).filter((value) => value !== null);
    const least = values.reduce((a, b) => Math.min(a, b), Infinity);
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const step = values.length ? Math.max((most - least) * 0.09, 1e-3) : 1;
    const top = values.length ? most + step : 1;
    const traces = [];
    for (const arm of data.arms) {
      const mine = data.trials.filter((trial) => trial.arm === arm.name && (trial.value !== null || trial.status === "diverged"));
      if (!mine.length) continue;
      const ended = mine.filter((trial) => trial.status === "finished");
      const tint = armColour(arm.name);
      traces.push({
        x: ended.map((trial) => trial.rate),
        y: ended.map((trial) => trial.value),
        mode: "lines",
        line: { color: tint, width: 2, dash: arm.dash },
        hoverinfo: "skip",
      });
      const status = {
        finished: (trial) => `${said(trial.value)}${trial.best ? ", chosen" : ""}`,
        trial: (trial) => `${said(trial.value)} in a trial of ${trial.steps} steps`,
        diverged: (trial) => `diverged after step ${trial.steps}`,
      };
      const symbols = { finished: "circle", trial: "triangle-up-open", diverged: "x-thin" };
      traces.push({
        x: mine.map((trial) => trial.rate),
        y: mine.map((trial) => (trial.status === "diverged" ? top : trial.value)),
        mode: "markers",
        marker: {
          color: tint,
          opacity: 1,
          symbol: mine.map((trial) => symbols[trial.status]),
          size: mine.map((trial) => (trial.best ? 13 : 8)),
          line: { color: tint, width: mine.map((trial) => (trial.status === "finished" ? 0 : 2)) },
        },
        text: mine.map((trial) => `${plain(short(arm.name))} at ${trial.rate}<br>${status[trial.status](trial)}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const rates = [...new Set(data.trials.map((trial) => trial.rate))].filter((rate) => rate > 0).sort((a, b) => a - b);
    const shown = { tickvals: rates, ticktext: rates.map(String) };
    Plotly.react(
      place,
      traces,
      layout({
        hovermode: "closest",
        xaxis: axis("learning rate", { type: "log", ...shown }),
        yaxis: axis(`last validation ${data.metric.name}, ${data.metric.unit}`, { nticks: 7 }),
      }),
      settings,
    );
  };

  const cellText = (strip, row, column) => {
    const where = strip.rows[row] ? `${plain(short(strip.rows[row]))}, ` : "";
    const first = column * strip.width;
    if (strip.kind === "direction") return `group ${row} of directions, part ${column} of the stream`;
    const which = strip.width > 1 ? `${first} to ${first + strip.width - 1}` : first;
    const value = strip.cells[row][column];
    const state = value === 0 ? "dropped" : value === 1 ? "kept" : `${Math.round(value * 100)} % kept`;
    return `${where}${plain(strip.kind)} ${which}: ${state}`;
  };

  const drawStrips = (holder) => {
    const tint = armColour(data.arms[Number(holder.dataset.place)].name);
    const found = data.strips[holder.dataset.place] ?? [];
    if (!holder.children.length) {
      for (const strip of found) {
        const figure = document.createElement("figure");
        const caption = document.createElement("figcaption");
        const title = document.createElement("b");
        const chart = document.createElement("div");
        title.textContent = strip.title;
        caption.append(title, ` ${strip.summary}`);
        figure.className = "strip";
        chart.setAttribute("role", "img");
        chart.setAttribute("aria-label", `${strip.title}: ${strip.summary}`);
        figure.append(caption, chart);
        holder.append(figure);
      }
    }
    found.forEach((strip, i) => {
      const few = strip.cells.length <= 16;
      const height = Math.max(22, Math.min(320, strip.cells.length * (few ? 16 : 7)));
      const columns = strip.cells[0].length;
      const chart = holder.children[i].lastElementChild;
      chart.style.height = `${height}px`;
      Plotly.react(
        chart,
        [
          {
            type: "heatmap",
            z: strip.cells,
            zmin: 0,
            zmax: 1,
            xgap: columns <= 64 ? 1 : 0,
            ygap: few ? 1 : 0,
            showscale: false,
            colorscale: [[0, colour("--empty")], [1, tint]],
            text: strip.cells.map((row, r) => row.map((_, c) => cellText(strip, r, c))),
            hovertemplate: "%{text}<extra></extra>",
          },
        ],
        layout({
          margin: { l: 0, r: 0, t: 0, b: 0 },
          dragmode: false,
          xaxis: { visible: false, fixedrange: true },
          yaxis: { visible: false, fixedrange: true, autorange: "reversed" },
        }),
        settings,
      );
    });
  };

  const drawAll = () => {
    if (!window.Plotly) return;
    drawCurves();
    drawRates();
    for (const holder of document.querySelectorAll("details[open] .strips")) drawStrips(holder);
  };

  // Steps are told apart on a logarithmic axis, what comes before training on a linear one, until someone chooses.
  let scaleChosen = false;
  for (const input of document.querySelectorAll(".controls input, .toggle")) {
    input.addEventListener("change", () => {
      if (input.name === "xscale") scaleChosen = true;
      if (input.name === "x" && !scaleChosen) {
        const scale = input.value === "seconds" ? "linear" : "log";
        document.querySelector(`input[name="xscale"][value="${scale}"]`).checked = true;
      }
      drawCurves();
    });
  }
  for (const details of document.querySelectorAll("details[data-place]")) {
    details.addEventListener("toggle", () => {
      const holder = details.querySelector(".strips");
      if (details.open && holder && window.Plotly) drawStrips(holder);
    });
  }
  // On paper everything is open and light, whatever the screen shows.
  let before = null;
  let opened = [];
  addEventListener("beforeprint", () => {
    before = root.dataset.theme ?? "";
    root.dataset.theme = "light";
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
    drawAll();
  });
  addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before;
    else delete root.dataset.theme;
    for (const details of opened) details.open = false;
    drawAll();
  });

  const start = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    drawAll();
    root.dataset.ready = "yes";
  };
  // An old browser cannot unpack the charts: it shows the still figures instead.
  start().catch((error) => {
    console.error(error);
    root.classList.add("failed");
  });
})();
