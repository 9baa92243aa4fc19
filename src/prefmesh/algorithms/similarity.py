"""How alike agents' gradients are, and which groups of agents that shows: pure functions of inner products.

Measured gradients are means over some of an agent's pairs, and chance makes them longer and less alike than what they
estimate. `chance` is what it adds to their squared lengths: the trace of the covariance of one pair's gradient over the
number of pairs (docs/theory, eq. (L.3) of landscape.md).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from scipy.stats import norm

from prefmesh.policies.base import Params

Matrix = Float[np.ndarray, "agents agents"]
Numbers = Float[np.ndarray, " agents"]

REFERENCE_DRAWS = 199
"""Populations without groups that the real one is held against."""
SIGNIFICANCE = 0.05
MOST_GROUPS = 12
MOST_DIMENSIONS = 1000
"""That noise is simulated in."""
LEAST_SHARE = 0.1
"""Of a squared length, that must not be chance."""
BLUR = 2.0
"""Standard errors of a squared distance that count as a distance of nothing."""


def inner_products(gradients: Params) -> Matrix:
    """All <g_i, g_j> of stacked gradients (agents, ...), over all tensors, summed in float64."""
    agents = next(iter(gradients.values())).shape[0]
    total = torch.zeros(agents, agents, dtype=torch.float64)
    for tensor in gradients.values():
        for part in tensor.reshape(agents, -1).split(2**22 // agents + 1, dim=1):
            part = part.double()
            total += (part @ part.T).cpu()
    return total.numpy()


def by_direction(inner: Matrix, groups: int) -> Int[np.ndarray, " agents"]:
    """So many groups (fewer where agents are equal), from 0, by average linkage of directions, given all <g_i, g_j>."""
    if groups == 1:
        return np.zeros(len(inner), dtype=np.int64)
    # What all have in common tells nobody apart.
    centred = inner - inner.mean(0) - inner.mean(1)[:, None] + inner.mean()
    length = np.sqrt(np.maximum(np.diag(centred), np.finfo(float).tiny))
    place = np.linalg.eigh(centred / np.outer(length, length))
    points = place.eigenvectors * np.sqrt(np.clip(place.eigenvalues, 0, None))
    return fcluster(linkage(points, "average"), groups, "maxclust").astype(np.int64) - 1


def told(inner: Matrix, chance: Numbers) -> Bool[np.ndarray, " agents"]:
    """Which gradients have a direction to speak of: chance makes up less than nine tenths of their squared length."""
    return np.diag(inner) - chance > LEAST_SHARE * np.diag(inner)


def cosines(inner: Matrix, chance: Numbers) -> Matrix:
    """Cosines of what the gradients estimate: <g_i, g_j> over lengths that chance has been taken out of.

    (Spearman's correction for attenuation, 1904. An estimate, so it may lie somewhat outside of [-1, 1].) 1 on the
    diagonal; NaN in the rows and columns of agents that are not `told`.
    """
    known = told(inner, chance)
    length = np.sqrt(np.where(known, np.diag(inner) - chance, np.nan))
    found = inner / np.outer(length, length)
    np.fill_diagonal(found, np.where(known, 1.0, np.nan))
    return found


def attenuation(inner: Matrix, chance: Numbers) -> Matrix:
    """The cosine that two agents of one direction would *show*, given their lengths and chance: measured = this x `cosines`."""
    squared = np.diag(inner)
    share = np.sqrt(np.clip(squared - chance, 0, None) / np.where(squared > 0, squared, 1))
    return np.outer(share, share)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which agents belong together.

    `label` of each agent: 0, 1, ... in order of appearance, -1 for one that is not `told`. `silhouette`: the best over all
    numbers of groups from 2 on (NaN for fewer than three agents), believed or not. `p_value`: how often agents without groups
    show one as good, or agents of one direction distances as large, whichever is more.
    """

    label: Int[np.ndarray, " agents"]
    silhouette: float
    p_value: float

    @property
    def count(self) -> int:
        """How many groups; 1 where none stand out."""
        return max(1, int(self.label.max()) + 1)

    @property
    def order(self) -> Int[np.ndarray, " agents"]:
        """Agents, group by group; those that are not told last."""
        return np.argsort(np.where(self.label < 0, self.count, self.label), kind="stable")


def find_groups(inner: Matrix, chance: Numbers, ghosts: Matrix, random: np.random.Generator) -> Groups:
    """Groups of agents by the directions of their gradients: average linkage on squared distances between unit vectors.

    Chance is taken out of the distances. The number of groups is that of the best mean silhouette (Rousseeuw 1987), if that
    is better than in 95 % of populations without groups: as many agents drawn from one Gaussian with the same principal
    variances, seen through as much noise; and if agents differ at all. Otherwise one group. `ghosts`: inner products of
    vectors that are all noise, as large as the gradients' own.
    """
    known = told(inner, chance)
    label = np.where(known, 0, -1)
    agents = int(known.sum())
    if agents < 3:
        return Groups(label=label, silhouette=float("nan"), p_value=1.0)
    cosine = cosines(inner, chance)[np.ix_(known, known)]
    noise = chance[known] / (np.diag(inner) - chance)[known]
    dimensions = _dimensions(chance, ghosts)
    # Two agents of one direction: their squared distance, about 0, has the standard error sqrt(8 / dimensions) noise.
    error = float(noise.mean()) * np.sqrt(8 / dimensions)
    squared = 2 - 2 * cosine
    cut, best = _best_cut(squared, BLUR * error)
    reference = _silhouettes_without_groups(cosine, noise, dimensions, BLUR * error, random)
    unusual = (1 + (reference >= best).sum()) / (1 + REFERENCE_DRAWS)
    # Agents who do not differ at all have no groups: the mean over all of them has an error smaller by sqrt(agents - 1).
    mean = squared[~np.eye(agents, dtype=bool)].mean()
    alike = norm.sf(mean, scale=max(error / np.sqrt(agents - 1), 1e-12))
    p_value = float(max(unusual, alike))
    if p_value <= SIGNIFICANCE:
        label[known] = cut
    return Groups(label=label, silhouette=best, p_value=p_value)


def _dimensions(chance: Numbers, ghosts: Matrix) -> int:
    """In how many directions noise spreads: two such vectors of squared lengths a and b have E <e, e'>^2 = a b / this."""
    apart = ~np.eye(len(ghosts), dtype=bool)
    met = np.square(ghosts)[apart].sum()
    return int(np.clip(np.outer(chance, chance)[apart].sum() / met, 1, MOST_DIMENSIONS)) if met > 0 else 1


def _silhouettes_without_groups(
    cosine: Matrix, noise: Numbers, dimensions: int, blur: float, random: np.random.Generator
) -> Float[np.ndarray, " draws"]:
    """The best silhouettes of populations of one Gaussian. `noise`: squared length of each agent's, its direction's being 1."""
    agents = len(cosine)
    centred = cosine - cosine.mean(0) - cosine.mean(1)[:, None] + cosine.mean()
    scale = np.sqrt(np.clip(np.linalg.eigvalsh(centred), 0, None) / (agents - 1))
    found = np.empty(REFERENCE_DRAWS)
    for draw in range(REFERENCE_DRAWS):
        places = np.zeros((agents, max(agents, dimensions)))
        places[:, :agents] = random.standard_normal((agents, agents)) * scale
        errors = random.standard_normal((agents, dimensions)) * np.sqrt(noise / dimensions)[:, None]
        # The largest variances come last: noise in few dimensions meets these.
        places[:, -dimensions:] += errors
        product = places @ places.T
        squared = np.diag(product) - noise
        found[draw] = _best_cut(squared[:, None] + squared[None, :] - 2 * product, blur)[1]
    return found


def _best_cut(distance: Matrix, blur: float) -> tuple[Int[np.ndarray, " agents"], float]:
    """The cut of the tree with the best mean silhouette, labels in order of appearance. The diagonal is not looked at."""
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    # Estimates of squared distances may be below 0; what is added to all of them does not change the tree.
    tree = linkage(squareform(distance - min(distance.min(), 0.0), checks=False), "average")
    best, score = np.zeros(len(distance), dtype=np.int64), -np.inf
    for count in range(2, min(max(2, len(distance) // 2), MOST_GROUPS) + 1):
        label = fcluster(tree, count, "maxclust")
        if label.max() > 1 and (found := mean_silhouette(distance, label, blur)) > score:
            best, score = label, found
    _, first, inverse = np.unique(best, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse], score


def mean_silhouette(distance: Matrix, label: Int[np.ndarray, " agents"], blur: float = 0.0) -> float:
    """Mean of (b_i - a_i) / (max(a_i, b_i) + blur): a_i the mean distance to one's own group, b_i to the nearest other one.

    `blur`: a distance too small to be told from none, so that differences of that size count little. 0 for an agent that is
    alone in its group.
    """
    member = (label[:, None] == np.unique(label)[None, :]).astype(np.float64)
    size = member.sum(0)
    own = np.argmax(member, axis=1)
    rows = np.arange(len(label))
    total = distance @ member
    a = total[rows, own] / np.maximum(size[own] - 1, 1)
    others = total / size
    others[rows, own] = np.inf
    b = others.min(1)
    widest = np.maximum(np.maximum(a, b), 0) + blur
    counted = (size[own] > 1) & (widest > 0)
    return float(np.where(counted, (b - a) / np.where(counted, widest, 1), 0).mean())
