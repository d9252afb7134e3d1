"use strict";
const all = (what, where = document) => [...where.querySelectorAll(what)];
const ago = new Intl.RelativeTimeFormat(undefined, {numeric: "auto"});
for (const time of all("time")) {
const text = time.dateTime || time.textContent, date = new Date(text.replace(" ", "T"));
if (isNaN(date)) continue;
time.dateTime = date.toISOString();
time.title = date.toLocaleString();
const minutes = (date - Date.now()) / 60000, size = Math.abs(minutes);
time.textContent = size < 60 ? ago.format(Math.round(minutes), "minute") : size < 1440 ? ago.format(Math.round(minutes / 60), "hour")
: size < 43200 ? ago.format(Math.round(minutes / 1440), "day") : date.toLocaleDateString(undefined, {dateStyle: "medium"});
}
const copy = (text, button) => navigator.clipboard ? navigator.clipboard.writeText(text).then(() => { const before = button.textContent; button.textContent = "Copied"; setTimeout(() => { button.textContent = before; }, 2000); }) : prompt("Copy:", text);
for (const button of all("[data-copy]")) {
button.hidden = false;
button.onclick = () => copy(new URL(button.dataset.copy, location).href, button);
}
const rows = all("tbody tr"), field = document.querySelector("[name=q]"), bar = document.querySelector(".bar");
if (field) field.oninput = () => {
const text = field.value.trim().toLowerCase();
for (const row of rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(text);
};
for (const row of rows) {
const cell = row.cells[3], type = cell.textContent.trim(), href = row.cells[0].firstChild.getAttribute("href");
if (/\?view/.test(href) || !/^(image|video|audio|text|pdf|json|xml)$/.test(type)) continue;
const link = document.createElement("a");
link.href = href.replace(/\?|$/, (mark) => "?view" + (mark && "&"));
link.textContent = type;
link.ariaLabel = "View " + row.cells[0].textContent;
cell.replaceChildren(link);
}
if (bar && rows.length) {
const boxes = [], [count, button, zip] = bar.children;
let last = 0;
const show = () => {
const chosen = boxes.filter((box) => box.checked);
bar.hidden = !chosen.length;
count.textContent = chosen.length + " selected";
return chosen.map((box) => box.nextElementSibling);
};
rows.forEach((row, index) => {
const box = document.createElement("input"), link = row.cells[0].firstChild;
box.type = "checkbox";
box.ariaLabel = "Select " + link.textContent;
box.onclick = (event) => {
if (event.shiftKey) for (let i = Math.min(index, last); i <= Math.max(index, last); i++) if (!rows[i].hidden) boxes[i].checked = box.checked;
last = index;
show();
};
box.onkeydown = (event) => {
const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
let next = index + step;
while (rows[next]?.hidden) next += step;
if (!rows[next]) return;
event.preventDefault();
boxes[next].focus();
if (!event.shiftKey) return;
box.checked = boxes[next].checked = true;
last = next;
show();
};
boxes.push(box);
row.cells[0].prepend(box);
});
button.onclick = () => copy(show().map((link) => link.href).join("\n"), button);
const whole = !document.querySelector("main .pages") && !new URLSearchParams(location.search).get("q");
if (zip) zip.onclick = () => {
const chosen = show();
location = zip.dataset.archive + (whole && chosen.length === rows.length ? "" : chosen.map((link) => "&name=" + encodeURIComponent(decodeURIComponent(link.getAttribute("href").replace(/\?.*/, "").replace(/^\.\//, "").replace(/\/$/, "")))).join(""));
};
onpageshow = show;
}
