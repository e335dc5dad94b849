"""The walk over a model's blocks, the activation store, and the work directory that makes it resumable."""
