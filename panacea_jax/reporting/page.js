"use strict";
// Every picture is drawn where its place is, as wide as that; one that fails says so.
const specs = JSON.parse(document.getElementById("specs").textContent);
const options = { ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
const draw = (place) => vegaEmbed(place, specs[place.dataset.chart], options).then(
  () => { place.dataset.drawn = "yes"; },
  (error) => { place.textContent = "This picture could not be drawn."; console.error(place.dataset.chart, error); });
Promise.all(Array.from(document.querySelectorAll(".chart"), draw)).then(() => { document.documentElement.dataset.ready = "yes"; });
