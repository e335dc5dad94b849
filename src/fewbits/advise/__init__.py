"""Before any work: what a run will write, need and take, where the result fits, and which method to choose."""

from fewbits.advise.advice import Advice, Situation, advise, targets
from fewbits.advise.doctor import Report, check
from fewbits.advise.forecast import Forecast, Target, forecast
from fewbits.advise.headers import imagine, open_headers

__all__ = [
    "Advice",
    "Forecast",
    "Report",
    "Situation",
    "Target",
    "advise",
    "check",
    "forecast",
    "imagine",
    "open_headers",
    "targets",
]
