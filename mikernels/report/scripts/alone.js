// Cards of a page that holds their values itself, and histograms of those that are in its text.
const drawn = JSON.parse(document.getElementById("drawn").textContent);
for (const feature of drawn.features) {
  const href = drawn.folder ? number => `${drawn.folder}#f${number}` : null;
  const place = document.querySelector(".features");
  place.append(card(feature, drawn.words, { id: `f${feature.number}`, href }));
}
for (const place of document.querySelectorAll("[data-bins]")) {
  place.replaceWith(sparkline(JSON.parse(place.dataset.bins)));
}
hints();
