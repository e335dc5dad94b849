"""Before any work: what a run will write, need and take, where the result fits, and which method to choose."""

from fewbits.advise.forecast import Forecast, Target, forecast
from fewbits.advise.headers import imagine, open_headers

__all__ = ["Forecast", "Target", "forecast", "imagine", "open_headers"]
