// What a tail shift does to logits, and to the accuracy that was measured. Pure functions.

const NEAR = 1e-6; // of shifts that differ by rounding

/** The log of each class's share of the training images. */
export function logPrior(counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  return counts.map((count) => Math.log(count / total));
}

/** Probabilities of logits - shift * prior: as the service gives them. */
export function probabilities(logits, prior, shift) {
  const moved = shift === 0 ? Array.from(logits) : Array.from(logits, (logit, i) => logit - shift * prior[i]);
  let most = -Infinity;
  for (const value of moved) most = Math.max(most, value);
  let sum = 0;
  const powers = moved.map((value) => {
    const power = Math.exp(value - most);
    sum += power;
    return power;
  });
  return powers.map((power) => power / sum);
}

/** Indices of the k largest values, largest first; of equal ones the first. */
export function topK(values, k) {
  const best = [];
  values.forEach((value, index) => {
    if (best.length === k && !(value > values[best[k - 1]])) return;
    let place = best.length;
    while (place > 0 && value > values[best[place - 1]]) place--;
    best.splice(place, 0, index);
    if (best.length > k) best.pop();
  });
  return best;
}

/**
 * The measured points of a manifest, smallest shift first: [{shift, overall, many, medium, few}].
 * The manifest counts from the network as trained, a client from the shift that the bundle has by default.
 */
export function measuredPoints(manifest) {
  const byDefault = manifest.default_tail_shift ?? 0;
  return Object.entries(manifest.tail_shift ?? {})
    .map(([shift, figures]) => ({ ...figures, shift: Number(shift) - byDefault }))
    .sort((a, b) => a.shift - b.shift);
}

/**
 * What the slider spans: the measured shifts and 0, in whole hundredths so that its steps reach 0; and the words at both ends.
 * Where nothing was measured, 0 to 2.
 */
export function span(points, byDefault) {
  const [low, high] = ends(points);
  const [min, max] = [Math.ceil(100 * low - NEAR) / 100, Math.floor(100 * (points.length ? high : 2) + NEAR) / 100];
  return { min, max, left: min === 0 && byDefault !== 0 ? "as exported" : "as trained", right: max === 0 ? "as exported" : "favours rare classes" };
}

/** The smallest and the largest of the measured shifts and 0. */
export const ends = (points) => [Math.min(0, ...points.map(({ shift }) => shift)), Math.max(0, ...points.map(({ shift }) => shift))];

/** A score at a shift between measured points, by a straight line between its neighbours; null outside of them. */
export function between(points, shift, score) {
  const known = points.filter((point) => point[score] !== null && point[score] !== undefined);
  if (!known.length || shift < known[0].shift - NEAR || shift > known.at(-1).shift + NEAR) return null;
  const after = known.findIndex((point) => point.shift >= shift);
  if (after === 0) return known[0][score];
  if (after < 0) return known[known.length - 1][score];
  const [low, high] = [known[after - 1], known[after]];
  const part = (shift - low.shift) / (high.shift - low.shift);
  return low[score] + part * (high[score] - low[score]);
}
