"""What labels weigh in the loss, kept as spans of those that do not weigh 1: a data set without such has none."""

import numpy as np
from numpy.typing import NDArray

# Tokens [start, end), all of them labels of one document, that weigh the same and not 1; spans are in order.
SPAN = np.dtype([("start", "<i8"), ("end", "<i8"), ("weight", "<f4")])
Spans = NDArray[np.void]
NO_SPANS: Spans = np.empty(0, SPAN)


def spans_of(weights: NDArray[np.float32], labels: NDArray[np.bool_]) -> Spans:
    """The spans among (tokens,) weights, of which only those at `labels` (tokens,) count.

    The first token of a document must not be among the labels, so that no span reaches over an edge.
    """
    marked = np.where(labels, weights, np.float32(1))
    edges = np.flatnonzero(np.diff(marked, prepend=np.float32(1), append=np.float32(1)))
    starts, ends = edges[:-1], edges[1:]
    is_span = marked[starts] != 1
    spans = np.empty(int(is_span.sum()), SPAN)
    spans["start"], spans["end"], spans["weight"] = starts[is_span], ends[is_span], marked[starts[is_span]]
    return spans


def surplus(spans: Spans) -> NDArray[np.float64]:
    """(spans,) what each adds to the sum of the weights, beyond 1 for each label; negative below a weight of 1."""
    return (spans["weight"].astype(np.float64) - 1) * (spans["end"] - spans["start"])


def dense(spans: Spans, start: int, end: int) -> NDArray[np.float32]:
    """(end - start,) weights of the tokens [start, end), 1 outside of the spans, all of which lie within."""
    weights = np.ones(end - start, np.float32)
    for span in spans:
        weights[span["start"] - start : span["end"] - start] = span["weight"]
    return weights
