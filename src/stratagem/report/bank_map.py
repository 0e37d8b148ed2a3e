"""A map of a memory bank: its snippets along their two leading principal components.

Snippets that lie together are alike for the encoder. Up to twelve classes have a look of their own;
of more, the class shows on hover. At most 1,200 snippets, evenly spaced, are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stratagem.memory.bank import MemoryBank
from stratagem.metrics.features import Components
from stratagem.report.charts import LOOKS, Series, line_chart

__all__ = ["bank_map"]

_DRAWN = 1200


def bank_map(bank: MemoryBank, classes: Sequence[str] = ()) -> str:
    """Draws a bank; returns an HTML <figure> for `page.page`, or nothing for fewer than 3 rows.

    Args:
        bank: The bank.
        classes: Names of the classes; their numbers by default.
    """
    if bank.num < 3:
        return ""
    rows = torch.linspace(0, bank.num - 1, min(bank.num, _DRAWN)).long()
    vectors = bank.lookup(rows)
    places = Components.fit(vectors, 2)(vectors)
    variance = places.var(0) / vectors.var(0).sum()
    labels = bank.labels[rows]
    known = labels.unique().tolist()
    apart = 1 < len(known) <= LOOKS
    series = []
    for label in known:
        x, y = places[labels == label].T.tolist()
        name = classes[label] if 0 <= label < len(classes) else f"class {label}"
        series.append(Series(name if label >= 0 else "no class", x, y, scatter=True))
    names = [
        f"{which} component ({100 * float(share):.0f} % of the variance)"
        for which, share in zip(("first", "second"), variance, strict=True)
    ]
    return line_chart(series, x_label=names[0], y_label=names[1], alike=not apart)
