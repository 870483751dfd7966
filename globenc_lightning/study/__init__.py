"""Statistics over records: drift, agreement between seeds, mass of tokens, and intervals over runs and examples.

Example:
    >>> from globenc_lightning import study
    >>> found = study.load("runs")  # doctest: +SKIP
    >>> found.summary(found.correlations(), "rho")  # doctest: +SKIP
"""

from globenc_lightning.study.loading import load
from globenc_lightning.study.study import Study

__all__ = ["Study", "load"]
