"""Classification by frozen features without training: weighted nearest neighbours and ridge regression.

On the host, in NumPy: 10,000 x 10,000 features of width 128 take a second or two. Shapes: N training examples, M
examples to classify, D width, Y classes, k neighbours.
"""

import numpy as np

_CHUNK = 1024  # rows of similarities that exist at once


def neighbours(features: np.ndarray, queries: np.ndarray | None = None, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k features most similar to each query, as of images that `Encoder.features` describes.

    Args:
      features: (N, D).
      queries: (M, D); None: the features themselves, and none is its own neighbour.
      k: how many; all there are if that is fewer, N or without queries N - 1.

    Returns:
      Which, int (M, k), the most similar first, and their cosine similarities, float32 (M, k).
    """
    among_themselves = queries is None
    features = _unit(features)
    queries = features if queries is None else _unit(queries)
    k = min(k, len(features) - among_themselves)
    found = np.empty((len(queries), k), np.int64)
    similarity = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), _CHUNK):
        similar = queries[start : start + _CHUNK] @ features.T  # (m, N)
        rows = np.arange(len(similar))
        if among_themselves:
            similar[rows, start + rows] = -np.inf
        best = np.argpartition(similar, len(features) - max(k, 1), axis=1)[:, len(features) - k :]  # (m, k)
        order = np.argsort(-np.take_along_axis(similar, best, axis=1), axis=1, kind="stable")
        found[start + rows] = best = np.take_along_axis(best, order, axis=1)
        similarity[start + rows] = np.take_along_axis(similar, best, axis=1)
    return found, similarity


def knn_predict(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Classifies by k nearest neighbours (Wu et al. 2018, 3.4), each voting with exp(cosine similarity / temperature).

    Args:
      train: features (N, D).
      labels: theirs, int (N,) in 0 .. num_classes - 1.
      test: features (M, D).
      num_classes: Y.
      k: neighbours; all N if there are fewer.
      temperature: above 0; the smaller, the more the nearest counts.

    Returns:
      The class of each, int (M,); the lowest of those with equally many votes.
    """
    found, similarity = neighbours(train, test, k)
    predicted = np.empty(len(test), np.int64)
    for start in range(0, len(test), _CHUNK):
        similar = similarity[start : start + _CHUNK].astype(np.float64)  # (m, k)
        # Relative to the nearest: the same votes up to a factor, and none overflows.
        weights = np.exp((similar - similar[:, :1]) / temperature)
        cells = np.arange(len(similar))[:, None] * num_classes + labels[found[start : start + _CHUNK]]
        votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(similar) * num_classes)
        predicted[start : start + _CHUNK] = votes.reshape(-1, num_classes).argmax(axis=1)
    return predicted


def ridge_predict(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, *, num_classes: int, ridge: float = 1e-3
) -> np.ndarray:
    """Classifies by linear regression of one-hot labels on standardised features, in closed form.

    Minimises |X W + b - Y|^2 / N + ridge |W|^2, X being the features with mean 0 and variance 1 over `train`: ridge
    regression with the penalty N * ridge. A feature that is constant over `train` is left out.

    Args and result as `knn_predict`; `ridge` above 0.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    mean, std = train.mean(axis=0), train.std(axis=0)
    # A constant one has a deviation of rounding errors, which must not be blown up to 1.
    scale = np.where(std > 1e-6 * np.abs(mean), 1 / np.maximum(std, np.finfo(np.float64).tiny), 0)
    x = (train - mean) * scale  # (N, D)
    y = np.eye(num_classes)[labels]  # (N, Y)
    gram = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - y.mean(axis=0)) / len(x))  # (D, Y)
    return ((test - mean) * scale @ weights + y.mean(axis=0)).argmax(axis=1)


def top1(
    train: dict[str, np.ndarray],
    test: dict[str, np.ndarray],
    *,
    num_classes: int,
    k: int,
    temperature: float,
    ridge: float,
) -> dict[str, float]:
    """Returns accuracies of `test` by both, 0 to 1: `knn_top1` and `ridge_top1`; nothing where either has no labels.

    `train` and `test` hold `features` float32 (N, D) and `label` int32 (N,); a label of -1 leaves its example out.
    """
    train, test = (_labelled(columns) for columns in (train, test))
    if not len(train["label"]) or not len(test["label"]):
        return {}
    arrays = (train["features"], train["label"], test["features"])
    predicted = {
        "knn_top1": knn_predict(*arrays, num_classes=num_classes, k=k, temperature=temperature),
        "ridge_top1": ridge_predict(*arrays, num_classes=num_classes, ridge=ridge),
    }
    return {name: float(np.mean(classes == test["label"])) for name, classes in predicted.items()}


def _labelled(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    known = columns["label"] >= 0
    return columns if known.all() else {name: column[known] for name, column in columns.items()}


def _unit(x: np.ndarray) -> np.ndarray:
    """Normalises rows to length 1, float32; a row of zeros stays."""
    x = x.astype(np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float32).tiny)
